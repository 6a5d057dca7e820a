"""The sentences of a report and its page, from the templates beside this file."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lte_lightning.report.names import counted, in_words
from lte_lightning.report.tolerance import percent, tolerated
from lte_lightning.sweep.table import mean_text


def environment(markup: bool) -> Environment:
    """Returns the template environment; with ``markup``, values are escaped."""
    loader = PackageLoader(__package__, ".")
    made = Environment(
        loader=loader, autoescape=markup, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals |= {"counted": counted, "in_words": in_words}
    made.filters |= {"mean_text": mean_text, "percent": percent, "tolerated": tolerated}
    return made


def sentences(block: str, *facts: Any) -> list[str]:
    """Returns the sentences that a block of ``words.jinja`` makes from the facts, as plain text."""
    paragraphs = getattr(environment(markup=False).get_template("words.jinja").module, block)(*facts).split("\n\n")
    lines = [[line.strip() for line in paragraph.splitlines() if line.strip()] for paragraph in paragraphs]
    return [" ".join(words) for words in lines if words]
