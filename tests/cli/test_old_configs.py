"""The data sections that runs saved before ClassificationData was there are still those of the same classes."""

import pytest
import yaml

COMMON = {"max_length": 64, "batch_size": 8, "eval_batch_size": 16, "holdout": 0.0, "train_rows": None}
PROMPTS = COMMON | {"max_new_tokens": 20, "streaming": False, "shuffle_buffer": 100, "revision": None}
OLD = {
    "GlueData": COMMON | {"task": "sst2", "source": "nyu-mll/glue"},
    "MovieReviews": {"max_length": 64, "batch_size": 32, "eval_batch_size": 128, "train_rows": 3000},
    "GenerationData": PROMPTS | {"task": "e2e", "source": None},
    "InstructData": PROMPTS | {"source": "tatsu-lab/alpaca", "prompt": "auto"},
    "LanguageModelData": {
        **{"source": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1", "revision": None, "documents": "heading"},
        **{"block_size": 128, "batch_size": 8, "eval_batch_size": 8, "streaming": False, "shuffle_buffer": 1000},
    },
    "MmluData": {
        **{"source": "cais/mmlu", "subset": "all", "revision": None, "subjects": None, "shots": 5, "max_length": 2048},
        "eval_batch_size": 4,
    },
}


@pytest.mark.parametrize("name", OLD)
def test_a_saved_configuration_of_the_time_before(name, parse, tiny, tmp_path):
    task = "Classification" if name in ("GlueData", "MovieReviews") else "Mmlu" if name == "MmluData" else "Generation"
    config = tiny.config()
    config["model"]["class_path"] = f"lte_lightning.tasks.{task}"
    config["data"] = {"class_path": f"lte_lightning.data.{name}", "init_args": OLD[name]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    data = parse("--config", "config.yaml").datamodule
    kept = {key: getattr(data, key) for key in OLD[name] if key not in ("source", "revision", "subjects", "block_size")}
    assert kept == {key: OLD[name][key] for key in kept}
    assert data.seed == 1
