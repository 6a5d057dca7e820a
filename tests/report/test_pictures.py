"""What the pictures show, read from the figures themselves."""

import json
import shutil

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lte_lightning.cli import main
from lte_lightning.report import details, pictures, sections
from lte_lightning.report.collect import collect
from lte_lightning.report.style import DARK, KNOWN, LIGHT, STRONG, styles

PHONE = 358  # pixels that a page 390 wide leaves a picture


@pytest.fixture(scope="module")
def material(compared):
    return collect([compared])


def draw(how) -> Figure:
    with matplotlib.rc_context(pictures._style(LIGHT)):
        figure = Figure(figsize=(pictures.WIDTH, pictures.HEIGHT), layout="constrained")
        how(figure)
        figure.draw_without_rendering()
        return figure


def labels(figure):
    return [text.get_text().replace("\n", " ").replace("\xa0", " ") for text in figure.legends[0].get_texts()]


def change(folder, changed, **facts):
    """Changes the results of those runs of a sweep whose name has a word."""
    for run in folder.iterdir():
        if (run / "run.json").exists() and changed in json.loads((run / "run.json").read_text())["name"]:
            file = run / "results.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def contrast(one, other):
    def light(colour):
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted([light(one), light(other)])
    return (high + 0.05) / (low + 0.05)


def test_methods_come_as_the_sweep_has_them_and_lte_first(material, compared):
    planned = [name.split("-0.")[0] for name in json.loads((compared / "sweep.json").read_text())["planned"]]
    planned = list(dict.fromkeys(name for name in planned if not name.startswith(("start", "dense"))))
    assert planned[8] == "LTE"
    looks = styles(material)
    assert list(looks) == ["LTE", *(name for name in planned if name != "LTE")]


def test_every_method_has_a_look_of_its_own(material):
    looks = styles(material)
    assert len(looks) == 14  # dense, trained on, is what all are read against
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(looks)
    assert [name for name, look in looks.items() if look.colour == STRONG.colour] == ["LTE"]
    assert looks["LTE"].width > max(look.width for name, look in looks.items() if name != "LTE")
    assert {name for name, look in looks.items() if look.line == "--"} == {
        *("KLA (oracle)", "MoEfication, ground truth (oracle)")
    }
    for look in [STRONG, *KNOWN.values()]:
        for theme in (LIGHT, DARK):
            assert contrast(theme["ink"] if look.colour == "ink" else look.colour, theme["paper"]) > 3


def test_a_method_looks_the_same_in_every_report(material, compared):
    fewer = collect([compared])
    fewer.runs = [run for run in fewer.runs if run.method in ("TEAL", "LTE", "Deja Vu")]
    assert styles(fewer) == {name: styles(material)[name] for name in ("LTE", "Deja Vu", "TEAL")}


def test_variants_of_lte_are_told_apart(compared):
    material = collect([compared])
    for run in material.runs:
        run.lte = {"selector": "router"}
    looks = styles(material)
    assert len({(look.colour, look.marker, look.line) for look in looks.values()}) == len(looks) > 13
    assert [name for name, look in looks.items() if look.colour == STRONG.colour] == ["LTE"]


