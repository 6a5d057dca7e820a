"""Language modelling through the command line."""

import math
import shutil

import pytest
import torch
from transformers import AutoTokenizer, T5Config

import lte_lightning


def test_language_modelling_from_scratch(tiny_lm, lightning, tmp_path):
    config = tiny_lm.config("LanguageModelData", **{"model.init_args.from_scratch": {"hidden_size": 16}})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    results = fit.results
    assert (results["task"], results["metric"]) == ("lm", "perplexity")
    assert {"loss", "word_perplexity"} <= set(results)
    model = lte_lightning.from_pretrained(fit.run / "model").eval()
    assert model.config.hidden_size == 16
    tokenizer = AutoTokenizer.from_pretrained(fit.run / "model")
    # By hand: the same stream, cut into blocks of 32 that share a token
    text = (tiny_lm.task("text") / "validation.txt").read_text()
    articles = [f" = The{article}" for article in text.split(" = The")[1:]]
    ids = [2] + [token for article in articles for token in [*tokenizer(article)["input_ids"], 2]]
    loss = 0.0
    for start in range(0, len(ids) - 1, 31):
        block = torch.tensor(ids[start : start + 32])
        with torch.no_grad():
            loss += -model(block[None]).logits[0, :-1].log_softmax(-1).gather(1, block[1:, None]).sum().item()
    assert results["loss"]["hard"] == pytest.approx(loss / (len(ids) - 1), rel=1e-4)
    assert results["word_perplexity"]["hard"] == pytest.approx(math.exp(loss / len(text.split())), rel=1e-3)
    tested = lightning(tmp_path, config, "test", "--model.init_from", fit.run / "model")
    assert tested.code == 0, tested.err
    assert tested.results["perplexity"] == pytest.approx(results["hard"])
    assert tested.results["word_perplexity"] == pytest.approx(results["word_perplexity"]["hard"])


def test_a_tokenizer_of_another_model(tiny_lm, lightning, tmp_path):
    config = tiny_lm.config("LanguageModelData", **{"model.init_args.from_scratch": {"vocab_size": 64}})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 1
    assert "tokens, the model 64: they do not belong together" in fit.err


def test_an_encoder_decoder_is_for_generation(tiny_lm, lightning, tmp_path):
    folder = shutil.copytree(tiny_lm.model, tmp_path / "t5")
    T5Config(vocab_size=400).save_pretrained(folder)
    config = tiny_lm.config("LanguageModelData", **{"model.init_args.pretrained": str(folder)})
    outcome = lightning(tmp_path, config, "fit")
    assert outcome.code == 1
    assert "is an encoder-decoder (t5); LanguageModel needs a decoder, Generation takes both" in outcome.err


def test_predict_says_what_to_do_instead(tiny_lm, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny_lm.config("LanguageModelData"), "predict")
    assert outcome.code == 1
    assert "nothing to predict" in outcome.err
