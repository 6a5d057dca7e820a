"""Checks command lines of fits without running them. ``lte sweep`` starts this as a process of its own.

echo '[["fit", "--config", "a.yaml"]]' | python -m lte_lightning.cli.check
"""

import contextlib
import io
import json
import sys
from typing import Any

from lte_lightning.cli.training import LteCLI, make_cli, user_error


class _Checked(Exception):
    """Raised once a command line is read, so that nothing runs."""


class _Check(LteCLI):
    """Parses and instantiates many command lines, without a trainer."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Raises before anything runs."""
        raise _Checked([self._check(parser, words) for words in args])

    def _check(self, parser: Any, words: list[str]) -> dict[str, Any]:
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                super().parse_arguments(parser, words)
                self.before_instantiate_classes()
                parser.instantiate_classes(self.config)
        except SystemExit:
            lines = [line for line in output.getvalue().splitlines() if not line.startswith("see ")]
            return {"error": "\n".join(lines).removeprefix("error: ")}
        except Exception as error:
            return {"error": str(user_error(error) or error)}
        logger = self.config.trainer.logger
        return {"error": None, "mlflow": logger in (None, True), "tracking_uri": self.config.run.tracking_uri}


def check_commands(commands: list[list[str]]) -> list[dict[str, Any]]:
    """Returns for each command line its error or None, whether it records in MLflow, and where."""
    try:
        make_cli([words[1:] for words in commands], run=False, cli_class=_Check)
    except _Checked as checked:
        return checked.args[0]
    raise RuntimeError("nothing was checked")


if __name__ == "__main__":
    print(json.dumps(check_commands(json.load(sys.stdin))))
