"""A target sparsity is reached within one point on every kind of task, with rows enough that a point says something."""

import random

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from .conftest import FILLERS, sst2_rows, write_rows


def meals(count, seed):
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        one, other = generator.sample(FILLERS, 2)
        text = generator.choice(("the {} eats {}.", "{}: {}", "a {} is {}."))
        rows.append(
            {"meaning_representation": f"name[{one}], food[{other}]", "human_reference": text.format(one, other)}
        )
    return rows


@pytest.fixture(scope="module")
def larger(tiny, tiny_lm, tmp_path_factory):
    """Tiny models with hundreds of rows for each task."""
    folder = tmp_path_factory.mktemp("larger")
    write_rows(folder / "sst2", train=sst2_rows(320, 0), validation=sst2_rows(240, 1))
    write_rows(folder / "e2e", train=meals(240, 0), validation=meals(120, 1))
    (folder / "text").mkdir()
    for seed, (split, count) in enumerate((("train", 400), ("validation", 160))):
        text = "".join(f"{row['human_reference']}\n" for row in meals(count, seed))
        (folder / "text" / f"{split}.txt").write_text(text)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    tokenizer = tiny_lm.model
    T5ForConditionalGeneration(T5Config(vocab_size=400, initializer_factor=2.0, **sizes, **tokens)).save_pretrained(
        folder / "t5"
    )
    for file in tokenizer.glob("token*"):
        (folder / "t5" / file.name).write_bytes(file.read_bytes())
    return folder


def config_of(kind, larger, tiny, tiny_lm):
    if kind == "classification":
        return tiny.config(epochs=(1, 1, 1), **{"data.init_args.source": str(larger / "sst2")})
    if kind == "language modelling":
        return tiny_lm.config("LanguageModelData", **{"data.init_args.source": str(larger / "text")})
    config = tiny_lm.config("GenerationData", **{"data.init_args.source": str(larger / "e2e")})
    if kind == "encoder-decoder":
        config["model"]["init_args"]["pretrained"] = str(larger / "t5")
    return config


KINDS = {
    **dict.fromkeys(("classification", "language modelling"), (0.3, 0.5, 0.8, 0.9, 0.95)),
    # The rest of the targets depends on the module and the stacks alone, which the kinds above have
    **dict.fromkeys(("generation", "encoder-decoder"), (0.3, 0.8, 0.95)),
}


@pytest.mark.parametrize(("kind", "target"), [(kind, target) for kind, targets in KINDS.items() for target in targets])
def test_within_one_point(kind, target, larger, tiny, tiny_lm, lightning, tmp_path):
    config = config_of(kind, larger, tiny, tiny_lm)
    config["model"]["init_args"] |= {"lte": {"expert_size": 4, "target_sparsity": target}, "efficiency_weight": None}
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    assert fit.results["target_sparsity"] == target
    assert fit.results["sparsity"] == pytest.approx(target, abs=0.01)
    assert "Target missed" not in fit.out
