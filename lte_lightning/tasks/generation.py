"""Text generation: fine-tuning on prompts and answers, and the answers that the model then writes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from lte_lightning.core.model.exact import is_sharded
from lte_lightning.core.model.experts import set_mode
from lte_lightning.core.model.head import IGNORED
from lte_lightning.data.text import is_encoder_decoder
from lte_lightning.errors import UserError
from lte_lightning.tasks.evaluation import VIEW_MODES
from lte_lightning.tasks.language_model import LanguageModel
from lte_lightning.trainer import declared


class Generation(LanguageModel):
    """Fine-tunes a decoder or an encoder-decoder to answer prompts, and makes it sparse.

    Validation gives the perplexity of the answers; ``lightning test`` writes them, greedily, and scores them by ROUGE-L
    and BLEU. The sparsity is over all real tokens of prompts and answers.

    Args:
        samples: After each validation of a fit write this many answers to ``samples.jsonl``, for reading.
        **kwargs: See `LanguageModel`.
    """

    takes_encoder_decoders = True

    def __init__(self, samples: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters({"samples": samples})
        if samples < 0:
            raise UserError(f"samples is {samples}; it is a number of answers, 0 for none")

    @property
    def auto_class(self) -> Any:
        """Chosen by the model's configuration."""
        return AutoModelForSeq2SeqLM if is_encoder_decoder(self.source) else AutoModelForCausalLM

    def token_masks(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the real tokens: prompt and answer; with an encoder, each in its own stack."""
        if not self.net.config.is_encoder_decoder:
            return super().token_masks(batch)
        return batch["attention_mask"], batch["labels"] != IGNORED

    @torch.no_grad()
    def answer(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Continues prompts greedily, in the mode that the model is in.

        Args:
            batch: Of prompts, padded on the left for a decoder.

        Returns:
            For each prompt its ``row``, ``prompt``, ``prediction`` and ``references``.
        """
        data = declared(self.trainer).datamodule
        net: Any = self.net  # of `auto_class`, so it generates
        ids_BT = net.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=self._generation_config(data.tokenizer, data.max_new_tokens),
            synced_gpus=is_sharded(self.net),
        )
        if not self.net.config.is_encoder_decoder:
            ids_BT = ids_BT[:, batch["input_ids"].shape[1] :]
        rows = zip(batch["row"], batch["prompt"], batch["references"], ids_BT, strict=True)
        return [
            {"row": row, "prompt": prompt, "prediction": data.decode(ids_T), "references": references}
            for row, prompt, references, ids_T in rows
        ]

    def _generation_config(self, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
        # Of the model's own configuration only its special tokens: how it samples or searches is not ours
        own = self.net.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=own.bos_token_id,
            eos_token_id=sorted({tokenizer.eos_token_id, *(end for end in ends if end is not None)}),
            decoder_start_token_id=own.decoder_start_token_id,
            forced_bos_token_id=own.forced_bos_token_id,
            forced_eos_token_id=own.forced_eos_token_id,
        )

    # Samples to read

    def on_fit_start(self) -> None:
        """Refuses samples that there is no room for."""
        super().on_fit_start()
        if self.hparams["samples"]:
            _ = declared(self.trainer).datamodule.prompt_limit

    def on_validation_epoch_end(self) -> None:
        """Logs the figures, and keeps a few answers of the stage's last view for reading."""
        super().on_validation_epoch_end()
        count = self.hparams["samples"]
        if not count or self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        prompts = declared(self.trainer).datamodule.sample_prompts(count)
        if prompts is None:
            return
        view = self.views[-1]
        set_mode(self.net, VIEW_MODES[view])
        batch = self.trainer.strategy.batch_to_device(prompts)
        with self.trainer.precision_plugin.forward_context():
            answers = self.answer(batch)
        about = {"epoch": self.current_epoch, "step": self.global_step, "view": view}
        self.samples = [about | answer for answer in answers]
        self.apply_stage()

    # Test and prediction

    def on_test_start(self) -> None:
        """Begins without predictions."""
        super().on_test_start()
        self.predictions = []

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures loss and sparsity on the prompts with their answers, and then writes answers of its own."""
        if dataloader_idx == 0:
            super().test_step(batch, batch_idx)
            return
        set_mode(self.net, self.test_view)
        self.predictions += self.answer(batch)

    def run_again(self, batch: dict[str, Any], dataloader_idx: int) -> None:
        """Runs a batch as a validation or a test does, and keeps nothing."""
        if self.trainer.testing and dataloader_idx:
            self.answer(batch)
        else:
            super().run_again(batch, dataloader_idx)

    def test_figures(self) -> dict[str, Any]:
        """Returns the scores of the predictions of all processes."""
        self.gather_predictions()
        texts = [prediction["prediction"] for prediction in self.predictions]
        scores = score_texts(texts, [prediction["references"] for prediction in self.predictions])
        if skipped := declared(self.trainer).datamodule.skipped:
            scores["skipped_rows"] = dict(skipped)
        if cut := declared(self.trainer).datamodule.cut_answers:
            scores["cut_answers"] = dict(cut)
        return scores

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns the answers to a batch of prompts."""
        return self.answer(batch)


def score_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Scores predictions against one or more references each.

    Args:
        predictions: N texts.
        references: For each of them at least one text.

    Returns:
        ``rouge_l``: the mean of the F-measure (0 to 1) with the best reference, by ``rouge-score`` without stemming.
        ``bleu``: the corpus's, 0 to 100, by sacrebleu (13a tokens, lower case), over all references.
        ``examples`` and ``empty_predictions``, which score 0, are counts.
    """
    from rouge_score.rouge_scorer import RougeScorer  # with nltk and scikit-learn, which no help text needs
    from sacrebleu.metrics import BLEU

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [
        scorer.score_multi(several, text)["rougeL"].fmeasure
        for text, several in zip(predictions, references, strict=True)
    ]
    # sacrebleu wants the first references of all, then the second ones, ..., and None where there is none
    most = max(map(len, references))
    streams: list[Any] = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    bleu = BLEU(tokenize="13a", lowercase=True).corpus_score(list(predictions), streams).score
    empty = sum(not text.strip() for text in predictions)
    return {
        "rouge_l": sum(rouge) / len(rouge),
        "bleu": float(bleu),
        "examples": len(rouge),
        "empty_predictions": empty,
    }
