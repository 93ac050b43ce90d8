"""The figure of basins: its parts, robust limits, whole files, and no state left behind."""

import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.basins import BasinSet, lr_basins
from analysis.frames import frame
from analysis.lr_basins import draw, loss_limits, save
from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import PARAMETERIZATIONS
from tests.basin_rows import rows


def basins(**arguments: Any) -> BasinSet:
    return lr_basins(frame(rows(**arguments)))


def xs(line: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata())]


def luminance(color: str) -> float:
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_ordered_colours_get_lighter_and_stay_readable_on_white(n: int) -> None:
    found = [luminance(color) for color in style.ordered_colors(n)]
    assert found == sorted(found)
    assert len(set(found)) == n
    assert 1.05 / (found[-1] + 0.05) > 1.6


def test_numbers_and_powers_are_written_as_people_do() -> None:
    assert [style.number(v) for v in (1.0, 1 / 16, 0.3, 256)] == ["1", "1/16", "0.3", "256"]
    assert style.power_of_two(-7.0) == "$2^{\N{MINUS SIGN}7}$"


def test_values_are_written_with_their_axis() -> None:
    minus = "\N{MINUS SIGN}"
    assert style.value_text("lr", 2.0**-7) == f"learning rate $2^{{{minus}7}}$"
    assert style.value_text("lr", 0.01) == "learning rate 1/100"
    assert style.value_text("density", 1 / 16) == "density 1/16"
    assert style.value_text("parameterization", "mup") == "\xb5P"
    assert style.value_text("layer_density", "er") == "layer_density er"
    assert style.panel_title("width", "512") == "Width 512"


def test_a_parameterization_looks_the_same_whoever_stands_beside_it() -> None:
    alone, among = style.looks("parameterization", ["mup"]), style.looks("parameterization", ["sp", "mup", "supar"])
    assert alone["mup"] == among["mup"]
    assert len({look.color for look in among.values()}) == len({look.marker for look in among.values()}) == 3
    assert set(style.TITLES) == set(style.FIXED_LOOKS) == set(PARAMETERIZATIONS)


def test_the_reference_of_an_ordered_axis_is_darkest() -> None:
    for values, reference in (([512.0, 256.0, 128.0], 128.0), ([1.0, 0.5, 0.25], 1.0)):
        looks = style.looks("width", values, reference)
        assert min(values, key=lambda value: luminance(looks[value].color)) == reference


def test_lines_may_be_the_parameterizations() -> None:
    data = lr_basins(frame(rows()), hue="parameterization", col="density")
    drawn = draw(data)
    assert [axes.get_title() for axes in drawn.axes] == ["Density 1", "Density 1/16"]
    assert legend_texts(drawn)[:3] == ["SP", "\xb5P", "S\xb5Par"]
    assert [panel.transferred for panel in data.panels] == [None, None]
    colors = {line.get_color() for line in drawn.axes[0].lines}
    assert {style.FIXED_LOOKS[name][0] for name in ("sp", "mup", "supar")} <= colors


def test_the_legend_says_what_goes_with_a_line() -> None:
    tied = [{**row, "width": 256 if row["density"] == 1 else 768} for row in rows()]
    assert legend_texts(draw(lr_basins(frame(tied))))[:2] == ["density 1, width 256", "density 1/16, width 768"]


def test_basins_over_init_std_are_the_same_figure() -> None:
    swept = rows()
    for row in swept:
        row["init_std"], row["lr"] = row["lr"], 2.0**-7
    drawn = draw(lr_basins(frame(swept), x="init_std"))
    assert drawn.axes[0].get_xlabel().startswith("Init std")
    assert "learning rate" in drawn.get_suptitle()
    with pytest.raises(ConfigError, match=r"where\.lr.*mixes|x: is fitted"):
        lr_basins(frame(rows()), x="init_std")


def test_a_narrow_figure_breaks_its_heading() -> None:
    narrow = style.figure(3.35, 2)
    style.heading(narrow, "width 256, layers 2, learning rate 1/100, 3 seeds, mean")
    assert narrow.get_suptitle().count("\n") == 1
    wide = style.figure(9, 2)
    style.heading(wide, "width 256, layers 2, learning rate 1/100, 3 seeds, mean")
    assert "\n" not in wide.get_suptitle()


def test_a_panel_per_parameterization_sharing_the_loss_axis() -> None:
    drawn = draw(basins())
    assert [axes.get_title() for axes in drawn.axes] == ["SP", "\xb5P", "S\xb5Par"]
    assert len({axes.get_ylim() for axes in drawn.axes}) == 1
    assert "nats" in drawn.axes[0].get_ylabel()
    assert len(drawn.legends) == 1
    assert "256" in drawn.get_suptitle()


def test_the_transferred_optimum_is_a_vertical_line_at_the_dense_one() -> None:
    data = basins()
    for axes, panel in zip(draw(data).axes, data.panels, strict=True):
        upright = [xs(line)[0] for line in axes.lines if len(xs(line)) == 2 and xs(line)[0] == xs(line)[1]]
        assert upright == [panel.lines[0].optimum.x]


def legend_texts(drawn: Figure) -> list[str]:
    return [text.get_text() for text in drawn.legends[0].get_texts()]


