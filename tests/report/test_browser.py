"""A report in headless Chromium (nox -s browser): what a reader would see, measured by the page itself."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from lte_lightning.cli import main

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Added to a copy of the page: a data URI is decoded before `load`
MEASURE = """<script>addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  const found = {
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    letters: parseFloat(getComputedStyle(document.body).fontSize),
    ink: getComputedStyle(document.body).color,
    paper: getComputedStyle(document.body).backgroundColor,
    folds: document.querySelectorAll("details").length,
    folded: document.querySelectorAll("details:not([open])").length,
    details: box([...document.querySelectorAll("h2")].find(element => element.textContent == "Details")).top,
    sticking_out: [...document.querySelectorAll("h1, h2, h3, p, li, img, pre, .wide")]
      .filter(element => box(element).right > innerWidth + 1).map(element => element.outerHTML.slice(0, 80)),
    cut: [...document.querySelectorAll(".wide:not(details *)")]
      .filter(wide => wide.scrollWidth > wide.clientWidth + 1).length,
    captions: [...document.querySelectorAll("caption:not(.hidden)")].map(element => box(element).right),
    images: [...document.images].map(image => ({
      complete: image.complete, pixels: image.naturalWidth, source: image.currentSrc.length,
      is_light: image.currentSrc === image.src, width: box(image).width, height: box(image).height, top: box(image).top,
    })),
  };
  const out = parent.document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify(found);
  parent.document.body.append(out);
});</script></body>"""


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        # nox -s browser is there for these tests and nothing else
        refuse = pytest.fail if os.environ.get("LTE_BROWSER") == "required" else pytest.skip
        refuse(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    return path


@pytest.fixture(scope="module")
def drawn(compared, bench_csv, tmp_path_factory, watch):
    """A report of fifteen methods with three seeds, and its figures: each picture's light one, then its dark one."""
    out = tmp_path_factory.mktemp("out")
    with watch() as figures:
        main(["report", str(compared), "--out", str(out), "--bench", str(bench_csv)])
    return out / "index.html", figures


@pytest.fixture(scope="module")
def page(drawn):
    return drawn[0]


@dataclass
class Seen:
    measured: dict[str, Any]
    console: list[str]


@pytest.fixture(scope="module")
def look(chromium, tmp_path_factory):
    """`look(html, width, dark)` opens a page from disk."""

    def run(html: str, width: int = 1000, dark: bool = False) -> Seen:
        folder = tmp_path_factory.mktemp("seen")
        # In a frame, for no window of Chromium is as narrow as a phone
        inside = escape(html.replace("</body>", MEASURE))
        frame = f'<body><iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{inside}"></iframe></body>'
        (folder / "index.html").write_text(frame)
        words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        words += [f"--user-data-dir={folder / 'profile'}", "--window-size=1300,900"]
        words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        shown = subprocess.run(
            [*words, "--dump-dom", (folder / "index.html").as_uri()], capture_output=True, text=True, timeout=100
        )
        found = re.search(r'<pre id="measured">(.*?)</pre>', shown.stdout, re.DOTALL)
        assert found, shown.stderr
        console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
        return Seen(json.loads(unescape(found[1])), console)

    return run


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_every_picture_is_seen_and_nothing_sticks_out(width, dark, drawn, look, letters):
    page, figures = drawn
    seen = look(page.read_text(), width, dark)
    measured = seen.measured
    assert seen.console == []
    assert measured["width"] == width
    assert measured["content"] <= width
    assert measured["sticking_out"] == []
    assert len(measured["images"]) == len(figures[::2]) == len(list(Path(page).parent.glob("*.png"))) > 7
    for image, figure in zip(measured["images"], figures[::2], strict=True):
        assert image["complete"]
        assert image["pixels"] == 840
        assert image["height"] / image["width"] == pytest.approx(
            figure.get_figheight() / figure.get_figwidth(), rel=0.01
        )
        assert letters(figure, image["width"]) >= 11
        assert image["height"] > 100
        assert 300 < image["width"] <= width
        assert image["is_light"] != dark
    ink, paper = (sum(map(int, re.findall(r"\d+", measured[key])[:3])) for key in ("ink", "paper"))
    assert (ink > paper) == dark
    assert abs(ink - paper) > 500
    assert measured["letters"] >= 16
    # what was found, the main pictures and their table come first, long lists are folded
    assert measured["folded"] == measured["folds"] > 2
    # a phone scrolls wide tables to the side, below captions that it shows whole; a desktop shows their every column
    assert max(measured["captions"]) <= width
    assert (measured["cut"] == 0) == (width == 1200)
    main_pictures = [image["top"] for image in measured["images"][:2]]
    assert max(main_pictures) < measured["details"]


def test_the_measurement_finds_what_is_wrong(page, look):
    html = page.read_text()
    wide = html.replace("<h2>", '<p style="width: 900px">wide</p><h2>', 1)
    measured = look(wide, 390).measured
    assert measured["content"] > 390
    assert len(measured["sticking_out"]) == 1
    broken = re.sub(r"(<img src=\"data:image/png;base64,)[^\"]+", r"\1AAAA", html, count=1)
    assert [image["pixels"] for image in look(broken).measured["images"]].count(0) == 1
    assert len(look(html.replace("<h2>", "<script>nothing()</script><h2>", 1)).console) == 1
