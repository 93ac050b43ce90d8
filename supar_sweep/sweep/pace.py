"""What the records say was spent, and how fast it goes on. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

WINDOW_S = 3600.0
"""The pace is that of the last hour."""

S_AN_HOUR = 3600.0


class Spent(NamedTuple):
    """What one complete cell took.

    Args:
        begun_s, finished_s: of its last attempt, in Unix time.
        train_s: of the training steps of all attempts; a run that shared them with others counts its share.
        device: "cpu" or "cuda".
        devices: GPUs, or cores, that worked on it at once; of a GPU that processes share, its part.
    """

    begun_s: float
    finished_s: float
    train_s: float
    device: str
    devices: float


class Pace(NamedTuple):
    """How fast a grid goes, by its recent cells.

    Args:
        cells_per_hour: complete ones.
        eta_s: until the cells under way are complete.
    """

    cells_per_hour: float
    eta_s: float


def spent(result: Mapping[str, Any]) -> Spent:
    """Return what a published result says of its cost."""
    begun_s, device = float(result.get("started_s") or 0.0), str(result.get("device", "cpu"))
    of_slurm = (result.get("provenance") or {}).get("slurm") or {}
    each = int(result.get("threads") or 1) if device == "cpu" else 1 / int(of_slurm.get("on_gpu") or 1)
    devices = int(result.get("ranks") or 1) * each
    finished_s = begun_s + float(result.get("wall_s") or 0.0)
    return Spent(begun_s, finished_s, train_s(result) or 0.0, device, devices)


def train_s(result: Mapping[str, Any]) -> float | None:
    """Return how long the steps of a run took, over all its attempts; where that is not recorded, its last attempt."""
    value = result.get("train_s", result.get("wall_s"))
    return None if value is None else float(value)


def used_hours(costs: Iterable[Spent]) -> dict[str, float]:
    """Return GPU-hours and core-hours of complete cells, those of the two that are not 0.

    Args:
        costs: of each cell.
    """
    found: dict[str, float] = {}
    for each in costs:
        unit = "core-hours" if each.device == "cpu" else "GPU-hours"
        found[unit] = found.get(unit, 0.0) + each.devices * each.train_s / S_AN_HOUR
    return {unit: hours for unit, hours in found.items() if hours}


def pace(
    costs: Mapping[str, Spent], weights: Mapping[str, float], left: Iterable[str], *, since_s: float, now_s: float
) -> Pace | None:
    """Return how fast cells became complete lately, and when those under way will be; None where none did.

    Args:
        costs: of the complete cells, by id.
        weights: what each cell costs beside others, > 0.
        left: the cells that are under way.
        since_s: Unix time before which nothing counts: when the present `run` began.
        now_s: the time now.
    """
    since_s = max(since_s, now_s - WINDOW_S)
    recent = [this for this, each in costs.items() if since_s < each.finished_s <= now_s]
    if not recent:
        return None
    took_s = now_s - max(since_s, min(costs[this].begun_s for this in recent))
    eta_s = took_s * sum(weights[this] for this in left) / sum(weights[this] for this in recent)
    return Pace(S_AN_HOUR * len(recent) / took_s, eta_s)
