"""What a report says of figures that are known, and what it refuses."""

import base64
import json
import re
import shutil
import struct
from html.parser import HTMLParser

import pytest

from lte_lightning.cli import main
from lte_lightning.errors import UserError
from lte_lightning.report import tables
from lte_lightning.report.collect import collect
from lte_lightning.report.page import write_report


@pytest.fixture(scope="module")
def material(swept):
    return collect([swept])


@pytest.fixture(scope="module")
def page(swept, bench_csv, tmp_path_factory):
    """The folder of a report, written by the command."""
    out = tmp_path_factory.mktemp("out") / "report"
    main(["report", str(swept), "--out", str(out), "--bench", str(bench_csv)])
    return out


class Reader(HTMLParser):
    """Collects what a page holds, and that its elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.found, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed((page / "index.html").read_text())
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_needs_nothing_from_outside(page):
    reader = read(page)
    uris = [value for _, attrs in reader.found for key, value in attrs.items() if key in ("src", "srcset", "href")]
    assert all(uri.startswith("data:") for uri in uris)
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", (page / "index.html").read_text())
    assert not re.search(r"https?://|@import|url\(|<script", text)
    images = [attrs for tag, attrs in reader.found if tag == "img"]
    sources = [attrs for tag, attrs in reader.found if tag == "source"]
    assert len(images) == len(sources) == len(list(page.glob("*.png"))) == 7
    assert all(attrs["alt"] for attrs in images)
    for attrs in [*images, *sources]:
        png = base64.b64decode((attrs.get("src") or attrs["srcset"]).removeprefix("data:image/png;base64,"))
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">II", png[16:24])[0] == 840
    assert len({attrs["src"] for attrs in images} | {attrs["srcset"] for attrs in sources}) == 14
    assert {file.name for file in page.iterdir()} == {
        *("index.html", "quality-sst2.png", "flops-sst2.png", "span-sst2.png", "layers-sst2.png", "scores-sst2.png"),
        *("latency-0.png", "latency-1.png"),
    }


def test_what_the_sweep_says_is_text_and_no_markup(page):
    text = (page / "index.html").read_text()
    assert "<b>KLA" not in text
    assert "<methods>" not in text
    assert "<i>" not in text
    said = " ".join(read(page).text)
    assert "<b>KLA & Co.</b>" in said
    assert "All <methods> at once." in said
    assert "--run.name 0-0-0 '<i>&'" in said


def test_the_summary(material):
    lines = tables.summary(material, "sst2", None)
    assert lines[0] == (
        "The reference (dense, not trained on) reaches accuracy 0.9100 ± 0.0100; with every FFN expert off and "
        "adapted alike, the floor, 0.6100 ± 0.0100."
    )
    # LTE loses 0.04 s^4: 0.0096 at 0.7, 0.0164 at 0.8; the others lose more than 0.01 at 0.5
    kept = 100 * (0.3 - 0.04 * 0.7**4) / 0.3
    assert lines[1] == (
        "LTE loses at most 0.01 up to 70 % FFN sparsity (accuracy 0.9004 ± 0.0100) and keeps "
        f"{kept:.0f} ± 0 % of the span from floor to dense."
    )
    assert lines[2] == "These methods lose more than 0.01 at every setting: TEAL; <b>KLA & Co.</b> (oracle)."


def test_the_flops_table_is_the_papers(material):
    table = tables.flops(material, 0.05)
    assert table.heads == ["", "SST-2 (3 layers) (≤ 0.05 lost)"]
    # 4 + 8 (1 - s): LTE loses 0.026 at 0.9, TEAL 0.0375 at 0.5, KLA 0.049 at 0.7
    assert table.rows == [
        ["dense", "12"],
        ["LTE", "4.8 (2.50x, 90 % off)"],
        ["TEAL (skips weights, not neurons)", "8 (1.50x, 50 % off)"],
        ["<b>KLA & Co.</b> (oracle)", "6.4 (1.88x, 70 % off)"],
    ]
    assert tables.flops(material, 0.02).rows[2] == ["TEAL (skips weights, not neurons)", "none within"]


def test_the_best_figure_at_a_sparsity(material):
    table = tables.levels(material, "sst2")
    assert table.heads[1:] == ["≥ 48 % off", "≥ 68 % off", "≥ 78 % off", "≥ 88 % off"]
    assert table.rows[0] == ["LTE"] + [
        f"{0.91 - 0.04 * s**4:.4f} ± 0.0100 at {100 * s:.0f} %" for s in (0.5, 0.7, 0.8, 0.9)
    ]


def test_differences_are_paired_by_seed(material, make_points, figures, tmp_path):
    """The seeds of the swept points differ by as much in every method, so that their differences have no spread."""
    rows = tables.differences(material, "sst2").rows
    assert len(rows) == 4 * 2  # LTE's settings and the other methods
    assert rows[4][1].startswith("TEAL")
    assert rows[4][3] == "+0.1372 (+0.1372 to +0.1372, seeds): better"
    # 0.03 and 0.01 above it: a mean of 0.02, and Student's interval of two seeds is 12.71 standard errors wide
    points = [
        {
            "name": f"{name}{seed}",
            "variant": name,
            "selector": selector,
            "seed": seed,
            "results": figures(hard, 0.8, seed),
        }
        for name, selector, values in (("CATS", "cats", (0.80, 0.80)), ("LTE", "router", (0.83, 0.81)))
        for seed, hard in enumerate(values)
    ]
    table = tables.differences(collect([make_points(tmp_path / "pairs", points)]), "sst2")
    assert table.rows == [["LTE (80.0 %)", "CATS (80.0 %)", "2", "+0.0200 (-0.1071 to +0.1471, seeds): not told apart"]]
    alone = collect([make_points(tmp_path / "alone", points[:2])])
    assert tables.differences(alone, "sst2") is None


def test_a_column_has_what_it_prints(make_points, figures, tmp_path):
    """47.9 and 87.9 % are printed as 48 and 88 %, so the columns of 48 and 88 % have them."""
    rows = [
        {"name": str(s), "seed": 0, "variant": "CATS", "selector": "cats", "results": figures(1 - s / 2, s)}
        for s in (0.479, 0.879)
    ]
    table = tables.levels(collect([make_points(tmp_path / "levels", rows)]), "sst2")
    assert table.rows == [["CATS", "0.7605 at 48 %", *["0.5605 at 88 %"] * 3]]


def test_what_was_not_run_is_said(material, swept, bench_csv):
    lines = tables.not_run(material)
    assert lines[:2] == ["Not done: LTE-never (not started).", "Not done: LTE: seed 0 (failed: error: no)."]
    (absent,) = (line for line in lines if line.startswith("No results of"))
    assert "Wanda" in absent
    assert "TEAL" not in absent
    assert "KLA" not in absent
    assert any("No latency was measured" in line for line in lines)
    assert not any("No latency" in line for line in tables.not_run(collect([swept], [bench_csv])))
    assert not any("The spread is unknown" in line for line in lines)


def test_fits_on_a_part_of_the_rows_are_said(swept):
    material = collect([swept])
    assert not any("All rows" in line for line in tables.not_run(material))
    fits = len(material.runs)
    for run, rows in zip(material.runs, (100, 100, None), strict=False):
        run.options |= {"data.train_rows": rows, "trainer.limit_val_batches": 1.0}
    assert f"Not all rows were used: data.train_rows is 100 in 2 of {fits} fits." in tables.not_run(material)
    assert not any("limit_val_batches" in line for line in tables.not_run(material))
    material.runs[0].options["trainer.limit_val_batches"] = 1  # one batch
    assert f"Not all rows were used: trainer.limit_val_batches is 1 in 1 of {fits} fits." in tables.not_run(material)


def test_the_page_has_the_sweep_s_commands_its_model_and_its_data(make_points, figures, tmp_path):
    typed = [{"command": "lte sweep a.yaml --workers 2", "folder": "/a/folder", "began": "2026-01-01 00:00:00"}]
    row = {"name": "LTE-a", "seed": 0, "variant": "LTE", "pretrained": "some/model", "results": figures(0.9, 0.5)}
    folder = make_points(tmp_path / "trial", [row], commands=typed)
    said = " ".join(" ".join(read(write_report(collect([folder]), tmp_path / "page", "Trial").parent).text).split())
    assert "In /a/folder lte sweep a.yaml --workers 2" in said
    assert "Model: some/model. Data: x. Points are means of accuracy" in said


def test_a_reference_that_was_not_trained_on_is_said_to_be_surpassed(make_points, figures, tmp_path):
    rows = [
        {"name": "start", "seed": 0, "role": "start", "results": figures(None, None, seconds_per_stage={"dense": 1.0})},
        {"name": "LTE-a", "seed": 0, "variant": "LTE", "results": figures(0.95, 0.5)},
    ]
    assert (
        "Some settings are better than the reference"
        in tables.summary(collect([make_points(tmp_path / "trial", rows)]), "sst2", None)[1]
    )


def test_perplexity_is_better_when_lower(make_sweep, tmp_path):
    folder = make_sweep(tmp_path / "lm", "wikitext", "perplexity")
    for file in folder.glob("*/results.json"):
        found = json.loads(file.read_text())
        for key in ("dense", "hard", "floor"):
            if found.get(key) is not None:
                found[key] = 10 + 10 * (0.9 - found[key])
        file.write_text(json.dumps(found))
    material = collect([folder])
    assert tables.tolerance_of("perplexity", None) == 0.5
    # LTE gains 0.4 s^4, TEAL 3 s^3: 0.375 at 0.5
    assert [row[1].split("(")[1] for row in tables.flops(material, None).rows[1:3]] == [
        "2.50x, 90 % off)",
        "1.50x, 50 % off)",
    ]
    lte = material.settings()[0]
    assert lte.mean("span_kept") == pytest.approx((3 - 0.4 * 0.5**4) / 3)


def test_runs_without_a_sweep_are_told_apart_by_their_configuration(swept, tmp_path):
    for name in ("0-0-0", "0-0-1", "0-3-0", "floor0", "start0"):
        shutil.copytree(swept / name, tmp_path / "runs" / name)
    material = collect([tmp_path / "runs"])
    assert [run.role for run in sorted(material.runs, key=lambda run: run.folder.name)] == ["point"] * 3 + [
        "floor",
        "start",
    ]
    settings = material.settings()
    assert [(s.method, len(s.runs)) for s in settings] == [("LTE", 2), ("LTE", 1)]
    assert [s.parameters for s in settings] == [{"model.efficiency_weight": e} for e in (0.5, 0.1)]
    assert material.runs[0].command == f"lightning fit --config {material.runs[0].folder}/config.yaml"
    alone = collect([tmp_path / "runs" / "0-0-0", tmp_path / "runs" / "0-3-0", tmp_path / "runs"])
    assert len(alone.runs) == 5  # none twice


def test_the_dense_figure_is_the_best_of_a_seed_s_starts(swept, tmp_path):
    """What a method with an activation of its own starts from must not lower what all are read against."""
    folder = shutil.copytree(swept, tmp_path / "trial")
    for name, dense in (("0-0-0", 0.5), ("1-0-0", 0.95)):
        file = folder / name / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dense": dense}))
    material = collect([folder])
    assert sorted(material.reference("sst2", "dense")) == pytest.approx([0.91, 0.92, 0.95])
    assert sorted(material.reference("sst2", "floor")) == pytest.approx([0.6, 0.61, 0.62])


@pytest.mark.parametrize(
    ("variant", "method"), [("sst2", "LTE"), ("sst2: MoEfication", "MoEfication"), ("sst2x", "sst2x"), (None, "LTE")]
)
def test_a_variant_named_like_its_task_is_called_by_its_method(variant, method, swept, tmp_path):
    folder = shutil.copytree(swept, tmp_path / "trial")
    for file in (folder / "points").glob("0-*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"variant": variant}))
    methods = [setting.method for setting in collect([folder]).settings()]
    assert set(methods) == {method, "TEAL", "<b>KLA & Co.</b>"}


def test_measured_latency_is_a_column(swept, tmp_path):
    material = collect([swept])
    assert "measured" not in tables.everything(material, "sst2").heads
    next(run for run in material.runs if run.role == "point").results.speedup = 1.5
    table = tables.everything(material, "sst2")
    assert table.heads[-1] == "measured"
    assert [row[-1] for row in table.rows].count("1.50x") == 1
    assert not any("No latency" in line for line in tables.not_run(material))


def test_union_sparsity_is_drawn_where_it_was_measured(swept, tmp_path):
    folder = shutil.copytree(swept, tmp_path / "trial")
    for name in ("0-0-0", "0-3-0"):
        file = folder / name / "results.json"
        union = {"union_sparsity": {"1": 0.5, "2": 0.4, "16": 0.2}}
        file.write_text(json.dumps(json.loads(file.read_text()) | union))
    main(["report", str(folder), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "union-sst2.png").exists()
    assert "Union sparsity against batch size was not measured" not in (tmp_path / "out" / "index.html").read_text()


def test_bad_input(swept, tmp_path):
    def refused(message, *sources):
        with pytest.raises(UserError, match=message):
            collect(sources)

    refused("there is no folder nowhere", "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty holds no finished run", tmp_path / "empty")
    folder = shutil.copytree(swept, tmp_path / "newer")
    run = folder / "0-0-0"
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"layout": 7}))
    refused("run folder .*0-0-0 has layout 7, this lte-lightning reads 1", folder)
    (run / "run.json").write_text("{")
    refused("run.json is damaged", folder)
    (run / "run.json").write_text(json.dumps(about))
    (run / "results.json").write_text("{}")
    refused("results.json is damaged, or was written by another version", folder)
    (folder / "sweep.json").write_text("{}")
    refused("sweep.json has layout None, this lte-lightning reads 1", folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--tolerance", "-1"], "tolerance is -1.0"), ([], "cannot write the report to .*choose another --out")],
)
def test_the_command_refuses(words, message, swept, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(swept), "--out", str(tmp_path / "file" / "report"), *words])
    assert stop.value.code == 1
    assert re.search(message, capsys.readouterr().err)
