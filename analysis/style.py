"""The one look of every figure: colours, names, ticks, sizes, files. Never touches global state.

Figures are made by `figure()` and drawn and saved inside `look()`, a local set of matplotlib
parameters that is undone on leaving: the caller's own plots look as before.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from supar_sweep.sweep.files import write_file
from supar_sweep.sweep.tables import render

DPI = 220
COLUMN_IN = 3.35
"""Width of one panel, inches: a column of a two-column paper."""

INK = "#1a1a1a"
MUTED = "#5f6368"
GRID = "#e4e6e8"

TITLES = {
    "sp": "SP",
    "mup": "\N{MICRO SIGN}P",
    "supar": "S\N{MICRO SIGN}Par",
    "init_only": "S\N{MICRO SIGN}Par init only",
    "lr_only": "S\N{MICRO SIGN}Par LR only",
}

METHOD_TITLES = {"static": "Static masks", "set": "SET", "rigl": "RigL", "gmp": "GMP"}

FIXED_LOOKS = {
    "sp": ("#D55E00", "s", (5, 1.5)),
    "mup": ("#0072B2", "^", (3, 1.2)),
    "supar": ("#000000", "o", ()),
    "init_only": ("#CC79A7", "v", (1.2, 1.2)),
    "lr_only": ("#009E73", "D", (4, 1.2, 1.2, 1.2)),
}
"""A parameterization's colour, marker and dashes, the same in every figure.

Source of the colours: Okabe and Ito, Color Universal Design (2008): told apart by colour-blind readers.
"""

_FURTHER_LOOKS = (("#E69F00", "P", (6, 2)), ("#56B4E9", "X", (2, 2)), ("#7F7F7F", "*", (6, 1, 1, 1)))

METRIC_NAMES = {"train_loss": "Train loss", "val_loss": "Validation loss"}

AXIS_NAMES = {
    "lr": "Learning rate",
    "init_std": "Init std",
    "density": "Density",
    "width": "Width",
    "n_layer": "Layers",
    "parameterization": "Parameterization",
    "method": "Method",
    "dynamic_lr_exponent": "Learning-rate exponent",
}

_NAMED = ("parameterization", "method")
"""Axes whose values are names that stand for themselves."""

_PARAMETERS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
    "mathtext.default": "regular",
    "pdf.fonttype": 42,  # text stays text in the PDF
}


@dataclass(frozen=True)
class Look:
    """How a line looks."""

    color: str
    marker: str = "o"
    dashes: tuple[float, ...] = ()

    @property
    def linestyle(self) -> tuple[float, tuple[float, ...]] | Literal["-"]:
        """The dashes as matplotlib takes them."""
        return (0, self.dashes) if self.dashes else "-"


@contextmanager
def look() -> Iterator[None]:
    """Apply the style inside a with block, over matplotlib's defaults; undo it after."""
    with mpl.rc_context():
        mpl.rcdefaults()  # a caller's own style must not leak in either
        mpl.rcParams.update(_PARAMETERS)
        yield


def figure(width_in: float, height_in: float) -> Figure:
    """Return an empty figure that no pyplot state knows of."""
    drawn = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def ordered_colors(n: int) -> list[str]:
    """Return n colours of an ordered axis, the first (the reference, where there is one) darkest.

    viridis from dark blue to yellow-green: perceptually uniform and colour-blind safe; its last
    fifth is left out because yellow on white cannot be read.
    """
    stops = [0.0] if n == 1 else [0.05 + 0.75 * index / (n - 1) for index in range(n)]
    return [mpl.colors.to_hex(mpl.colormaps["viridis"](stop)) for stop in stops]