def test_a_censored_optimum_is_hollow_and_only_then_in_the_legend() -> None:
    def hollow(drawn: Figure) -> list[Line2D]:
        return [
            line
            for axes in drawn.axes
            for line in axes.lines
            if line.get_marker() == "o" and line.get_markerfacecolor() == "white"
        ]

    censored = draw(basins(optima={"mup": (-8.0, 0.0)}))
    assert len(hollow(censored)) == 1
    assert any("censored" in text for text in legend_texts(censored))
    settled = draw(basins())
    assert hollow(settled) == []
    assert not any("censored" in text for text in legend_texts(settled))


def test_diverged_points_stand_at_the_top_edge() -> None:
    changed = rows()
    for row in changed:
        if row["lr"] >= 2.0**-3:
            row["end"], row["train_loss"] = "diverged", None
    drawn = draw(lr_basins(frame(changed)))
    crosses = [line for axes in drawn.axes for line in axes.lines if line.get_marker() == "x"]
    assert len(crosses) == 3 * 2 * 2  # panels, densities, x
    assert all(float(np.asarray(line.get_ydata())[0]) > 0.85 for line in crosses)  # of the axes' height
    assert "diverged" in legend_texts(drawn)


def test_marks_at_the_edge_stand_side_by_side() -> None:
    changed = rows(optima={"sp": (-9.0, -6.5)})
    for row in changed:
        if row["lr"] == 2.0**-2:
            row["end"], row["train_loss"] = "diverged", None
    (axes,) = draw(lr_basins(frame(changed))).axes
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    places = [line.get_transform().transform((xs(line)[0], ys(line)[0])) for line in crosses]
    centre = float(np.mean([x for x, _ in places]))
    assert len({round(float(x), 3) for x, _ in places}) == len(crosses) == 2
    assert len({round(float(y), 3) for _, y in places}) == 1
    assert centre == pytest.approx(axes.transData.transform((-2, 0))[0])


def test_an_interval_with_one_end_is_drawn_from_that_end() -> None:
    flat = rows(optima={"mup": (-8.0, -8.0)})
    for row in flat:
        x = np.log2(row["lr"])
        if row["density"] < 1:
            noise = row["train_loss"] - 2.4 - 0.02 * (x + 8) ** 2 - 0.01 * row["seed"]
            row["train_loss"] = 2.4 + 0.02 * max(-5 - x, 0) ** 2 + 2e-4 * (x + 3) ** 2 + 2 * noise
    data = lr_basins(frame(flat))
    best = data.panels[0].lines[1].optimum
    assert (best.status, best.ci, best.side) == ("fitted", None, "high")
    (bar,) = [line for line in draw(data).axes[0].lines if line.get_marker() == "|" and len(xs(line)) == 2]
    assert xs(bar) == [best.bound, best.x]


def test_an_optimum_without_an_interval_does_not_look_like_a_sure_one() -> None:
    short = [row for row in rows(optima={"sp": (-9.0, -9.0)}, n_seeds=1) if 2.0**-11 <= row["lr"] <= 2.0**-8]
    data = lr_basins(frame(short))
    assert [line.optimum.ci for line in data.panels[0].lines] == [None, None]
    drawn = draw(data)
    assert [line.get_marker() for line in drawn.axes[0].lines].count("D") == 2
    assert "fitted optimum, open-ended CI" in legend_texts(drawn)
    assert "fitted optimum, 95% CI" not in legend_texts(drawn)
    assert "fitted optimum, open-ended CI" not in legend_texts(draw(basins()))


def test_a_huge_loss_does_not_squash_the_panel() -> None:
    changed = rows()
    for row in changed:
        if row["lr"] == 2.0**-2:
            row["train_loss"] = 400.0
    before, after = loss_limits(basins()), loss_limits(lr_basins(frame(changed)))
    assert after[1] - after[0] < 2 * (before[1] - before[0])
    assert "loss above the axis" in legend_texts(draw(lr_basins(frame(changed))))


def test_every_optimum_lies_inside_the_limits() -> None:
    high = rows(optima={"sp": (-9.0, -6.5)}) + rows(optima={"supar": (-7.0, -7.0)})
    for row in high:
        if row["density"] < 1 and row["parameterization"] == "sp":
            row["train_loss"] += 1.5
    data = lr_basins(frame(high))
    low, top = loss_limits(data)
    for panel in data.panels:
        for line in panel.lines:
            assert low < (line.optimum.loss or 0.0) < top


@pytest.mark.parametrize("end", ["failed", "diverged"])
def test_a_figure_of_nothing_is_drawn_all_the_same(end: str) -> None:
    bare = rows(optima={"sp": (-9.0, -6.5)})
    for row in bare:
        row["end"], row["train_loss"] = end, None
    draw(lr_basins(frame(bare)))


def test_the_files_are_an_image_a_document_and_the_data(tmp_path: Path) -> None:
    data = basins()
    png, pdf, table = save(draw(data), data, tmp_path / "new" / "lr_basins")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    with table.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == sum(len(line.points) for panel in data.panels for line in panel.lines)
    assert float(listed[0]["lr"]) == 2.0 ** float(listed[0]["log2_lr"])


def test_the_callers_matplotlib_state_is_untouched(tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 17.0, "axes.grid": False}):
        before = dict(mpl.rcParams)
        data = basins()
        save(draw(data), data, tmp_path / "figure")
        assert dict(mpl.rcParams) == before


def test_the_callers_style_does_not_leak_into_the_figure() -> None:
    plain = draw(basins()).axes[0].title.get_fontsize()
    with mpl.rc_context({"font.size": 40.0, "axes.titlesize": 40.0}):
        assert draw(basins()).axes[0].title.get_fontsize() == plain
