"""Table of runs -> the figures that a grid supports, as data; each drawn as one SVG on demand."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from supar_sweep.errors import ConfigError
from supar_sweep.sweep.tables import render

from . import basins, heatmap, loss_curves, lr_basins, lr_exponent, pareto, scaling, style
from . import study as study_figure
from .basins import BasinSet, Panel
from .frames import SWEPT, having, panels_of, parts, values_of, varied, where

LINES = ("density", "width", "n_layer")
"""What may tell the lines of a basin apart, the first that varies."""

_GRID = "experiment.axes"
"""The key of what is wrong with the grid itself: a reader of the page sees the words alone."""

CurveOf = Callable[[str], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Picture:
    """One figure of the report. `data` is what `draw` of the module `kind` takes; `name` is of the CSV of its data."""

    kind: str
    name: str
    title: str
    caption: str
    data: Any


@dataclass(frozen=True)
class Own:
    """The figure that an experiment names as its own. `axes`, `fixed`, `reference`: arguments of the module `kind`."""

    kind: str
    axes: Mapping[str, Any]
    fixed: Mapping[str, Any]
    reference: float | None


@dataclass(frozen=True)
class LeftOut:
    """A figure that the grid does not support, and why."""

    kind: str
    reason: str


_DRAWN: Mapping[str, tuple[Callable[[Any], Figure], Callable[[Any], list[dict[str, Any]]]]] = {
    "lr_basins": (lr_basins.draw, basins.data_rows),
    "pareto": (pareto.draw, pareto.data_rows),
    "heatmap": (heatmap.draw, heatmap.data_rows),
    "lr_exponent": (lr_exponent.draw, lr_exponent.data_rows),
    "scaling": (scaling.draw, scaling.data_rows),
    "loss_curves": (loss_curves.draw, loss_curves.data_rows),
    "study": (study_figure.draw, study_figure.data_rows),
}


def svg(picture: Picture) -> bytes:
    """Return the figure as one SVG: text as shapes, so that it looks the same without any font; the same bytes each time."""
    drawn = _DRAWN[picture.kind][0](picture.data)
    image = io.BytesIO()
    with style.look(), mpl.rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "path"}):
        drawn.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()


def size_px(image: bytes) -> tuple[int, int]:
    """Return width and height of an SVG by `svg`, in CSS pixels (its own size is in points, 3/4 of them)."""
    head = image[:2000].decode()
    width, height = (float(head.split(f' {side}="')[1].split("pt")[0]) for side in ("width", "height"))
    return round(width * 4 / 3), round(height * 4 / 3)


def data_csv(picture: Picture) -> str:
    """Return the figure's data."""
    return render(_DRAWN[picture.kind][1](picture.data), format="csv")


def swept_axis(table: pd.DataFrame) -> str | None:
    """Return which axis was swept: lr or init_std where it has several values on one line, lr first; else None."""
    for axis in SWEPT:
        if axis in varied(table, [name for name in ("parameterization", *LINES, *SWEPT) if name != axis]):
            return axis
    return None


def line_axis(table: pd.DataFrame) -> str:
    """Return which axis tells the lines of the basins apart."""
    return next((axis for axis in LINES if len(values_of(table, axis)) > 1), LINES[0])


def basins_of(table: pd.DataFrame, metric: str, own: Own | None = None) -> list[BasinSet]:
    """Return the basins of a grid, as its own figure has them, else over its swept axis; [] where none was swept."""
    if own and own.kind in ("lr_basins", "init_basins"):
        return basins.basin_sets(table, metric, **own.axes, fixed=own.fixed, reference=own.reference)
    swept = swept_axis(table)
    return [] if swept is None else basins.basin_sets(table, metric, swept, line_axis(table))


