"""What a paper takes from a report: vector pictures, and tables in CSV and LaTeX."""

import csv
import re
import xml.etree.ElementTree as xml

import pytest

from lte_lightning.cli import main
from lte_lightning.report.publish import csv_of, latex_of
from lte_lightning.report.tables import Table


def test_pictures_and_tables_are_published(compared, tmp_path):
    main(["report", str(compared), "--out", str(tmp_path / "page"), "--publish", str(tmp_path / "paper")])
    files = {file.name for file in (tmp_path / "paper").iterdir()}
    pictures = {file.stem for file in (tmp_path / "page").glob("*.png")}
    assert {f"{name}.{form}" for name in pictures for form in ("svg", "pdf")} <= files
    assert xml.parse(tmp_path / "paper" / "quality-stsb.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (tmp_path / "paper" / "quality-stsb.pdf").read_bytes().startswith(b"%PDF-")
    with (tmp_path / "paper" / "settings-stsb.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 54 + 1
    text = (tmp_path / "paper" / "settings-stsb.tex").read_text()
    assert text.count(r" \\") == 54 + 1

    html = (tmp_path / "page" / "index.html").read_text()
    assert html.count("<main>") == html.count("</main>") == 1
    assert len(re.findall("<caption", html)) == len(re.findall("<table>", html))
    assert not re.search("<th>", html)  # each says whose head it is
    assert html.count('<th scope="row">') >= 54
    (alt,) = re.findall(r'alt="(Pearson correlation on STS-B \(3 layers\) against FFN sparsity[^"]*)"', html)
    assert re.search(r": LTE [\d.]+ at \d+\xa0% to [\d.]+ at \d+\xa0%; .*dense [\d.]+; floor [\d.]+", alt), alt


def test_a_table_in_latex_and_csv():
    table = Table(["", "loss (≤ 0.5 %)"], [["a_b & {c}", "1.0 ± 0.2"], ["x^2", 'say "-"']], "50 % of it")
    text = latex_of(table)
    assert r"\caption{50 \% of it}" in text
    assert r"\begin{tabular}{lr}" in text
    assert r" & loss ($\le$ 0.5 \%) \\" in text
    assert r"a\_b \& \{c\} & 1.0 $\pm$ 0.2 \\" in text
    assert r"x\textasciicircum{}2 & say " in text
    assert list(csv.reader(csv_of(table).splitlines())) == [table.heads, *table.rows]


def test_what_cannot_be_published_is_said(compared, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        main(["report", str(compared), "--out", str(tmp_path / "page"), "--publish", str(tmp_path / "file")])
    assert "choose another --publish" in capsys.readouterr().err
