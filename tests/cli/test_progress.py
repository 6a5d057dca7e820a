"""A fit's bars and lines on a terminal."""

import contextlib
import os
import re
import sys
from unittest import mock

import yaml

from lte_lightning.cli import main


def test_a_fit_on_a_terminal(tiny, terminal, tmp_path):
    config = tiny.config(**{"trainer.enable_progress_bar": True})
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    with (
        contextlib.chdir(tmp_path),
        terminal.attached(),
        mock.patch.object(sys, "argv", ["lightning"]),
        mock.patch.dict(os.environ),
    ):
        main(["fit", "--config", "fit.yaml"])
    drawn, left = terminal.getvalue(), "\n".join(terminal.lines())
    for bar in ("dense 1/1", "grouping (kmeans)", "router 1/1", "expert 1/1", "Validation DataLoader 0"):
        assert re.search(rf"\r{re.escape(bar)}: +\d+%\|.*/s[,\]]", drawn), bar
    # the lines have rows of their own, in this order, and no bar of ours is left (datasets leaves its own)
    lines = re.findall(r"^(?:BertFor|(?:dense|router|expert) \d|sst2).*?[:;]", left, re.MULTILINE)
    assert lines == ["BertForSequenceClassification:", "dense 1/1:", "router 1/1:", "expert 1/1:", "sst2:"]
    assert not re.search(r"^(?:Sanity|dense|grouping|router|expert|Validation).*%\|", left, re.MULTILINE)