@pytest.mark.parametrize("by_flops", [False, True])
def test_quality_of_fifteen_methods(by_flops, material):
    figure = draw(
        pictures.quality(material, "stsb", styles(material), across=pictures.FLOPS if by_flops else pictures.SPARSITY)
    )
    (axes,) = figure.axes
    assert labels(figure) == list(styles(material))
    line = next(line for line in axes.lines if line.get_color() == STRONG.colour)
    sparsities = np.array([0.5, 0.7, 0.8, 0.9])
    # seeds lose 0.03 s² + seed 0.03 / 50 of 0.9 + seed / 100
    expected = 0.9 + 0.01 - 0.03 * sparsities**2 - 0.03 / 50
    if by_flops:
        np.testing.assert_allclose(line.get_xdata(), 100 * (4 + 8 * (1 - sparsities[::-1])) / 12, rtol=1e-6)
        np.testing.assert_allclose(line.get_ydata(), expected[::-1])
    else:
        np.testing.assert_allclose(line.get_xdata(), 100 * sparsities)
        np.testing.assert_allclose(line.get_ydata(), expected)
    levels = {line.get_linestyle(): line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]}
    assert levels == pytest.approx({"--": 0.91, ":": 0.61})  # dense and the floor
    # 13 methods at 4 sparsities and one at a single one have a range
    assert len(axes.collections) == 13 * 4 + 1
    # the legend lies below, within the figure
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 < axes.get_tightbbox().y0 + 1
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= 0
    assert axes.bbox.height > 0.55 * pictures.HEIGHT * figure.dpi


@pytest.mark.parametrize(
    ("metric", "values", "least"), [("accuracy", (0.9, 0.9001), 0.05), ("perplexity", (12.0, 12.1), 1.2)]
)
def test_what_hardly_differs_is_not_drawn_far_apart(metric, values, least, make_points, figures, tmp_path):
    rows = [
        {"name": str(i), "seed": 0, "variant": "LTE", "parameters": {"rate": i}}
        | {"results": figures(value, 0.5 + i / 100, dense=values[0]) | {"metric": metric}}
        for i, value in enumerate(values)
    ]
    material = collect([make_points(tmp_path / "near", rows)])
    (axes,) = draw(pictures.quality(material, "sst2", styles(material))).axes
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(least)
    assert low < min(values) < max(values) < high
    assert np.ptp(axes.get_xlim()) == pytest.approx(20)
    assert axes.get_title().startswith("SST-2")
    assert axes.get_ylabel() == metric


def test_quality_against_tokens_per_second(make_points, figures, tmp_path):
    """Where fits have measured it, and counted the tokens of a call."""
    rows = [
        {"name": str(s), "seed": 0, "variant": "LTE", "parameters": {"rate": s}}
        | {"results": figures(0.9, s, latency_ms=10 * (1 - s), dense_latency_ms=10.0, latency_of={"tokens": 32.0})}
        for s in (0.5, 0.8)
    ]
    material = collect([make_points(tmp_path / "timed", rows)])
    (axes,) = draw(pictures.quality(material, "sst2", styles(material), across=pictures.SPEED)).axes
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [6400, 16000])
    assert axes.get_xlim()[0] == 0
    (section, _) = sections.main_sections(material, None)
    assert [picture.name for picture in section.pictures] == ["quality-sst2", "flops-sst2", "speed-sst2"]
    assert "LTE 16000\xa0tokens/s" in section.pictures[-1].text
    assert "dense twin (3200 ± 0 tokens/s)" in section.text


def test_captions_say_what_is_to_be_seen(material):
    found = [picture for section in sections.main_sections(material, None) for picture in section.pictures]
    found += [picture for section in sections.detail_sections(material) for picture in section.pictures]
    claims = {picture.name: picture.text.partition(". ")[2].replace("\xa0", " ") for picture in found}
    assert claims["quality-stsb"] == "Within 0.01 of the reference up to: LTE 50 %. No other method stays within it."
    assert claims["flops-stsb"].startswith("Within 0.01 of the reference down to: LTE 67 %.")
    assert claims["span-stsb"].startswith("Kept by LTE at 80 %: 93 %, narrower dense at 80 %: 89 %,")
    assert claims["layers-stsb"] == "LTE, 80 %: from 70 % in layer 0 to 90 % in layer 2."
    assert claims["scores-stsb"] == "Scores within 0.1 of the threshold: LTE 17.8 %."
    assert claims["union-stsb"].startswith("No token of 64 rows needs: LTE 27 %, narrower dense 19 %,")
    alts = {picture.name: picture.alt.replace("\xa0", " ") for picture in found}
    assert "LTE, 80 %: 70, 80, 90 %; LTE, 90 %: 80, 90, 100 %" in alts["layers-stsb"]
    assert "LTE, 80 %: 78 % for 1 row, 27 % for 64 rows" in alts["union-stsb"]