def pictures(
    table: pd.DataFrame,
    sets: Sequence[BasinSet],
    metric: str,
    curve_of: CurveOf,
    study: study_figure.Study | None,
    own: Own | None = None,
) -> tuple[tuple[Picture, ...], tuple[LeftOut, ...]]:
    """Return the figures that the grid supports, its own first, and those that it does not.

    Args:
        table: made by frames.frame, with a column `live_parameters`.
        sets: its basins, by `basins_of`.
        metric: train_loss or val_loss.
        curve_of: cell id -> its metrics, a mapping a logged step.
        study: where the hyperparameters were tuned; None = not known.
        own: the figure that the experiment names; None = it names none.
    """
    found, left = [], []
    for each in sets:
        picture = _basins(each, sets)
        if any(point.losses for panel in each.panels for line in panel.lines for point in line.points):
            found.append(picture)
        else:
            left.append(LeftOut(picture.name, "none of its runs has a loss yet"))
    if not sets:
        left.append(LeftOut("basins", "neither lr nor init_std has several values on a line"))
    makers: tuple[tuple[str, Callable[[], Picture]], ...] = (
        ("heatmap", lambda: _heatmap(table, metric, own)),
        ("pareto", lambda: _pareto(table, metric, own)),
        ("scaling", lambda: _scaling(table, metric)),
        *([("lr_exponent", lambda: _lr_exponent(table, metric, own))] if own and own.kind == "lr_exponent" else []),
        ("loss_curves", lambda: _loss_curves(table, sets, curve_of)),
    )
    for kind, make in makers:
        try:
            found.append(make())
        except ConfigError as error:
            left.append(LeftOut(kind, error.problem if error.key == _GRID else str(error)))
    if study is None:
        left.append(LeftOut("study", "the grid's records name no study, or its journal is not in this runs folder"))
    else:
        found.append(_study(study))
    return tuple(sorted(found, key=lambda each: own is None or each.kind != own.kind)), tuple(left)


def _basins(each: BasinSet, sets: Sequence[BasinSet]) -> Picture:
    apart = basins.told_apart(each, sets)
    # pandas writes null as NaN
    at = ", ".join(f"{axis} null" if v != v else style.value_text(axis, v) for axis, v in apart.items())
    suffix = "".join(f"-{axis}{value}" for axis, value in apart.items())
    name, line = style.axis_name(each.x).lower(), style.axis_name(each.hue).lower()
    return Picture(
        "lr_basins",
        f"{each.x}_basins{suffix}",
        _plain_powers(f"Loss against {name}" + (f", {at}" if at else "")),
        f"A line per {line}. Dots: the fitted optimum with its 95% interval; dashed: the reference line's optimum, "
        "transferred to the others. If it transfers, every dot lies on the dashed line.",
        each,
    )


def _heatmap(table: pd.DataFrame, metric: str, own: Own | None) -> Picture:
    if own and own.kind == "heatmap":
        return _map_of(heatmap.heatmap(table, **own.axes, metric=metric, fixed=own.fixed))
    hue = next((axis for axis in LINES[1:] if len(values_of(table, axis)) > 1), "width")
    across = [len(set(rows["density"])) for _, rows in table.groupby(hue)]
    down = [len(set(rows[hue])) for _, rows in table.groupby("density")]
    if max(across) < 2 or max(down) < 2:
        raise ConfigError(_GRID, "a map needs several densities at one width, and several widths at one density")
    if swept_axis(table) is None:
        raise ConfigError(_GRID, "no axis was swept, so there are no optima to map")
    found = heatmap.heatmap(table, "density", hue, metric=metric)
    compared = [cell for _, cells in found.panels for cell in cells if not cell.is_reference]
    if all(cell.shift.value is None and cell.shift.bound is None for cell in compared):
        raise ConfigError(_GRID, "the map needs the optimum of the proxy's own shape, and of others")
    return _map_of(found)


def _map_of(found: heatmap.HeatMap) -> Picture:
    return Picture(
        "heatmap",
        "heatmap",
        f"Shift and regret over {style.axis_name(found.y).lower()} and {style.axis_name(found.x).lower()}",
        "Against one reference, the proxy's own shape (framed): how far the best value moves, and what its own best "
        "value would have saved each shape. Darker is worse; pale is transfer.",
        found,
    )


def _pareto(table: pd.DataFrame, metric: str, own: Own | None) -> Picture:
    if own and own.kind == "pareto":
        return _over(pareto.pareto(table, **own.axes, metric=metric, fixed=own.fixed, reference=own.reference))
    x = line_axis(table)
    if len(values_of(table, x)) < 2:
        raise ConfigError(_GRID, "only one density, width and depth: no line to draw over them")
    apart = varied(table, (x, "parameterization"), SWEPT)
    col = next((axis for axis in LINES if axis in apart), None)
    return _over(pareto.pareto(table, x, col=col, metric=metric))


