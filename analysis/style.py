"""The one look of every figure: colours, names, ticks, sizes, files. Never touches global state.

Figures are made by `figure()` and drawn and saved inside `look()`, a local set of matplotlib
parameters that is undone on leaving: the caller's own plots look as before.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from supar_sweep.sweep.files import write_file

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

METRIC_NAMES = {"train_loss": "Train loss", "val_loss": "Validation loss"}

AXIS_NAMES = {
    "lr": "Learning rate",
    "init_std": "Init std",
    "density": "Density",
    "width": "Width",
    "n_layer": "Layers",
    "parameterization": "Parameterization",
}

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
    """Return n colours of an ordered axis, the reference (first) darkest.

    viridis from dark blue to yellow-green: perceptually uniform and colour-blind safe; its last
    fifth is left out because yellow on white cannot be read.
    """
    stops = [0.0] if n == 1 else [0.05 + 0.75 * index / (n - 1) for index in range(n)]
    return [mpl.colors.to_hex(mpl.colormaps["viridis"](stop)) for stop in stops]


def title(parameterization: str) -> str:
    """Return how a parameterization is written in a figure."""
    return TITLES.get(parameterization, parameterization)


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


def save(drawn: Figure, stem: Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write `stem`.png and `stem`.pdf; return their paths. Raises RecordError where they cannot be written."""
    written = []
    with look():
        for kind in formats:
            path = stem.with_name(f"{stem.name}.{kind}")
            # No date in the file: the same data give the same bytes.
            metadata = {"CreationDate": None} if kind == "pdf" else {}
            # into memory first: a full disk must not end in the middle of matplotlib, or of the file
            image = io.BytesIO()
            drawn.savefig(image, format=kind, dpi=DPI, metadata=metadata)
            written.append(write_file(path, image.getvalue()))
    return written
