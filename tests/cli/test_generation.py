"""Generation and instruction tuning through the command line: a smoke fit of all stages, test and predict."""

import json
import re
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CTRLConfig,
    CTRLLMHeadModel,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import lte_lightning
from lte_lightning.core.model.families import FAMILIES


@pytest.fixture(scope="module")
def fitted_e2e(tiny_lm, lightning, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("fitted-e2e")
    config = tiny_lm.config(epochs=(3, 2, 2), **{"trainer.logger": True, "model.init_args.samples": 2})
    outcome = lightning(cwd, config, "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def tested_e2e(fitted_e2e, tiny_lm, lightning, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("tested-e2e")
    outcome = lightning(cwd, tiny_lm.config(), "test", "--model.init_from", fitted_e2e.run / "model")
    assert outcome.code == 0, outcome.err
    return outcome


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_fit_reports_perplexity_and_keeps_the_lowest(fitted_e2e):
    results = fitted_e2e.results
    assert (results["task"], results["metric"]) == ("e2e", "perplexity")
    assert all(1 < results[view] < 320 for view in ("dense", "soft", "hard_before", "hard"))
    assert set(results["loss"]) == {"dense", "soft", "hard_before", "hard"}
    assert torch.tensor(results["loss"]["hard"]).exp().item() == pytest.approx(results["hard"], rel=1e-5)
    assert 0 < results["sparsity"] < 1
    best = torch.load(fitted_e2e.run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["lte"]["stage"] == "expert"
    assert best["lte"]["measured"]["hard"]["perplexity"] == results["hard"]
    last = torch.load(fitted_e2e.run / "checkpoints" / "last.ckpt", weights_only=True)
    (score,) = [s for key, s in last["callbacks"].items() if key.startswith("BestCheckpoint")]
    assert score["best_model_score"].item() == pytest.approx(results["hard"])
    assert score["best_model_score"] <= last["lte"]["measured"]["hard"]["perplexity"]


def test_the_validation_figure_is_that_of_the_saved_model(fitted_e2e, tiny_lm):
    model = lte_lightning.from_pretrained(fitted_e2e.run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(fitted_e2e.run / "model")
    total, count, active, tokens = 0.0, 0, 0, 0
    for row in lines(tiny_lm.task("e2e") / "validation.jsonl"):
        prompt = tokenizer(f"Input:\n{row['meaning_representation']}\n---\nOutput:\n")["input_ids"]
        answer = [*tokenizer(row["human_reference"])["input_ids"], 2]
        with torch.no_grad(), lte_lightning.RouterTrace(model) as trace:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= logits.gather(1, torch.tensor(answer)[:, None]).sum().item()
        count += len(answer)
        counts, n = trace.active_counts()
        active, tokens = active + counts.sum().item(), tokens + n
    assert total / count == pytest.approx(fitted_e2e.results["loss"]["hard"], rel=1e-5)
    assert 1 - active / (tokens * 2 * 8) == pytest.approx(fitted_e2e.results["sparsity"], abs=1e-9)


def test_samples_to_read_after_every_validation(fitted_e2e):
    samples = lines(fitted_e2e.run / "samples.jsonl")
    assert [sample["view"] for sample in samples] == 6 * ["dense"] + 4 * ["hard_before"] + 4 * ["hard"]
    assert [sample["epoch"] for sample in samples] == [epoch for epoch in range(7) for _ in range(2)]
    assert {sample["prompt"] for sample in samples} == {
        f"Input:\nname[cow], food[{food}]\n---\nOutput:\n" for food in ("cat", "dog")
    }
    assert (fitted_e2e.run / "artifacts" / "samples.jsonl").exists()


def test_a_test_scores_what_the_model_writes(tested_e2e, fitted_e2e, tiny_lm):
    found, results = tested_e2e.results, fitted_e2e.results
    assert found["perplexity"] == pytest.approx(results["hard"], rel=1e-6)
    assert found["sparsity_per_layer"] == results["sparsity_per_layer"]
    assert found["flops_per_token"] == results["flops_per_token"]
    assert found["union_sparsity"] == results["union_sparsity"]
    assert found["union_sparsity"]["1"] == pytest.approx(found["sparsity"])  # a row decodes one token at a time
    predictions = lines(tested_e2e.written.parent / "predictions.jsonl")
    assert found["examples"] == len(predictions) == 5
    assert [row["row"] for row in predictions] == list(range(5))
    assert predictions[1]["references"] == ["the cow eats dog.", "cow: dog"]
    assert 0 <= found["rouge_l"] <= 1
    assert 0 <= found["bleu"] <= 100
    assert found["empty_predictions"] == sum(not row["prediction"] for row in predictions)


def test_predictions_are_the_greedy_ones_of_each_prompt_alone(tested_e2e, fitted_e2e, tiny_lm, lightning, tmp_path):
    model = lte_lightning.from_pretrained(fitted_e2e.run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(fitted_e2e.run / "model")
    predictions = lines(tested_e2e.written.parent / "predictions.jsonl")
    for row in predictions:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == 2:
                break
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert text.removeprefix(row["prompt"]).strip() == row["prediction"]
    again = lightning(tmp_path, tiny_lm.config(), "predict", "--model.init_from", fitted_e2e.run / "model")
    assert again.code == 0, again.err
    assert lines(again.written) == predictions


def test_a_dense_model_is_tested_densely(tiny_lm, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny_lm.config(**{"trainer.logger": True}), "test")
    assert outcome.code == 0, outcome.err
    found = outcome.results
    assert found["sparsity"] == 0
    assert found["flops_per_token"] == found["dense_flops_per_token"]
    assert {"perplexity", "rouge_l", "bleu"} <= set(found)
    (artifact,) = tmp_path.glob("runs/*/*/artifacts/predictions.jsonl")
    assert len(lines(artifact)) == 5


def test_instructions(tiny_lm, lightning, tmp_path):
    config = tiny_lm.config("InstructData", **{"model.init_args.gradient_checkpointing": True})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    assert (fit.results["task"], fit.results["metric"]) == ("instruct", "perplexity")
    tested = lightning(tmp_path, config, "test", "--model.init_from", fit.run / "model")
    assert tested.code == 0, tested.err
    assert tested.results["examples"] == 6


def test_the_first_layers_of_a_model(tiny_lm, lightning, tmp_path):
    fit = lightning(tmp_path, tiny_lm.config(**{"model.init_args.layers": 1}), "fit")
    assert fit.code == 0, fit.err
    assert len(fit.results["sparsity_per_layer"]) == 1
    assert AutoModelForCausalLM.from_pretrained(fit.run / "model").config.num_hidden_layers == 1
    again = ("--model.init_from", fit.run / "model")
    tested = lightning(tmp_path, tiny_lm.config(**{"model.init_args.layers": 1}), "test", *again)
    assert tested.code == 0, tested.err
    wrong = lightning(tmp_path, tiny_lm.config(**{"model.init_args.layers": 2}), "test", *again)
    assert wrong.code == 1
    assert "was saved with 1 layers, and layers is 2" in wrong.err


def test_a_family_that_has_no_row(tiny_lm, lightning, tmp_path):
    folder = shutil.copytree(tiny_lm.model, tmp_path / "ctrl")
    CTRLLMHeadModel(
        CTRLConfig(vocab_size=400, n_positions=256, n_embd=16, dff=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    outcome = lightning(tmp_path, tiny_lm.config(**{"model.init_args.pretrained": str(folder)}), "fit")
    assert outcome.code == 1
    assert "model type 'ctrl' is not supported; known are" in outcome.err


@pytest.mark.skipif("t5" not in FAMILIES, reason="the FFN table has no encoder-decoder yet")
def test_an_encoder_decoder(tiny_lm, lightning, tmp_path):
    folder = shutil.copytree(tiny_lm.model, tmp_path / "t5")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=400, **sizes, **tokens)).save_pretrained(folder)
    config = tiny_lm.config(**{"model.init_args.pretrained": str(folder), "model.init_args.samples": 2})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    assert len(fit.results["sparsity_per_layer"]) == 4
    assert {row["view"] for row in lines(fit.run / "samples.jsonl")} == {"dense", "hard_before", "hard"}
    tested = lightning(tmp_path, config, "test", "--model.init_from", fit.run / "model")
    assert tested.code == 0, tested.err
    assert tested.results["perplexity"] == pytest.approx(fit.results["hard"], rel=1e-5)
    assert tested.results["examples"] == 5


def test_an_encoder_sees_what_it_would_have_to_predict(tiny_lm, lightning, tmp_path):
    folder = shutil.copytree(tiny_lm.model, tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=400, **sizes)).save_pretrained(folder)
    outcome = lightning(tmp_path, tiny_lm.config(**{"model.init_args.pretrained": str(folder)}), "fit")
    assert outcome.code == 1
    assert "is an encoder (bert), whose attention already sees the tokens to predict" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.init_args.layers": 3}, "layers is 3, but .* has 2"),
        ({"data.init_args.max_length": 512}, "max_length is 512, but the model's context is 256 tokens"),
        ({"model.init_args.samples": -1}, "samples is -1"),
        ({"model.init_args.pretrained": "/none"}, "no model folder /none"),
        ({"data.init_args.max_new_tokens": 64}, "leaves no room for a prompt"),
    ],
)
def test_bad_input(options, message, tiny_lm, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny_lm.config(**options), "fit")
    assert outcome.code == 1
    assert re.search(message, " ".join(outcome.err.split())), outcome.err
    assert "Traceback" not in outcome.err


# What peft warns of while it imports.
@pytest.mark.filterwarnings("ignore")
def test_lora(tiny_lm, lightning, tmp_path):
    pytest.importorskip("peft", reason='needs the extra "peft": pip install "lte-lightning[peft]"')
    config = tiny_lm.config(**{"model.init_args.lora": {"rank": 2}})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    plain = tiny_lm.config()
    tests = [
        lightning(tmp_path, config, "test", "--ckpt_path", fit.run / "checkpoints" / "best.ckpt"),
        lightning(tmp_path, plain, "test", "--model.init_from", fit.run / "model"),
    ]
    for tested in tests:
        assert tested.code == 0, tested.err
        assert tested.results["perplexity"] == pytest.approx(fit.results["hard"], rel=1e-4)
        assert tested.results["flops_per_token"] == fit.results["flops_per_token"]
    (tmp_path / "stopped").mkdir()
    stopped = lightning(tmp_path / "stopped", config, "fit", "--trainer.max_epochs", 2)
    last = stopped.run / "checkpoints" / "last.ckpt"
    resumed = lightning(tmp_path / "stopped", config, "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert resumed.results["hard"] == pytest.approx(fit.results["hard"], rel=1e-6)
    trained = AutoModelForCausalLM.from_pretrained(fit.run / "model").state_dict()
    original = AutoModelForCausalLM.from_pretrained(tiny_lm.model).state_dict()
    assert trained.keys() == original.keys()
    assert not torch.equal(*(m["model.layers.0.self_attn.q_proj.weight"] for m in (trained, original)))


def test_what_belongs_to_a_model_travels_with_it(tiny_lm, lightning, tmp_path):
    start = shutil.copytree(tiny_lm.model, tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(start)
    GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3).save_pretrained(start)
    config = tiny_lm.config(epochs=(1, 0, 0), **{"model.init_args.pretrained": str(start)})
    outcome = lightning(tmp_path, config, "fit")
    assert outcome.code == 0, outcome.err
    model = outcome.run / "model"
    assert AutoTokenizer.from_pretrained(model).chat_template == tokenizer.chat_template
    generation = lte_lightning.from_pretrained(model).generation_config
    assert (generation.max_new_tokens, generation.do_sample, generation.top_k) == (7, True, 3)
