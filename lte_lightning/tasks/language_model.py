"""Language modelling: the loss on tokens, reported as perplexity."""

import math
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import nn
from torchmetrics import Metric
from transformers import AutoConfig, AutoModelForCausalLM

from lte_lightning.core.model.families import FAMILIES
from lte_lightning.core.model.head import IGNORED, run_where_asked
from lte_lightning.errors import UserError
from lte_lightning.tasks.base import LteModule
from lte_lightning.tasks.lora import Lora, add_lora, merge_lora
from lte_lightning.trainer import declared


class Perplexity(Metric):
    """Perplexity over a whole evaluation: every token weighs the same, whatever batch it was in; sums over devices."""

    full_state_update = False
    loss_sum: torch.Tensor
    tokens: torch.Tensor
    words: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("words", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_sum: torch.Tensor, tokens: torch.Tensor, words: torch.Tensor | None = None) -> None:
        """Adds a batch: the sum of its tokens' losses (natural logarithm), how many they are, and words if known.

        Each may be that of the batch, a scalar, or those of its rows.
        """
        self.loss_sum += loss_sum.double().sum()
        self.tokens += tokens.sum()
        if words is not None:
            self.words += words.sum()

    def compute(self) -> dict[str, float]:
        """Returns the figures.

        Returns:
            ``loss``, the mean per token, ``perplexity``, its exponential, and where words are known
            ``word_perplexity``, exp(total loss / number of words).
        """
        loss_sum = self.loss_sum.item()
        values = {"loss": loss_sum / int(self.tokens)}
        values["perplexity"] = _exp(values["loss"])
        if int(self.words):
            values["word_perplexity"] = _exp(loss_sum / int(self.words))
        return values


class LanguageModel(LteModule):
    """Trains a causal language model and makes it sparse.

    Args:
        from_scratch: Start from random weights instead of the pretrained ones; the values replace entries of the
            model's configuration, e.g. ``{hidden_size: 256, num_hidden_layers: 4}``.
        lora: Train attention by low-rank adapters, and the rest in full: ``{rank: 16}``. A saved model has them merged.
        **kwargs: See `LteModule`.
    """

    metric_name = "perplexity"
    tests_dense = True
    takes_encoder_decoders: ClassVar[bool] = False

    def __init__(self, from_scratch: dict[str, Any] | None = None, lora: Lora | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters({"from_scratch": from_scratch, "lora": asdict(lora) if lora else None})
        self.lora = lora

    @property
    def auto_class(self) -> Any:
        """A decoder with its head."""
        return AutoModelForCausalLM

    def configure_model(self) -> None:
        """Loads the model, with adapters if wanted, and checks that the data fit it."""
        fresh = not self.is_loaded
        if fresh:
            self._require_generator()
        super().configure_model()
        if fresh and self.lora:
            add_lora(self.net, self.lora)
        data = declared(self._trainer).datamodule if self._trainer else None
        if not fresh or data is None:
            return
        context = getattr(self.net.config, "max_position_embeddings", None)
        if context and data.max_length > context:
            raise UserError(f"max_length is {data.max_length}, but the model's context is {context} tokens")
        vocabulary = getattr(self.net.get_input_embeddings(), "num_embeddings", None)
        if vocabulary is not None and len(data.tokenizer) > vocabulary:
            raise UserError(
                f"the tokenizer has {len(data.tokenizer)} tokens, the model {vocabulary}: they do not belong together"
            )

    def _require_generator(self) -> None:
        try:
            config = AutoConfig.from_pretrained(self.source)
        except (OSError, ValueError):
            return  # loading says what is wrong
        kind = family.kind if (family := FAMILIES.get(config.model_type)) else ""
        # Hugging Face gives an encoder a head for the next token without hiding that token from it.
        if kind == "encoder" and not getattr(config, "is_decoder", False):
            raise UserError(
                f"{self.source} is an encoder ({config.model_type}), whose attention already sees the tokens to predict"
            )
        if kind == "encoder-decoder" and not self.takes_encoder_decoders:
            raise UserError(
                f"{self.source} is an encoder-decoder ({config.model_type}); {type(self).__name__} needs a decoder, "
                "Generation takes both"
            )

    def before_export(self) -> None:
        """Merges the adapters."""
        merge_lora(self.net)

    def on_test_start(self) -> None:
        """Tests the model as it would be exported."""
        self.before_export()
        super().on_test_start()

    def on_predict_start(self) -> None:
        """Predicts with the model as it would be exported."""
        self.before_export()
        super().on_predict_start()

    def make_metric(self) -> Metric:
        """Returns loss and perplexity."""
        return Perplexity()

    def run_model(self, batch: dict[str, torch.Tensor], net: Any = None) -> Any:
        """Returns the model's outputs, a decoder's logits only where there are labels; words are not for the model."""
        net = self.net if net is None else net
        inputs = {key: value for key, value in batch.items() if key != "words"}
        return net(**inputs) if net.config.is_encoder_decoder else run_where_asked(net, inputs)

    def kept_logits(self, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logits that have a label, [N, V]."""
        if self.net.config.is_encoder_decoder:
            return outputs.logits[batch["labels"] != IGNORED]
        return outputs.logits[0]

    def task_amount(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns how many tokens have a label."""
        # A decoder's first label is never asked for: nothing stands before it.
        labels = batch["labels"] if self.net.config.is_encoder_decoder else batch["labels"][:, 1:]
        return (labels != IGNORED).sum()

    def outputs_for_metric(self, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the sum of the losses, the number of tokens that have one, and that of words if known."""
        tokens = self.task_amount(batch)
        sums = (outputs.loss.detach() * tokens, tokens)
        return (*sums, batch["words"]) if "words" in batch else sums

    def by_rows(self, found: Any, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the sum of each row's losses, and how many tokens it has that have one, [B]; and words if known."""
        labels_BT = batch["labels"] if self.net.config.is_encoder_decoder else batch["labels"][:, 1:]
        asked_BT = labels_BT != IGNORED
        logits_NV = self.kept_logits(outputs, batch).float()
        loss_N = nn.functional.cross_entropy(logits_NV, labels_BT[asked_BT], reduction="none")
        loss_BT = torch.zeros(asked_BT.shape, device=loss_N.device).masked_scatter(asked_BT, loss_N)
        return loss_BT.sum(1), asked_BT.sum(1), *found[2:]

    def gather_predictions(self) -> None:
        """Makes ``predictions`` those of all processes, in the order of their rows."""
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.predictions)
            self.predictions = [prediction for part in gathered for prediction in part]
        self.predictions.sort(key=lambda prediction: prediction["row"])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Refuses: there is no answer."""
        raise UserError("a language model has nothing to predict here; `lightning test` gives its perplexity")


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
