"""One process of several, as torchrun would start it: the fixture `processes` runs this file with `given`."""

import os
import sys
from typing import Any

if __name__ == "__main__":
    given: dict[str, Any] = globals()["given"]
    os.environ.update(given["env"])
    os.chdir(given["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(f"{name}-{given['env']['LOCAL_RANK']}.txt", flags), number)
    sys.argv = ["lightning", *given["words"]]
    from lte_lightning.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