def test_settings_that_tie_are_drawn(make_points, figures, tmp_path):
    rows = [
        {
            "name": f"{rate}-{seed}",
            "seed": seed,
            "variant": "narrow",
            "selector": "narrow",
            "parameters": {"rate": rate},
        }
        | {"results": figures(0.8, 0.5, seed)}
        for rate in (1, 2)
        for seed in (0, 1)
    ]
    tied = collect([make_points(tmp_path / "tied", rows)])
    figure = draw(pictures.quality(tied, "sst2", styles(tied)))
    assert [50, 50] in [list(line.get_xdata()) for line in figure.axes[0].lines]


def test_one_seed_has_no_spread(make_comparison, tmp_path):
    material = collect([make_comparison(tmp_path / "one", seeds=1)])
    figure = draw(pictures.quality(material, "stsb", styles(material)))
    assert list(figure.axes[0].collections) == []
    assert "each setting has one seed, so its spread is unknown" in sections.main_sections(material, None)[0].text


def test_what_lies_far_below_the_floor_does_not_press_the_rest_together(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "all")
    change(folder, "random routers", hard=-0.5)
    material = collect([folder])
    figure = draw(pictures.quality(material, "stsb", styles(material)))
    low, high = figure.axes[0].get_ylim()
    assert low < 0.61 < 0.91 < high
    assert high - low < 1.4 * 0.3
    assert "random routers (beyond the picture)" in labels(figure)


@pytest.mark.parametrize("floor", [None, 0.95])
def test_where_there_is_no_span_all_is_seen(floor, compared):
    material = collect([compared])
    for run in material.runs:
        run.results.floor = floor
    figure = draw(pictures.quality(material, "stsb", styles(material)))
    shown = [setting.mean("value") for setting in material.settings()]
    low, high = figure.axes[0].get_ylim()
    assert low < min(shown) < max(shown) < high


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_seen_of_the_vertical_axis(sign):
    """Few settings may lie beyond the picture, and none of LTE's; -1: a metric that is better when lower."""

    def seen(values, own, floor=0.6):
        ends = pictures._limits([sign * value for value in values], [sign * v for v in own], sign * 0.9, sign * floor)
        return sorted(sign * end for end in ends)

    near = [0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.91, 0.92]
    low, high = seen([0.1, *near], [0.9])
    assert 0.5 < low < 0.6
    assert 0.92 < high < 0.95
    assert seen([0.1, *near], [0.1])[0] < 0.1
    assert seen([0.1, 0.2, 0.2, *near], [0.9])[0] < 0.2  # too many
    low, high = seen(near, [0.9], floor=0.899)  # hardly a span
    assert low < 0.83
    assert high > 0.92
    low, high = seen([0.1, *near], [0.9], floor=-80)  # a floor far away would press all together
    assert 0.75 < low < 0.82
    assert 0.92 < high < 0.95


def test_a_floor_beyond_the_picture_is_named_at_its_edge(compared):
    material = collect([compared])
    for run in material.runs:
        run.results.floor = -80.0
    (axes,) = draw(pictures.quality(material, "stsb", styles(material))).axes
    assert axes.get_ylim()[0] > 0.3
    (right,) = axes.child_axes
    assert [label.get_text() for label in right.get_yticklabels()] == ["dense", "floor\n-80"]


def test_details_compare_methods_near_one_sparsity(material):
    chosen, text = sections.nearest(material.settings("stsb"))
    assert chosen[0].method == "LTE"
    assert [setting.sparsity for setting in chosen] == pytest.approx([0.8] * 13)
    assert text == (
        "Each method is shown at its setting nearest to 80 % sparsity, labelled with its sparsity. Left out, with no "
        "setting within 15 points: Wanda, 2:4 and 4:8."
    )
    sparse = [setting for setting in material.settings("stsb") if setting.sparsity < 0.6]
    assert {pictures.setting_label(setting) for setting in sections.nearest(sparse)[0]} >= {
        "LTE, 50\xa0%",
        "TEAL, 50\xa0%",
    }


