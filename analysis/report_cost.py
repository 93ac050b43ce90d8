"""What a grid and its study cost, and what tuning every target directly would have cost: FLOPs and hours from records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from supar_sweep.config.schema import CellConfig
from supar_sweep.sweep.pace import train_s
from supar_sweep.training.cost import flops_per_step

FORMULA = (
    "Direct tuning of a shape = runs of the proxy's study (trials and confirmations) x cost of one run of that shape, "
    "summed over every shape that is not the proxy's. FLOPs of a run: steps x FLOPs a step, of live weights. Hours of a "
    "run: the mean of the runs recorded here."
)

MEANING = (
    "FLOPs: 6 x (live hidden weights and the head) + 12 x n_layer x width x context, a token. Hours: the time of the "
    "training steps alone, summed over runs as if one process had taken them in turn; a run that shared its steps with others "
    "counts its share, and a run that another grid uses too counts in full."
)


@dataclass(frozen=True)
class ShapeCost:
    """All cells of one shape. What was not recorded is None; `direct_*` too, for the proxy and where no study is known."""

    width: int
    n_layer: int
    density: float
    steps: int
    n_cells: int
    n_complete: int
    flops_a_run: float | None
    flops: float
    train_s: float
    direct_flops: float | None = None
    direct_s: float | None = None


@dataclass(frozen=True)
class StudyCost:
    """A study's runs. None where not all of them are in this runs folder."""

    n_runs: int
    flops: float | None
    train_s: float | None


@dataclass(frozen=True)
class Cost:
    """What was spent, and what direct tuning would have taken.

    `devices`: how many complete cells each trained; `unfinished_s`: of attempts that ended without a result.
    """

    shapes: tuple[ShapeCost, ...]
    study: StudyCost | None
    devices: Mapping[str, int]
    unfinished_s: float

    @property
    def flops(self) -> float:
        """Of the complete cells."""
        return sum(shape.flops for shape in self.shapes)

    @property
    def train_s(self) -> float:
        """Of the complete cells."""
        return sum(shape.train_s for shape in self.shapes)

    @property
    def direct_flops(self) -> float | None:
        """Of tuning every target directly; None without a study, or where no shape's cost is known."""
        return _sum(shape.direct_flops for shape in self.shapes)

    @property
    def direct_s(self) -> float | None:
        """Of tuning every target directly, in seconds of training steps."""
        return _sum(shape.direct_s for shape in self.shapes)

    @property
    def n_targets(self) -> int:
        """How many shapes would have been tuned."""
        return sum(shape.direct_flops is not None for shape in self.shapes)


def study_cost(n_runs: int, results: Sequence[Mapping[str, Any]]) -> StudyCost:
    """Return what a study cost.

    Args:
        n_runs: trials and confirmations that ended as done or diverged.
        results: of its cells. Two trials of the same values share a cell.
    """
    if not results:
        return StudyCost(n_runs, None, None)
    return StudyCost(n_runs, _all(each.get("flops") for each in results), _all(map(train_s, results)))


def cost(
    cells: Mapping[str, CellConfig],
    results: Mapping[str, Mapping[str, Any]],
    *,
    study: StudyCost | None,
    proxy: CellConfig | None,
    unfinished_s: float = 0.0,
) -> Cost:
    """Return the cost of a grid, a row a shape, in the grid's order.

    Args:
        cells: of the grid, by id.
        results: of those that are complete, by id.
        study: what the hyperparameters' search cost; None = not known.
        proxy: the study's cell: its shape needs no tuning of its own.
        unfinished_s: time of the attempts that ended without a result.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for this, cell in cells.items():
        groups.setdefault(_shape(cell), []).append(this)
    shapes = []
    for shape, members in groups.items():
        cell = cells[members[0]]
        found = [results[this] for this in members if this in results]
        times = [seconds for each in found if (seconds := train_s(each)) is not None]
        of_run = run_flops(cell)
        tuned = study is None or (proxy is not None and _shape(proxy) == shape)
        shapes.append(
            ShapeCost(
                width=cell.model.width,
                n_layer=cell.model.n_layer,
                density=cell.density,
                steps=cell.train.steps,
                n_cells=len(members),
                n_complete=len(found),
                flops_a_run=of_run,
                flops=sum(float(each.get("flops") or 0.0) for each in found),
                train_s=sum(times),
                direct_flops=None if tuned or study is None or of_run is None else study.n_runs * of_run,
                direct_s=None if tuned or study is None or not times else study.n_runs * sum(times) / len(times),
            )
        )
    devices = Counter(device(each) for each in results.values())
    return Cost(tuple(shapes), study, dict(devices.most_common()), unfinished_s)


def _shape(cell: CellConfig) -> tuple[Any, ...]:
    return cell.model, cell.density, cell.layer_density, cell.train, cell.data.n_vocab


def run_flops(cell: CellConfig) -> float | None:
    """Return the training FLOPs of one whole run; None for a training function of the user's own."""
    return None if cell.train.target is not None else float(cell.train.steps) * flops_per_step(cell)


def device(result: Mapping[str, Any]) -> str:
    """Return on what a run was computed, in words."""
    kind, name = str(result.get("device", "unknown")), result.get("device_name")
    return kind if name in (None, "", kind) else f"{name} ({kind})"


def flops_text(value: float | None) -> str:
    """Return a number of FLOPs with a decimal prefix: 283 MFLOP, 1.21 PFLOP."""
    if value is None:
        return "-"
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def time_text(seconds: float | None) -> str:
    """Return a time with the unit that suits it: 0.42 s, 3.1 min, 17 h."""
    if seconds is None:
        return "-"
    for unit, size_s in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size_s:
            hours = seconds / size_s
            return f"{hours:,.0f} {unit}" if hours >= 1000 else f"{hours:.3g} {unit}"
    return f"{seconds:.3g} s"


def _all(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    known = [float(value) for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
