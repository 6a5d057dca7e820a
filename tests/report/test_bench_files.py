"""Benchmarks of a report: what is drawn together, and which files are refused."""

import pytest

from lte_lightning.errors import UserError
from lte_lightning.report import bench, details, pictures
from lte_lightning.report.bench import read_bench
from lte_lightning.report.collect import collect
from lte_lightning.report.sections import detail_sections

HEADS = (
    "shape,scope,phase,dtype,tokens,sparsity,backend,threads,dense_ms,ms,ratio,router_ms,bound,share_of_bound,load\n"
)
GOOD = {
    **{"shape": "llama2-7b", "scope": "ffn", "phase": "decode", "dtype": "bf16", "tokens": "1", "sparsity": "0.5"},
    **{"backend": "cpu", "threads": "2", "dense_ms": "10", "ms": "5", "ratio": "2", "router_ms": "0.1", "bound": "3"},
    **{"share_of_bound": "0.7", "load": "0.5"},
}


def line(**changed):
    return ",".join((GOOD | changed).values()) + "\n"


def write(folder, *lines, name="out.csv", heads=HEADS):
    file = folder / name
    file.write_text(heads + "".join(lines))
    return file


def test_rows_are_numbers_and_words(tmp_path):
    (row,) = read_bench(write(tmp_path, line(), "\n"))
    assert row["file"] == str(tmp_path / "out.csv")
    assert (row["tokens"], row["sparsity"], row["bound"], row["threads"]) == (1, 0.5, 3, 2)
    assert (row["shape"], row["dtype"]) == ("llama2-7b", "bf16")


def test_older_files_lack_columns(tmp_path):
    heads = "shape,scope,phase,tokens,sparsity,backend,ms,dense_ms,ratio,bound,router_ms\n"
    (row,) = read_bench(write(tmp_path, "llama2-7b,ffn,decode,1,0.5,cpu,5,10,2,3,\n", heads=heads))
    assert row["router_ms"] == ""
    assert bench.title([row], False) == "llama2-7b, ffn, decode, 1\xa0token"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(sparsity="half"), "out.csv, line 2: sparsity is 'half'; it must be a finite number from 0 to 1"),
        (line(sparsity="50"), "line 2: sparsity is '50'"),
        (line() + line(ratio="nan"), "line 3: ratio is 'nan'; it must be a finite number above 0"),
        (line(bound="inf"), "line 2: bound is 'inf'"),
        (line(ms="-5"), "line 2: ms is '-5'"),
        (line(dense_ms="0"), "line 2: dense_ms is '0'"),
        (line(tokens="0"), "line 2: tokens is '0'; it must be a finite number of at least 1"),
        (line(threads="many"), "line 2: threads is 'many'"),
        (line(load="nan"), "line 2: load is 'nan'"),
        (line(ms=""), "line 2: ms is ''"),
        (line(backend=""), "line 2: backend is empty"),
        ("llama2-7b,ffn\n", r"line 2: 2 fields \(llama2-7b,ffn\), but 15 columns; is it cut off"),
        (line(load="1,2"), "line 2: 16 fields"),
        ("x" * 200_000 + "\n", "out.csv, after line 1: field larger than field limit"),
        ("", "out.csv has columns, but no rows"),
    ],
)
def test_a_row_that_cannot_be_is_refused(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_bench(write(tmp_path, text))


def test_what_is_no_benchmark_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"out.csv is not a CSV file of lte bench: it has no column backend, bound"):
        read_bench(write(tmp_path, "1,2\n", heads="a,b\n"))
    (tmp_path / "out.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read the benchmark .*out.csv: 'utf-8' codec"):
        read_bench(tmp_path / "out.csv")
    with pytest.raises(UserError, match=r"cannot read the benchmark .*nowhere.csv"):
        read_bench(tmp_path / "nowhere.csv")


def test_a_picture_has_rows_that_belong_together(tmp_path):
    """Of one file, type, number of threads and of tokens, in the order of numbers."""
    ratios = {"bf16": "3", "f32": "2"}
    rows = [
        line(tokens=tokens, dtype=dtype, threads=threads, sparsity=sparsity, bound=ratios[dtype])
        for tokens in ("10", "2")
        for dtype in ("bf16", "f32")
        for threads in ("16", "2")
        for sparsity in ("0.9", "0.5")
    ]
    files = [write(tmp_path, *rows, name=name) for name in ("b.csv", "a.csv")]
    found = bench.groups([row for file in files for row in read_bench(file)])
    assert len(found) == 2 * 2 * 2 * 2
    assert all(len(group) == 2 for group in found)
    assert [group[0]["file"] for group in found] == [str(files[0])] * 8 + [str(files[1])] * 8
    first = [(group[0]["dtype"], group[0]["threads"], group[0]["tokens"]) for group in found[:4]]
    assert first == [("bf16", 2, 2), ("bf16", 2, 10), ("bf16", 16, 2), ("bf16", 16, 10)]
    assert bench.title(found[0], True) == f"{files[0]}, llama2-7b, ffn, decode, bf16, 2\xa0tokens, 2\xa0threads"


def test_a_latency_picture(tmp_path, watch):
    rows = [line(sparsity=s, backend=b, ratio=r, bound=s) for s, b, r in (("0.9", "cpu", "4"), ("0.5", "cpu", "2"))]
    rows += [line(sparsity="0.5", backend="reference", ratio="1", bound="0.5")]
    (group,) = bench.groups(read_bench(write(tmp_path, *rows)))
    with watch() as figures:
        pictures.render(details.latency(group))
    lines = {one.get_label(): one.get_xydata().tolist() for one in figures[0].axes[0].lines}
    assert lines["cpu"] == [[50, 2], [90, 4]]
    assert lines["reference"] == [[50, 1]]
    assert lines["bound"] == [[50, 0.5], [90, 0.9]]


CURVE = """setting,sparsity,accuracy,gflops_per_token,tokens_per_second
dense,0.0,0.91,0.02,1000
trained,0.6,0.9,0.012,1500
0.8,0.8,0.89,0.008,2000
"""


def test_a_curve_is_quality_against_tokens_per_second(swept, tmp_path, watch):
    """What `lte curve` writes is read by the same option."""
    (tmp_path / "own-model.csv").write_text(CURVE)
    material = collect([swept], [tmp_path / "own-model.csv"])
    assert material.bench == []
    with watch() as figures:
        (section,) = [s for s in detail_sections(material) if "tokens per second" in s.title]
    (picture,) = section.pictures
    lines = {one.get_label(): one.get_xydata().tolist() for one in figures[-1].axes[0].lines}
    assert lines == {"sparse": [[1500, 0.9], [2000, 0.89]], "dense": [[1000, 0.91]]}
    assert picture.text == (
        "Accuracy of own-model. Fastest: 2000 tokens/s at 80 % sparsity, 2.00 times dense, with accuracy 0.89 in place "
        "of 0.91."
    )
    assert "sparse, 80\xa0%: 0.89 at 2000 tokens/s" in picture.alt
    assert len(section.folded[0].rows) == 3


def test_a_curve_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "curve.csv").write_text(CURVE.replace("2000", "fast"))
    with pytest.raises(UserError, match="line 4: tokens_per_second is 'fast'; it must be a finite number above 0"):
        read_bench(tmp_path / "curve.csv")
    (tmp_path / "curve.csv").write_text("setting,sparsity\n0.8,0.8\n")
    with pytest.raises(UserError, match="is not a CSV file of lte curve: it has no column gflops_per_token"):
        read_bench(tmp_path / "curve.csv")