def test_the_heat_map_has_lte_at_all_settings(material):
    (section,) = sections._layers("stsb", "STS-B", material.settings("stsb"), {})
    assert section.pictures[0].name == "layers-stsb"
    rows = [s for s in material.settings("stsb") if s.method in ("LTE", "TEAL")]
    figure = draw(details.layers(rows))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [f"{name}, {s}\xa0%" for name in ("LTE", "TEAL") for s in (50, 70, 80, 90)]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array()[0], [40, 50, 60])


def test_models_with_different_numbers_of_layers_have_a_heat_map_each(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "all")
    change(folder, "TEAL-0.8", sparsity_per_layer=[0.8] * 6)
    main(["report", str(folder), "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("layers-*.png"))) == 2


def test_an_oracle_is_said_to_be_one_and_an_undefined_figure_is_not_drawn(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "all")
    for file in (folder / "points").glob("KLA*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"variant": "KLA"}))
    change(folder, "TEAL-0.9-1", hard=None, hard_before=0.5, seconds_per_stage={"expert": 1.0})
    material = collect([folder])
    figure = draw(pictures.quality(material, "stsb", styles(material)))
    assert "KLA (oracle)" in labels(figure)
    teal = next(line for line in figure.axes[0].lines if line.get_color() == KNOWN["teal"].colour)
    np.testing.assert_allclose(teal.get_xdata(), [50, 70, 80])
    assert "value is undefined: TEAL, 90\xa0%." in sections.main_sections(material, None)[0].text


def test_only_scores_are_drawn_as_scores(compared, watch):
    material = collect([compared])
    for run in material.runs:
        run.lte["threshold"] = 0.3
    with watch() as figures:
        (section,) = sections._scores("stsb", "STS-B", material.settings("stsb"), styles(material))
    assert labels(figures[0]) == ["LTE, 80 %", "noisy top-k softmax, 80 %", "sigma-MoE, 80 %"]
    (axes,) = figures[0].axes
    assert [line.get_xdata() for line in axes.lines] == [[0.3, 0.3]]
    counts = np.array([10.0 if i < 25 else 5 if i > 40 else 0 if 29 < i < 32 else 1 for i in range(50)])
    shares = axes.patches[0].get_data().values
    assert np.isnan(shares[[30, 31]]).all()  # none is not a little
    np.testing.assert_allclose(np.nan_to_num(shares), 100 * counts / counts.sum())
    assert "have no threshold" in section.text


def test_union_sparsity_leaves_pruned_weights_out(material, watch):
    with watch() as figures:
        sections._union("stsb", "STS-B", material.settings("stsb"), styles(material))
    assert labels(figures[0])[:2] == ["LTE, 80 %", "narrower dense, 80 %"]
    assert not any("Wanda" in label for label in labels(figures[0]))
    np.testing.assert_allclose(figures[0].axes[0].lines[0].get_ydata(), [80 / (1 + size * 0.03) for size in (1, 8, 64)])


def test_letters_are_legible_on_a_phone_and_nothing_is_cut_off(compared, bench_csv, watch, letters, tmp_path):
    with watch() as figures:
        main(["report", str(compared), "--out", str(tmp_path / "out"), "--bench", str(bench_csv)])
    assert len(figures) == 2 * len(list((tmp_path / "out").glob("*.png"))) == 2 * 8
    for figure in figures:
        assert letters(figure, PHONE) >= 11
        box = figure.get_tightbbox()
        assert box.x0 >= -0.01
        assert box.y0 >= -0.01
        assert box.x1 <= figure.get_figwidth() + 0.01
        assert box.y1 <= figure.get_figheight() + 0.01
