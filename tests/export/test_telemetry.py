import os
import subprocess
import sys

import pytest

CODE = """
{first}
import openvino, torch
openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
"""


def convert(first, home):
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(home)}
    subprocess.run([sys.executable, "-c", CODE.format(first=first)], check=True, env=environment, capture_output=True)


def test_openvino_reports_nothing_to_its_makers(tmp_path):
    pytest.importorskip("openvino", reason="the extra export is not installed")
    convert("import lte_lightning.export", tmp_path)
    assert not (tmp_path / "intel").exists()  # where OpenVINO keeps whom it reports as
