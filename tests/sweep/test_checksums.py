"""A sweep goes on while its configurations say the same, and only then."""

import hashlib
import json
from pathlib import Path

import pytest

from lte_lightning.errors import UserError
from lte_lightning.sweep.checksums import checksum
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.spec import read_sweep

BASE = "# for a first look\nmodel: {name: tiny, rate: 1.0}\ndata:\n  source: rows  # of reviews\n"
REWORDED = {
    "comments": "model: {name: tiny, rate: 1.0}\n# reviews\ndata:\n  source: rows\n",
    "quotes and indentation": "model:\n    name: 'tiny'\n    rate: 1.0\ndata: {source: \"rows\"}\n",
    "order of keys": "data: {source: rows}\nmodel: {rate: 1.0, name: tiny}\n",
    "anchors": "data: {source: &text rows}\nmodel: {name: tiny, rate: 1.0}\n",
}
CHANGED = {
    "a value": BASE.replace("1.0", "1.5"),
    "a type": BASE.replace("1.0", "1"),  # of a limit on batches, say
    "a text": BASE.replace("1.0", "'1.0'"),
    "a key": BASE + "  task: stsb\n",
    "no YAML": BASE + "{\n",
    "nothing": "# model: {name: tiny, rate: 1.0}\n",
}


@pytest.fixture
def hold(tmp_path):
    """`hold(text)` begins or continues a sweep whose configuration has this text."""
    (tmp_path / "trial.yaml").write_text("configs: [base.yaml]\n")

    def hold(text: str, file: Path = tmp_path / "trial.yaml") -> SweepFolder:
        (file.parent / "base.yaml").write_text(text)
        folder = SweepFolder(tmp_path / "runs" / "trial")
        with folder.hold(read_sweep(file)):
            return folder

    return hold


def stores_bytes(folder: SweepFolder, text: str) -> None:
    """Writes the folder's description as earlier versions did, with the checksum of the configuration's bytes."""
    folder.about["configs"] = {"base.yaml": hashlib.sha256(text.encode()).hexdigest()}
    folder.save()


@pytest.mark.parametrize("text", REWORDED.values(), ids=REWORDED)
def test_a_sweep_goes_on_with_a_reworded_configuration(text, hold):
    hold(BASE)
    hold(text)


@pytest.mark.parametrize("text", CHANGED.values(), ids=CHANGED)
def test_a_sweep_is_refused_with_a_changed_configuration(text, hold):
    hold(BASE)
    with pytest.raises(UserError, match=r"base\.yaml changed since the sweep in .*/runs/trial began"):
        hold(text)


def test_a_folder_of_an_earlier_version_goes_on_with_the_same_bytes(hold, tmp_path):
    stores_bytes(hold(BASE), BASE)
    hold(BASE)
    stored = json.loads((tmp_path / "runs" / "trial" / "sweep.json").read_text())["configs"]
    assert stored == {"base.yaml": checksum(tmp_path / "base.yaml")}
    hold(REWORDED["comments"])  # from now on, a comment may change


def test_a_folder_of_an_earlier_version_is_refused_with_other_bytes(hold):
    stores_bytes(hold(BASE), BASE)
    with pytest.raises(UserError, match=r"base\.yaml changed since the sweep in .* began"):
        hold(REWORDED["comments"])


def test_a_copy_of_the_sweep_file_may_be_reworded(hold, tmp_path):
    hold(BASE)
    copy = tmp_path / "copy" / "trial.yaml"
    copy.parent.mkdir()
    copy.write_text("# a sweep\nconfigs:\n- base.yaml\n")
    hold(BASE, copy)
    copy.write_text("configs: [base.yaml, base.yaml]\n")
    with pytest.raises(UserError, match=r"belongs to the sweep .*/copy/trial\.yaml, not to .*/trial\.yaml"):
        hold(BASE)


@pytest.mark.parametrize("text", ["{", "{1: a, b: c}", "&a [*a]", "a: 1\na: 2\n", ""])
def test_the_checksum_of_a_file_that_is_no_mapping(text, hold):
    hold(text)
    hold(text)


def test_a_base_configuration_that_changed(bench, tmp_path):
    trial = bench()
    trial.run()
    sweep = read_sweep(trial.file)
    (tmp_path / "base.yaml").write_text("model: {other: 1}\n")
    with (
        pytest.raises(UserError, match=r"base\.yaml changed since the sweep in .* began"),
        SweepFolder(tmp_path / "runs" / "trial").hold(sweep),
    ):
        pytest.fail("went on")


def test_a_part_of_a_base_configuration_that_changed(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    (tmp_path / "base.yaml").write_text("model: parts/model.yaml\ndata: {files: [train.yaml, parts/model.yaml]}\n")
    (parts / "model.yaml").write_text("lte: deeper.yml\n")
    (parts / "deeper.yml").write_text("expert_size: 32\n")
    file, folder = tmp_path / "trial.yaml", SweepFolder(tmp_path / "runs" / "trial")
    file.write_text("configs: [base.yaml]\n")
    for _ in range(2):
        with folder.hold(read_sweep(file)):
            pass
    (parts / "deeper.yml").write_text("expert_size: 16\n")
    with (
        pytest.raises(UserError, match=r"parts/deeper\.yml changed since the sweep in .* began"),
        folder.hold(read_sweep(file)),
    ):
        pytest.fail("went on")
