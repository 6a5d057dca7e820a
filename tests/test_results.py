"""What fits and tests leave is one type each: written, read, and refused by file and field."""

import json

import pytest

from lte_lightning.errors import UserError
from lte_lightning.results import Evaluation, Results, read_evaluation, read_results

FIT = {
    "task": "sst2",
    "metric": "accuracy",
    "dense": 0.9,
    "hard_before": None,
    "hard": 0.875,
    "sparsity": 0.5,
    "sparsity_per_layer": [0.25, 0.75],
    "flops_per_token": 3,
    "dense_flops_per_token": 6.5,
    "seed": 1,
}


def write(folder, content):
    (folder / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_what_is_written_is_read(tmp_path):
    found = Results.of(FIT | {"union_sparsity": {"1": 0.5}, "bound": float("inf"), "f1": {"hard": 0.5, "dense": None}})
    found.write(tmp_path / "results.json")
    assert read_results(tmp_path) == found
    assert found.others == {"f1": {"hard": 0.5, "dense": None}}
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["flops_per_token"] == 3
    assert isinstance(content["flops_per_token"], int)
    # what every fit may measure is there, what few do is not
    assert content["soft"] is None
    assert not {"floor", "speedup", "skipped_rows"} & content.keys()
    test = Evaluation(sparsity=0.5, others={"rouge_l": 0.7, "perplexity": None, "subjects": {"law": 0.5}})
    test.write(tmp_path / "test.json")
    assert read_evaluation(tmp_path / "test.json") == test


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """It has fewer keys, and some that nobody writes any more."""
    found = read_results(write(tmp_path, FIT | {"accuracy_mm": {"hard": 0.8}, "steps": 12}))
    assert (found.value, found.bound, found.seconds_per_stage) == (0.875, None, {})
    assert found.content() | FIT == found.content()
    assert found.others == {"accuracy_mm": {"hard": 0.8}, "steps": 12}
    assert found.metrics()["results/steps"] == 12.0


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"dense": "0.9"}, "dense is '0.9': Input should be a valid number"),
        ({"dense": True}, "dense is True: Input should be a valid number"),
        ({"seed": 1.5}, "seed is 1.5: Input should be a valid integer"),
        ({"task": None}, "task is None: Input should be a valid string"),
        ({"flops_per_token": None}, "flops_per_token is None: Input should be a valid number"),
        ({"sparsity_per_layer": [0.5, "x"]}, "sparsity_per_layer.1 is 'x': Input should be a valid number"),
        ({"union_sparsity": {"8": None}}, "union_sparsity.8 is None: Input should be a valid number"),
        ({"seconds_per_stage": 3}, "seconds_per_stage is 3: Input should be"),
        ({"versions": []}, r"versions is \[\]: Input should be"),
    ],
)
def test_a_field_of_another_type_is_named(change, cause, tmp_path):
    with pytest.raises(UserError, match=rf"results\.json is damaged, or .*: {cause}.*; use the version") as caught:
        read_results(write(tmp_path, FIT | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(FIT))
def test_a_field_that_is_missing_is_named(key, tmp_path):
    with pytest.raises(UserError, match=rf"results\.json is damaged, or .*: {key} is not there; use the version"):
        read_results(write(tmp_path, {name: value for name, value in FIT.items() if name != key}))


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"has no results\.json: its fit was not finished, or it is no run folder"):
        read_results(tmp_path)
    for content, cause in (('{"task": ', "Expecting value"), ("[1]", r"it holds \[1\], not a mapping")):
        with pytest.raises(UserError, match=rf"results\.json is damaged: {cause}"):
            read_results(write(tmp_path, content))
        (tmp_path / "test.json").write_text(content)
        with pytest.raises(UserError, match=rf"test\.json is damaged: {cause}.*; test the run again, or remove it"):
            read_evaluation(tmp_path / "test.json")


def test_a_value_that_is_not_a_number_is_not_defined(tmp_path):
    assert read_results(write(tmp_path, FIT | {"hard": float("nan")})).hard is None