def looks(axis: str, values: Sequence[Any], reference: Any = None) -> dict[Any, Look]:
    """Return the look of each value of a line axis.

    Numbers get the ordered colours, parameterizations always the same, other names the further ones.

    Args:
        axis: the axis' name.
        values: in the order of the legend.
        reference: the value that is to be darkest; default: the first.
    """
    if all(isinstance(value, int | float) for value in values):
        ordered = list(values)[::-1] if len(values) > 1 and reference == values[-1] else list(values)
        return {value: Look(color) for value, color in zip(ordered, ordered_colors(len(ordered)), strict=True)}
    spare = [value for value in values if value not in FIXED_LOOKS]
    found = {value: FIXED_LOOKS[value] for value in values if value in FIXED_LOOKS}
    found |= {value: _FURTHER_LOOKS[index % len(_FURTHER_LOOKS)] for index, value in enumerate(spare)}
    return {value: Look(*found[value]) for value in values}


def title(name: str) -> str:
    """Return how a parameterization, or a method of changing masks, is written in a figure."""
    return TITLES.get(name) or METHOD_TITLES.get(name, name)


def axis_name(axis: str) -> str:
    """Return how an axis is written at a figure's edge; one that is not ours keeps its name."""
    return AXIS_NAMES.get(axis, axis)


def value_text(axis: str, value: Any) -> str:
    """Return a value of an axis as text: SP, RigL, density 1/16, learning rate 2^-7."""
    if axis in _NAMED:
        return title(str(value))
    if value is None or value != value:  # pandas writes null as NaN
        value = "null"
    try:
        plain = float(value)
    except (TypeError, ValueError):
        return f"{axis_name(axis).lower()} {value}"
    exponent = math.log2(plain) if plain > 0 else math.nan
    in_octaves = axis in ("lr", "init_std") and abs(exponent * 4 - round(exponent * 4)) < 1e-6
    return f"{axis_name(axis).lower()} {power_of_two(round(exponent, 6)) if in_octaves else number(plain)}"


def panel_title(axis: str | None, value: Any) -> str:
    """Return the title of a panel: SP, Density 1/16; "" where there is one panel of no axis."""
    if axis is None:
        return ""
    text = value_text(axis, value)
    return text if axis in _NAMED else text[:1].upper() + text[1:]


def place_text(axes: Mapping[str, Any]) -> str:
    """Return where in a grid something stands, in words: RigL, learning-rate exponent 1/2."""
    return ", ".join(value_text(axis, value) for axis, value in axes.items())


def fixed_text(fixed: Mapping[str, Any], but: Sequence[str] = ()) -> str:
    """Return what all lines of a figure have in common: "SP, width 256, layers 2".

    Args:
        fixed: axis -> its one value.
        but: axes that the figure shows otherwise.
    """
    shown = ("parameterization", "method", "width", "n_layer", "density", "lr")
    return ", ".join(value_text(axis, fixed[axis]) for axis in shown if axis in fixed and axis not in but)


def seeds_text(few: int, many: int) -> str:
    """Return of how many seeds a figure's points are: "2 to 3 seeds, mean +- standard error"; of one, no error is drawn."""
    if many < 2:
        return f"{many} seed"
    counted = f"{many}" if few == many else f"{few} to {many}"
    return f"{counted} seeds, mean \N{PLUS-MINUS SIGN} standard error"


def heading(drawn: Figure, text: str) -> None:
    """Write what a figure's lines have in common above it, broken where the figure is narrow."""
    letters = int(drawn.get_figwidth() * 13)
    # a power of two is short on paper and long as mathematical text, so lines break between its parts, by their length
    lines: list[str] = []
    for part in text.replace("\n", ", ").split(", "):
        joined = f"{lines[-1]}, {part}" if lines else part
        if lines and len(joined.replace("$2^{\N{MINUS SIGN}", "2").replace("}$", "")) <= letters:
            lines[-1] = joined
        else:
            lines.append(part)
    drawn.suptitle(",\n".join(lines), fontsize=9.5, color=MUTED)


def number(value: float) -> str:
    """Return a value of an ordered axis: 1, 1/16, 256, 0.3."""
    if 0 < value < 1:
        inverse = round(1 / value)
        if abs(value * inverse - 1) < 1e-6:
            return f"1/{inverse}"
    return f"{value:g}"


