"""Draws the pictures of concepts.md: `python docs/pictures.py` writes experts.svg and stages.svg beside this file."""

from collections.abc import Iterable
from pathlib import Path

INK, QUIET, ON, PAPER = "#5a6270", "#c3c8d0", "#e5383b", "#ffffff"
SCORES = (0.12, 0.81, 0.34, 0.07, 0.93, 0.22, 0.66, 0.28)  # of eight experts for one token
THRESHOLD = 0.5
STAGES = (
    ("dense", "trains the model", "on the task", "mode dense: no routing"),
    (
        "router",
        "trains model and routers",
        "task, efficiency and separability",
        "mode soft: experts × scores",
    ),
    ("expert", "trains the model", "routers frozen", "mode hard: selected experts"),
)


def box(x: float, y: float, width: float, height: float, fill: str = "none", line: str = INK) -> str:
    """Returns a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{line}"/>'


def words(x: float, y: float, text: str, size: int = 13, colour: str = INK, anchor: str = "middle") -> str:
    """Returns a text at a place."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{text}</text>'


def line(*points: tuple[float, float], colour: str = INK, dashed: bool = False, arrow: bool = False) -> str:
    """Returns a line through points."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    more = ' stroke-dasharray="4 3"' * dashed + ' marker-end="url(#tip)"' * arrow
    return f'<polyline points="{path}" fill="none" stroke="{colour}"{more}/>'


def experts() -> Iterable[str]:
    """One token's way: the router scores every expert, those above the threshold run, their outputs are added."""
    yield words(60, 92, "input of the FFN", 12)
    yield line((60, 100), (60, 130), (110, 130), arrow=True)
    yield words(120, 22, "router: a score for each expert", anchor="start")
    yield words(120, 262, "experts: 32 neurons each", anchor="start")
    base, high = 140, 100
    for i, score in enumerate(SCORES):
        x, runs = 130 + 62 * i, score > THRESHOLD
        colour = ON if runs else QUIET
        yield box(x + 8, base - high * score, 28, high * score, colour, colour)
        yield words(x + 22, base - high * score - 5, f"{score:.2f}", 11, colour if runs else INK)
        yield box(x, 190, 44, 50, ON if runs else "none", ON if runs else QUIET)
        yield words(x + 22, 219, "runs" if runs else "off", 12, PAPER if runs else INK)
        if runs:
            yield line((x + 22, base + 4), (x + 22, 186), colour=ON, arrow=True)
    yield line((122, base - high * THRESHOLD), (624, base - high * THRESHOLD), dashed=True)
    yield words(630, base - high * THRESHOLD + 4, "threshold", 12, anchor="start")
    yield line((122, base), (624, base), colour=QUIET)
    yield words(660, 219, "sum of those", 12)
    yield words(660, 235, "that ran", 12)


def stages() -> Iterable[str]:
    """A fit from left to right, and how lambda grows in the router stage."""
    width, gap = 216, 26
    for i, (name, trains, how, mode) in enumerate(STAGES):
        x = 10 + i * (width + gap)
        yield box(x, 20, width, 96, line=ON if name == "router" else INK)
        yield words(x + width / 2, 42, f"stage {name}", 15, ON if name == "router" else INK)
        for row, text in enumerate((trains, how, mode)):
            yield words(x + width / 2, 64 + 18 * row, text, 11)
        if i:
            yield line((x - gap + 2, 68), (x - 6, 68), arrow=True)
    left = 10 + width + gap
    yield line((left, 190), (left + width, 190), colour=QUIET)
    yield line((left, 190), (left + width / 2, 190), (left + width, 140), colour=ON)
    yield words(left - 6, 168, "lambda", 12, anchor="end")
    yield words(left + width + 8, 144, "0.5", 12, anchor="start")
    yield words(left + width / 4, 206, "eta sorts experts", 11)
    yield words(left + 3 * width / 4, 206, "scores move apart", 11)


def picture(parts: Iterable[str], width: int, height: int, title: str) -> str:
    """Returns a picture of its parts."""
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f"<title>{title}</title>",
        f'<defs>{tip}<path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
    )
    return "\n".join((*head, *parts, "</svg>\n"))


def pictures() -> dict[str, str]:
    """Returns the files by name."""
    return {
        "experts.svg": picture(experts(), 710, 275, "A router scores the experts; those above the threshold run"),
        "stages.svg": picture(stages(), 720, 215, "The stages dense, router and expert; lambda grows in the second"),
    }


if __name__ == "__main__":
    for name, content in pictures().items():
        (Path(__file__).parent / name).write_text(content)
