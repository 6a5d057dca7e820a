"""Writes the tutorials as notebooks: `python docs/notebooks.py FOLDER` (`nox -s notebooks`).

The pages are the source. What is for a shell becomes a cell of bash, Python stays, all else is text. `RUN`, which a
reader replaces, is the newest run's folder.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "tutorials"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEWEST = {
    "shell": 'RUN=$(dirname "$(ls -t runs/*/*/config.yaml | head -1)")\n',
    "python": (
        "from pathlib import Path\n\n"
        'RUN = max(Path("runs").glob("*/*/config.yaml"), key=lambda file: file.stat().st_mtime).parent\n'
    ),
}


def notebook(page: str) -> dict[str, Any]:
    """Returns a page as a notebook (nbformat 4)."""
    cells, end = [], 0
    for found in BLOCK.finditer(page):
        if (language := found[1]) in CODE:
            cells += _cell("markdown", page[end : found.start()])
            cells += _cell("code", CODE[language](found[2]))
            end = found.end()
    cells += _cell("markdown", page[end:])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def _cell(kind: str, text: str) -> list[dict[str, Any]]:
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    text = text.strip("\n")
    return [{"cell_type": kind, "metadata": {}, "source": text, **code}] if text.strip() else []


def _shell(code: str) -> str:
    return "%%bash\n" + NEWEST["shell"] * ("RUN" in code) + re.sub(r"\bRUN\b", "$RUN", code)


def _python(code: str) -> str:
    return NEWEST["python"] * ("RUN" in code) + re.sub(r'"RUN/([^"]*)"', r'f"{RUN}/\1"', code)


CODE = {"": _shell, "python": _python}  # by the language of a block; others are read, not run


def main(folder: Path) -> None:
    """Writes all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in sorted(PAGES.glob("*.md")):
        text = json.dumps(notebook(page.read_text("utf-8")), indent=1, ensure_ascii=False)
        (folder / f"{page.stem}.ipynb").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
