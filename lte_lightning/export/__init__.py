"""Write a saved model in the formats that other programs read."""

import sys

# OpenVINO and NNCF report every conversion to their makers, from processes of their own. If they cannot import this
# package, they do not. A program that has imported it already keeps it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
