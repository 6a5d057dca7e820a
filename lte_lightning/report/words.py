"""The sentences of a report and its page, from the templates beside this file."""

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lte_lightning.report.names import counted, in_words
from lte_lightning.report.tolerance import percent, tolerance_of, tolerated
from lte_lightning.sweep.table import mean_text

_TIED = re.compile(r" (?=[%±])|(?<=[±≥≤]) |(?<=\bat) (?=\d)")


def environment(markup: bool) -> Environment:
    """Returns the template environment; with ``markup``, values are escaped."""
    loader = PackageLoader(__package__, ".")
    made = Environment(
        loader=loader, autoescape=markup, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals |= {"counted": counted, "in_words": in_words}
    made.filters |= {
        "mean_text": mean_text,
        "percent": percent,
        "tolerance_of": tolerance_of,
        "tolerated": tolerated,
        "unbroken": unbroken,
    }
    return made


def unbroken(text: str) -> str:
    """Returns a text in which a number keeps its percent sign, its spread, its limit and its `at` on one line."""
    return _TIED.sub("\N{NO-BREAK SPACE}", text)


def sentences(block: str, *facts: Any) -> list[str]:
    """Returns the sentences that a block of ``words.jinja`` makes from the facts, as plain text."""
    paragraphs = getattr(environment(markup=False).get_template("words.jinja").module, block)(*facts).split("\n\n")
    lines = [[line.strip() for line in paragraph.splitlines() if line.strip()] for paragraph in paragraphs]
    return [" ".join(words) for words in lines if words]
