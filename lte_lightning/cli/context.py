"""``lte context``: retrieval from long contexts by a sparse language model, beside its dense function."""

from pathlib import Path
from typing import TYPE_CHECKING

from lte_lightning.errors import UserError
from lte_lightning.options import call

if TYPE_CHECKING:
    from lte_lightning.bench.context import Score


def main(args: list[str]) -> None:
    """Runs the command.

    Raises:
        UserError: If an argument is wrong; no weights are loaded then.
    """
    call(context, "lte context", args, positional="folder")


def context(
    folder: str,
    tokens: str = "128,256,512",
    sparsity: str | None = None,
    tasks: str = "copy,retrieve,count",
    rows: int = 32,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    csv: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Measures copying, retrieval and counting in long synthetic contexts, sparse beside dense.

    lte context RUN --tokens 128,512,1024 --sparsity 0.5,0.8

    A router decides per token, so perplexity on ordinary text does not show whether a sparse model still uses distant
    tokens. Rows are random words. copy asks for the words of a second copy, retrieve for the values of some keys, count
    for the commonest of four words (one in four by chance). A score is the share of answers that the model ranks first,
    with its standard error over rows. Every setting gets the same rows.

    Args:
        folder: A saved language model or a run's folder, plain or sparse.
        tokens: Lengths of the rows, with commas between.
        sparsity: FFN sparsities of a model calibrated by lte calibrate, with commas between. By default the saved one.
        tasks: copy, retrieve, count, or some of them with commas between.
        rows: Rows of each task and length.
        batch_size: Rows at a time.
        seed: Seed of the rows.
        device: cpu, cuda or cuda:1; auto takes a CUDA device where there is one.
        csv: Where to write the scores.
        picture: Where to draw them, .png, .svg or .pdf.

    Raises:
        UserError: If an option has an invalid value, or the folder holds no decoder.
    """
    from lte_lightning.bench.context import SHORTEST, TASKS, Words, compare
    from lte_lightning.bench.machine import find_device
    from lte_lightning.bench.option_values import check_files
    from lte_lightning.bench.output import write_table
    from lte_lightning.cli.calibrate import read_sparsities
    from lte_lightning.cli.write_text import find_source
    from lte_lightning.data.text import load_tokenizer

    for option, value in (("--rows", rows), ("--batch-size", batch_size)):
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1")
    lengths = _lengths(tokens, SHORTEST)
    names = list(dict.fromkeys(tasks.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"--tasks has {unknown[0]!r}; there are {', '.join(TASKS)}")
    settings = None if sparsity is None else read_sparsities(sparsity)
    check_files(csv, picture)
    where, source = find_device(device), find_source(folder)
    if source.config.is_encoder_decoder:
        raise UserError(f"{folder} is an encoder-decoder; name a decoder, whose context is its own text")
    if settings and source.mode != "hard":
        kind = "a plain model" if source.mode is None else f"saved in mode {source.mode}"
        raise UserError(f"--sparsity is for models that skip experts, and {folder} is {kind}; leave it out")
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and lengths[-1] > limit:
        raise UserError(f"--tokens has {lengths[-1]}, and {source.name} takes {limit} (its max_position_embeddings)")
    words = Words(load_tokenizer(source.name, generates=True))
    model = source.load("auto", "auto", where)
    scores = compare(model, words, names, lengths, settings, rows, batch_size, seed, source.mode == "hard")
    _show(scores)
    if csv:
        write_table(scores, csv)
    if picture:
        from lte_lightning.bench.picture import draw_context

        draw_context(scores, picture)


def _lengths(text: str, shortest: int) -> list[int]:
    try:
        lengths = sorted({int(word) for word in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < shortest:
        raise UserError(f"--tokens is {text}; give lengths of at least {shortest}, with commas between: 128,512")
    return lengths


def _show(scores: "list[Score]") -> None:
    """Prints a row for each task and length, and a column for each setting."""
    from rich.console import Console
    from rich.table import Table

    from lte_lightning.bench.context import CHANCE

    settings = list(dict.fromkeys(score.setting for score in scores))
    table = Table(title=f"% ranked first (standard error), {scores[0].rows} rows")
    table.add_column("task")
    for name in ("tokens", *settings):
        table.add_column(name, justify="right")
    for task, length in dict.fromkeys((score.task, score.tokens) for score in scores):
        cells = [
            f"{100 * score.accuracy:.1f} ({100 * score.error:.1f})"
            for score in scores
            if (score.task, score.tokens) == (task, length)
        ]
        chance = f" (chance {CHANCE[task]:.0%})" if task in CHANCE else ""
        table.add_row(task + chance, str(length), *cells)
    console = Console()
    console.print(table)
    for setting in settings:
        sparsities = [score.sparsity for score in scores if score.setting == setting]
        if any(sparsities):
            console.print(
                f"{setting}: FFN sparsity {100 * min(sparsities):.1f} to {100 * max(sparsities):.1f} % on these rows"
            )
