import sysconfig
from importlib.metadata import entry_points
from pathlib import Path

import pytest


@pytest.mark.parametrize("script", ["lightning", "lte"])
def test_the_console_scripts_are_ours(script):
    # lightning-sdk, which nothing of ours needs, has a `lightning` script without `fit`.
    owners = entry_points(group="console_scripts", name=script)
    assert [(owner.dist.name, owner.value) for owner in owners] == [("lte-lightning", "lte_lightning.cli:main")]


@pytest.mark.parametrize("script", ["lightning", "lte"])
def test_the_installed_file_is_ours(script):
    files = list(Path(sysconfig.get_path("scripts")).glob(f"{script}*"))
    ours = [file for file in files if file.stem == script]
    assert len(ours) == 1
    assert b"lte_lightning.cli" in ours[0].read_bytes()
