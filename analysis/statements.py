"""Claims about how a best learning rate moves, computed from the verdict's entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .verdict import Entry, shift_text


@dataclass(frozen=True)
class Statement:
    """A claim about the entries: whether it holds, with the numbers that say so.

    `holds` is None where the entries needed are missing or were not fitted.
    """

    text: str
    holds: bool | None
    numbers: dict[str, float | None]
    note: str = ""

    @property
    def answer(self) -> str:
        """Whether it holds, in words."""
        return {True: "holds", False: "does not hold", None: "cannot be said"}[self.holds]

    def as_dict(self) -> dict[str, Any]:
        """Return the statement as summary.json holds it."""
        return asdict(self)


def moves_more_than(found: Sequence[Entry], parameterization: str, octaves: float) -> Statement:
    """State that from density 1 to the lowest density the best lr moves by more than `octaves`.

    It is judged by the fitted optima; `note` shows the shift's interval. A censored optimum counts if the bound of its
    shift is at least `octaves`.
    """
    text = f"{parameterization}: the best lr moves by more than {octaves:g} octaves over density"
    entry = _sparsest(found, parameterization)
    if entry is None:
        return Statement(text, None, {}, "no dense and sparse line to compare")
    if entry.shift_octaves is not None:
        return Statement(text, abs(entry.shift_octaves) > octaves, _numbers(entry), f"shift {shift_text(entry)}")
    if entry.shift_bound is None:
        return Statement(text, None, _numbers(entry), entry.reason)
    certain = entry.shift_bound >= octaves if entry.shift_bound_side == "high" else entry.shift_bound <= -octaves
    note = f"censored: the shift is {shift_text(entry)}"
    return Statement(text, True if certain else None, _numbers(entry), note)


def moves_less_than(found: Sequence[Entry], parameterization: str, octaves: float) -> Statement:
    """State that from density 1 to the lowest density the best lr moves by less than `octaves`.

    It is judged by the fitted optima; `note` shows the shift's interval, which the verdict's rule asks about.
    """
    text = f"{parameterization}: the best lr moves by less than {octaves:g} octaves over density"
    entry = _sparsest(found, parameterization)
    if entry is None:
        return Statement(text, None, {}, "no dense and sparse line to compare")
    if entry.shift_octaves is not None:
        return Statement(text, abs(entry.shift_octaves) < octaves, _numbers(entry), f"shift {shift_text(entry)}")
    bound = entry.shift_bound
    refuted = bound is not None and (bound if entry.shift_bound_side == "high" else -bound) >= octaves
    return Statement(text, False if refuted else None, _numbers(entry), entry.reason)


def reaches_lower_loss(found: Sequence[Entry], better: str, than: str) -> Statement:
    """State that at the lowest density the best loss of `better` is at most that of `than`.

    Each at its own best lr; where that is censored, the lowest measured loss stands for it.
    """
    text = f"{better}: the best loss at the lowest density is at most {than}'s"
    first, second = _sparsest(found, better), _sparsest(found, than)
    if first is None or second is None or first.best_loss is None or second.best_loss is None:
        return Statement(text, None, {}, "a line to compare is missing")
    numbers: dict[str, float | None] = {
        "density": first.density,
        f"{better}_best_loss": first.best_loss,
        f"{than}_best_loss": second.best_loss,
    }
    if (first.width, first.n_layer, first.density) != (second.width, second.n_layer, second.density):
        return Statement(text, None, numbers, "their greatest shapes or lowest densities differ")
    notes = [f"{e.parameterization}: lowest measured" for e in (first, second) if e.loss_at_optimum is None]
    return Statement(text, first.best_loss <= second.best_loss, numbers, "; ".join(notes))


def can_be_asked(found: Sequence[Entry]) -> bool:
    """Return whether the grid can be asked about the quick start's claims: SP and SuPar, several densities, LR swept."""
    names, densities = {each.parameterization for each in found}, {each.density for each in found}
    return names >= {"sp", "supar"} and len(densities) > 1 and {each.x for each in found} == {"lr"}


def quickstart_statements(found: Sequence[Entry]) -> list[Statement]:
    """Return what the quick start claims, computed: SP moves, SuPar stays, SuPar is no worse.

    [] where the entries tell further axes apart: a claim is about one line of each density.
    """
    if any(entry.also for entry in found):
        return []
    return [
        moves_more_than(found, "sp", 2.0),
        moves_less_than(found, "supar", 0.5),
        reaches_lower_loss(found, "supar", "sp"),
    ]


def _sparsest(found: Sequence[Entry], parameterization: str) -> Entry | None:
    """Return the entry of the lowest density, at the greatest width and depth that was run."""
    mine = [entry for entry in found if entry.parameterization == parameterization]
    if not mine:
        return None
    shape = max((entry.width, entry.n_layer) for entry in mine)
    lowest = min(
        (entry for entry in mine if (entry.width, entry.n_layer) == shape),
        key=lambda entry: entry.density,
    )
    return None if lowest.is_reference or lowest.reference_density is None else lowest


def _numbers(entry: Entry) -> dict[str, float | None]:
    return {
        "density": entry.density,
        "shift_octaves": entry.shift_octaves,
        "shift_ci_low": None if entry.shift_ci is None else entry.shift_ci[0],
        "shift_ci_high": None if entry.shift_ci is None else entry.shift_ci[1],
        "shift_bound": entry.shift_bound,
    }
