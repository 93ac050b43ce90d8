"""Entries of the verdict -> rows of its table (printed by supar_sweep.sweep.tables.render)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .frames import rounded
from .frames import text as plain_text
from .style import title
from .verdict import Entry

BEFORE = ("width", "density", "n_seeds")
AFTER = ("ci", "shift_octaves", "regret", "regret_percent", "loss_at_optimum")


def columns(x: str = "lr", also: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the table's columns; the optimum's is named after the swept axis: log2_lr_opt. `also`: the entries' further axes."""
    return ("parameterization", *also, *BEFORE, f"log2_{x}_opt", *AFTER)


def verdict_rows(found: Sequence[Entry], text: bool = True) -> list[dict[str, Any]]:
    """Return a row per entry with the keys of `columns` (of the swept axis of the first).

    Args:
        found: entries of verdict.entries.
        text: for eyes: bounds as ">= 2.1", two to four decimals, "-" for what does not exist.
            False: numbers and None, for JSON and CSV (then `ci` is a pair and the bounds have keys
            of their own).
    """
    name_of_optimum = f"log2_{found[0].x if found else 'lr'}_opt"
    if not text:
        return [
            {
                "parameterization": entry.parameterization,
                **entry.also,
                **{name: getattr(entry, name) for name in BEFORE},
                name_of_optimum: entry.log2_opt,
                **{name: getattr(entry, name) for name in AFTER},
                "shift_bound": entry.shift_bound,
                "shift_bound_side": entry.shift_bound_side,
                "bound": entry.bound,
                "bound_side": entry.bound_side,
                "censored": entry.censored,
                "reason": entry.reason,
            }
            for entry in found
        ]
    return [
        {
            "parameterization": title(entry.parameterization),
            **{axis: title(plain_text(rounded(value))) for axis, value in entry.also.items()},
            "width": entry.width,
            "density": f"{entry.density:g}",
            "n_seeds": entry.n_seeds,
            name_of_optimum: value_or_bound(entry.log2_opt, entry.bound, entry.bound_side, "{:.2f}"),
            "ci": "-" if entry.ci is None else f"[{entry.ci[0]:.2f}, {entry.ci[1]:.2f}]",
            "shift_octaves": value_or_bound(entry.shift_octaves, entry.shift_bound, entry.shift_bound_side, "{:+.2f}"),
            "regret": regret_text(entry, entry.regret, "{:.4f}"),
            "regret_percent": regret_text(entry, entry.regret_percent, "{:.2f}"),
            "loss_at_optimum": "-" if entry.loss_at_optimum is None else f"{entry.loss_at_optimum:.4f}",
        }
        for entry in found
    ]


def value_or_bound(value: float | None, bound: float | None, side: str | None, form: str) -> str:
    """Return a value in the given form, else its bound as ">= 2.1", else "-"."""
    if value is not None:
        return form.format(value)
    if bound is not None:
        return f"{'>=' if side == 'high' else '<='} {form.format(bound)}"
    return "-"


def regret_text(entry: Entry, value: float | None, form: str) -> str:
    """Return the entry's regret, in whatever unit `value` has, in the given form; ">= " before a lower bound."""
    if value is None:
        return "-"
    return f"{'>= ' if entry.regret_is_lower_bound else ''}{form.format(value)}"