def power_of_two(exponent: float) -> str:
    """Return 2^exponent as mathematical text."""
    return f"$2^{{{exponent:g}}}$".replace("-", "\N{MINUS SIGN}")


def log2_ticks(axes: Axes, span_octaves: float) -> None:
    """Label the x axis, whose data are log2 values, as 2^-7."""
    step = 1 if span_octaves <= 7 else 2 if span_octaves <= 14 else 4
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_two(round(value, 6))))


def value_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label the x axis, whose data are log2 of the values, with the values themselves: 1/16, 768."""
    shown = list(values)
    # powers of two as such where there are many of them or they are small
    powers = all(abs(math.log2(v) - round(math.log2(v))) < 1e-9 for v in shown) and min(shown) < 1
    axes.set_xticks(
        [math.log2(v) for v in shown], [power_of_two(round(math.log2(v))) if powers else number(v) for v in shown]
    )
    axes.minorticks_off()


def panels(
    n: int, width_in: float, height_in: float, *, legend_in: float = 0.9, per_row: int = 4
) -> tuple[Figure, list[Axes]]:
    """Return a figure with n panels that share both axes, and their axes.

    Args:
        n: number of panels.
        width_in, height_in: of one panel.
        legend_in: height kept below for a legend.
        per_row: panels side by side, at most.
    """
    columns = min(n, per_row)
    rows = math.ceil(n / columns)
    drawn = figure(max(width_in * columns, COLUMN_IN), height_in * rows + legend_in)
    found = list(drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    hide(found[n:], columns, found)
    return drawn, found[:n]


def hide(spare: Sequence[Axes], columns: int, found: Sequence[Axes]) -> None:
    """Take empty places out of a grid of panels; the lowest panel that is left in a column gets the labels of its ticks.

    Args:
        spare: of `found`. columns: panels side by side. found: all places, row by row.
    """
    for each in spare:
        each.set_visible(False)
    for first in range(columns):
        for lowest in [each for each in found[first::columns] if each.get_visible()][-1:]:
            lowest.tick_params(labelbottom=True)


def legend(drawn: Figure, handles: Sequence[Any], labels: Sequence[str], **more: Any) -> None:
    """Write one legend below the panels, in as many columns as the figure's width takes.

    Args:
        drawn: the figure.
        handles, labels: of the same length.
        more: for matplotlib's legend.
    """
    # a handle takes .4 inches, a letter .065; mathematical text is shorter than it is long; columns are filled from above
    lengths = [len(re.sub(r"[${}^]", "", label)) for label in labels]

    def width_in(columns: int) -> float:
        filled = np.array_split(np.array(lengths), columns)
        return sum(0.4 + 0.065 * int(column.max()) for column in filled) + 0.19 * (columns - 1)

    columns = max((n for n in range(1, len(labels) + 1) if width_in(n) <= drawn.get_figwidth()), default=1)
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns)) if labels else 1
    drawn.legend(
        handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.6, handlelength=1.9, **more
    )


def save(drawn: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.pdf; return their paths. Raises RecordError where they cannot be written."""
    written = []
    with look():
        for kind in ("png", "pdf"):
            path = stem.with_name(f"{stem.name}.{kind}")
            # No date in the file: the same data give the same bytes.
            metadata = {"CreationDate": None} if kind == "pdf" else {}
            # into memory first: a full disk must not end in the middle of matplotlib, or of the file
            image = io.BytesIO()
            drawn.savefig(image, format=kind, dpi=DPI, metadata=metadata)
            written.append(write_file(path, image.getvalue()))
    return written


def save_with_data(drawn: Figure, rows: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """Write `stem`.png and .pdf, and the figure's data as `stem`.csv; return the three paths.

    Args:
        drawn: the figure.
        rows: its data; a column for every key of any row.
        stem: path without the ending.
    """
    written = save(drawn, stem)
    return [*written, write_file(stem.with_name(f"{stem.name}.csv"), render(rows, format="csv"))]