def _over(found: pareto.Pareto) -> Picture:
    fitted = (
        "At the value transferred from the reference, and at each line's own best value; the gap between the two is the "
        "regret."
    )
    return Picture(
        "pareto",
        "pareto",
        f"Loss against {style.axis_name(found.x).lower()}",
        fitted if found.swept else "All hyperparameters transferred; nothing was swept here.",
        found,
    )


def _lr_exponent(table: pd.DataFrame, metric: str, own: Own) -> Picture:
    return Picture(
        "lr_exponent",
        "lr_exponent",
        "With which power of density the learning rate must go",
        "How far the best value moves from the dense one's under each exponent that was run. The exponent that keeps it in "
        "place is where a line crosses zero.",
        lr_exponent.lr_exponent(table, **own.axes, metric=metric, fixed=own.fixed, reference=own.reference),
    )


def _scaling(table: pd.DataFrame, metric: str) -> Picture:
    found = scaling.scaling(table, metric=metric)
    if all(panel.fit is None for panel in found.panels):
        raise ConfigError(_GRID, found.panels[0].reason if found.panels else "no optimum to fit")
    return Picture(
        "scaling",
        "scaling",
        "Loss as a function of live weights and density",
        "The fit with its 95% intervals; hollow points are left out of it, because their optimum lies beyond the grid.",
        found,
    )


def _study(study: study_figure.Study) -> Picture:
    return Picture(
        "study",
        f"study-{study.name}",
        f"The study {study.name}",
        "Each trial's loss on the dense proxy, and where in its range each hyperparameter was tried.",
        study,
    )


def _loss_curves(table: pd.DataFrame, sets: Sequence[BasinSet], curve_of: CurveOf) -> Picture:
    if sets:
        chosen = pd.concat(list(_at_transferred(table, sets[-1])))
        swept = style.axis_name(sets[-1].x).lower()
        hue, at = sets[-1].hue, f"at the {swept} of the grid nearest to the transferred one"
    else:
        hue, at = line_axis(table), "as run"
        chosen = where(table, parts(table, (hue, "parameterization"))[-1])
    curves = [curve_of(this) for this in chosen["cell_id"]]
    chosen = chosen.assign(curve=pd.Series(curves, index=chosen.index, dtype=object))
    found = loss_curves.loss_curves(chosen, hue=hue)
    # a training function of the user's own may record something else
    if not any(curve.x for _, lines in found.panels for curve in lines):
        raise ConfigError(_GRID, "none of its cells has a recorded curve")
    return Picture(
        "loss_curves",
        "loss_curves",
        "Training curves",
        f"One line per {style.axis_name(hue).lower()}, {at}.",
        found,
    )


def _at_transferred(table: pd.DataFrame, each: BasinSet) -> Iterable[pd.DataFrame]:
    """Yield, line by line, the rows at the value nearest to the one that is transferred; of the last row of panels."""
    *_, (last, kept) = panels_of(where(table, each.fixed), each.row)
    by_name = {panel.col: panel for panel in each.panels if panel.row == last}
    for name, rows in panels_of(kept, each.col):
        if name not in by_name:  # not of this figure: it shows a part of the grid
            continue
        wanted = _transferred(by_name[name])
        for hue in values_of(rows, each.hue):
            line = having(rows, each.hue, hue)
            log2 = np.log2(line[each.x].to_numpy(dtype=float))
            if wanted is None:
                wanted = float(np.median(log2))
            yield line[np.isclose(log2, log2[np.abs(log2 - wanted).argmin()])]


def _transferred(panel: Panel) -> float | None:
    """Return log2 of the reference's optimum; where it is censored, of its lowest mean."""
    if panel.transferred is not None:
        return panel.transferred.x
    line = panel.reference or (panel.lines[0] if panel.lines else None)
    means = [] if line is None else [(p.mean, p.log2_x) for p in line.points if p.eligible and p.mean is not None]
    return min(means)[1] if means else None


def _plain_powers(text: str) -> str:
    """Return text of a figure without mathematical mark-up: 2^-7."""
    return text.replace("$", "").replace("{", "").replace("}", "")
