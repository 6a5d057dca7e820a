"""The page around the pictures: what comes first, what things are called, and what becomes of an earlier report."""

import json
import re
import shutil

import pytest

from lte_lightning.cli import main
from lte_lightning.report.collect import collect
from lte_lightning.report.sections import names_of_runs


def report(source, out, *words):
    main(["report", str(source), "--out", str(out), *map(str, words)])
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", (out / "index.html").read_text())


@pytest.fixture(scope="module")
def page(compared, tmp_path_factory):
    return report(compared, tmp_path_factory.mktemp("page"))


def test_what_was_found_comes_first(page):
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        *("What was found", "Quality against sparsity and cost: STS-B (3 layers)"),
        *("FLOPs per token at the same tolerated loss", "What was not run", "Details"),
    ]
    names = re.findall(r"\((\S+)\.png\)", page)
    assert names == ["quality-stsb", "flops-stsb", "span-stsb", "layers-stsb", "scores-stsb", "union-stsb"]
    assert page.index("flops-stsb") < page.index("<h2>FLOPs") < page.index("<h2>Details") < page.index("span-stsb")


def test_long_lists_are_folded(page):
    folds = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", page, re.DOTALL)
    assert [name for name, _ in folds] == [
        "Is it better? Paired differences of Pearson correlation on STS-B (3 layers), with 95 % intervals",
        *("All settings of STS-B (3 layers): 54 rows", "The commands of 165 runs, by method and setting"),
    ]
    assert folds[1][1].count("<tr>") == 54 + 1
    assert folds[2][1].count("<pre>") == 165


def test_commands_are_named_by_method_and_setting(compared, swept, page):
    assert '<p class="quiet">stsb, narrower dense, target_sparsity 0.7, seed 2</p>' in page
    assert '<p class="quiet">stsb, dense start, seed 0</p>' in page
    assert re.search(r">stsb, LTE, target_sparsity 0.5, seed 1</p>\s*<pre>lightning fit --run.name", page)
    names = names_of_runs(collect([swept]).runs)
    assert {"sst2, floor, seed 1", "sst2, TEAL, eta 3, efficiency_weight 0.1, seed 0"} <= set(names)


def test_runs_that_are_called_alike_are_named_by_their_folders(swept, tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(swept / "start0", tmp_path / folder / f"run-{folder}")
    runs = collect([tmp_path]).runs
    assert sorted(names_of_runs(runs)) == [f"sst2, dense start, seed 0 (run-{name})" for name in ("a", "b")]


def test_versions_of_the_runs_and_of_the_page_are_told_apart(swept, tmp_path):
    folder = shutil.copytree(swept, tmp_path / "trial")
    file = folder / "0-0-0" / "results.json"
    found = json.loads(file.read_text())
    found["versions"] |= {"torch": "2.99", "cpu": "Abacus 9000", "commit": "0123abc"}
    file.write_text(json.dumps(found))
    page = report(folder, tmp_path / "out")
    runs, here = page.index("Versions and machine of the runs"), page.index("Versions and machine that wrote this page")
    for words in ("2.99", "2.13", "Abacus 9000", "0123abc"):
        assert runs < page.index(words) < here
    assert page.index("matplotlib") > here


def test_pictures_of_an_earlier_report_go_and_nothing_else(compared, swept, bench_csv, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "quality-of-life.png").write_bytes(b"\x89PNG of somebody else")
    (out / "notes.txt").write_text("mine")
    report(compared, out, "--bench", bench_csv)
    # one that somebody keeps under a name of their own
    shutil.copy(out / "quality-stsb.png", out / "figure-2.png")
    before = {file.name for file in out.iterdir()}
    assert {"latency-1.png", "union-stsb.png", "quality-stsb.png"} < before
    report(swept, out)
    assert {file.name for file in out.iterdir()} == {
        *("index.html", "quality-sst2.png", "flops-sst2.png", "span-sst2.png", "layers-sst2.png", "scores-sst2.png"),
        *("quality-of-life.png", "notes.txt", "figure-2.png"),
    }


def test_what_cannot_be_written_leaves_the_earlier_report_whole(compared, swept, tmp_path, capsys):
    out = tmp_path / "out"
    report(compared, out)
    (out / "index.html").rename(tmp_path / "page")
    (out / "index.html").mkdir()
    with pytest.raises(SystemExit):
        report(swept, out)
    assert "cannot write the report to" in capsys.readouterr().err
    assert {"quality-stsb.png", "union-stsb.png"} < {file.name for file in out.iterdir()}
    assert not list(out.glob(".report-*"))


def test_numbers_stay_on_one_line_and_a_heading_is_not_repeated_above_its_table(page):
    shown = page[page.index("<main>") : page.index("How to reproduce it")]
    assert "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}" in shown
    visible = re.sub(r'alt="[^"]*"|<summary>.*?</summary>', "", shown)
    assert not re.search(r"\d %| ±|± |\bat \d", visible)
    for heading in re.findall(r"<h3>(.*?)</h3>", page):
        assert f"<caption>{heading}</caption>" not in page
