"""Does the reference's optimum transfer? From fitted optima: an entry per line, a verdict, proposals, the files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from supar_sweep.errors import ConfigError
from supar_sweep.sweep.files import write_file

from .basins import BasinSet, Line, Panel, told_apart
from .fit import Interval, Side
from .frames import parsed, rounded, text
from .pairing import correlation, shared_part

MAX_SHIFT_OCTAVES = 0.5
MAX_REGRET_PERCENT = 1.0

RULE = (
    f"transfers: the 95% CI of every shift lies within +-{MAX_SHIFT_OCTAVES:g} octaves and the 95% upper bound of "
    f"every regret is below {MAX_REGRET_PERCENT:g}% of the line's best loss; does not transfer: the CI of some shift, "
    f"or the bound of one without a CI, lies wholly outside +-{MAX_SHIFT_OCTAVES:g} octaves; undecided: anything else"
)

GROUP = ("parameterization", "width", "density", "n_layer")
"""What a line has one value of, and what its verdict is about."""

Answer = Literal["transfers", "does not transfer", "undecided"]


@dataclass(frozen=True)
class Shift:
    """How far a line's optimum lies from the reference's, in octaves.

    `value` is None if either is censored. Without a `ci`, `bound` with `side` may hold: "high" is ">= bound".
    """

    value: float | None
    ci: Interval | None = None
    bound: float | None = None
    side: Side | None = None

    @property
    def outside(self) -> bool:
        """Whether the shift is beyond +-MAX_SHIFT_OCTAVES for sure."""
        low, high = -MAX_SHIFT_OCTAVES, MAX_SHIFT_OCTAVES
        if self.ci is not None:
            return self.ci[0] > high or self.ci[1] < low
        if self.bound is None:
            return False
        return self.bound > high if self.side == "high" else self.bound < low

    @property
    def inside(self) -> bool:
        """Whether the shift is within +-MAX_SHIFT_OCTAVES for sure."""
        return self.ci is not None and max(map(abs, self.ci)) <= MAX_SHIFT_OCTAVES


@dataclass(frozen=True)
class Entry:
    """One line of a figure of basins.

    The fields are those of verdict.json, where `log2_opt` and `proposed_log2` carry the name of the swept axis `x`
    (log2_lr_opt, proposed_log2_lrs), and the further axes `also` stand under their own names.
    """

    x: str
    parameterization: str
    width: int
    density: float
    n_layer: int
    n_seeds: int
    log2_opt: float | None
    ci: Interval | None
    shift_octaves: float | None
    shift_ci: Interval | None
    shift_bound: float | None
    shift_bound_side: Side | None
    regret: float | None
    regret_upper: float | None
    regret_percent: float | None
    regret_percent_upper: float | None
    regret_is_lower_bound: bool
    loss_at_optimum: float | None
    lowest_loss: float | None
    censored: bool
    bound: float | None
    bound_side: Side | None
    proposed_log2: tuple[float, ...]
    status: str
    reason: str
    reference_density: float | None
    is_reference: bool
    also: Mapping[str, Any] = field(default_factory=dict)
    """Further axes that the figures tell apart, a method of changing masks, say: a verdict is about one value of each."""

    @property
    def shift(self) -> Shift:
        """The shift as one value."""
        return Shift(self.shift_octaves, self.shift_ci, self.shift_bound, self.shift_bound_side)

    @property
    def best_loss(self) -> float | None:
        """Loss at the optimum; the lowest measured one if there is none."""
        return self.lowest_loss if self.loss_at_optimum is None else self.loss_at_optimum


@dataclass(frozen=True)
class Verdict:
    """Whether a parameterization's dense optimum transfers, and what decided it. `also`: as in `Entry`."""

    parameterization: str
    answer: Answer
    reason: str
    also: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the verdict is about: supar; supar, method=rigl."""
        return ", ".join(
            [self.parameterization, *(f"{axis}={text(rounded(value))}" for axis, value in self.also.items())]
        )


def shift(panel: Panel, line: Line) -> Shift:
    """Return the shift of `line` from the panel's reference line."""
    reference = panel.reference
    if reference is None:
        return Shift(None)
    if line.hue == reference.hue:
        found = line.optimum.x is not None
        return Shift(0.0, (0.0, 0.0)) if found else Shift(None)
    here, there = line.optimum, reference.optimum
    value = None if here.x is None or there.x is None else here.x - there.x
    if here.x is not None and there.x is not None and here.ci is not None and there.ci is not None:
        # The intervals are lopsided: variances recovered from each side separately, errors correlated.
        # Source: Zou and Donner, Stat. Med. 27 (2008) 1693; Zou, Psychol. Methods 12 (2007) 399, eq. 15.
        value = here.x - there.x
        together = _correlation(panel, line, reference)
        below, above = here.x - here.ci[0], here.ci[1] - here.x
        below_there, above_there = there.x - there.ci[0], there.ci[1] - there.x
        return Shift(
            value,
            (
                value - math.sqrt(below**2 + above_there**2 - 2 * together * below * above_there),
                value + math.sqrt(above**2 + below_there**2 - 2 * together * above * below_there),
            ),
        )
    # Some end is not known: a bound needs this line's lower and the reference's upper end, or the
    # reverse.
    least, most = _end(line, "low"), _end(line, "high")
    reference_least, reference_most = _end(reference, "low"), _end(reference, "high")
    if least is not None and reference_most is not None:
        return Shift(value, bound=least - reference_most, side="high")
    if most is not None and reference_least is not None:
        return Shift(value, bound=most - reference_least, side="low")
    return Shift(value)


def _correlation(panel: Panel, line: Line, reference: Line) -> float:
    """Return how far the errors of the two optima go together; 0 where either was not fitted."""
    curves = [each.fit.curve for each in panel.lines if each.fit.curve is not None]
    mine, other = line.fit.curve, reference.fit.curve
    if mine is None or other is None or {line.optimum.status, reference.optimum.status} != {"fitted"}:
        return 0.0
    assert line.optimum.x is not None and reference.optimum.x is not None
    return correlation(mine, line.optimum.x, other, reference.optimum.x, shared_part(curves))


def _end(line: Line, side: Side) -> float | None:
    """Return the least ("low") or greatest ("high") x at which the line's optimum may lie."""
    best = line.optimum
    if best.ci is not None:
        return best.ci[0] if side == "low" else best.ci[1]
    # An optimum above its bound has a least value, the bound, and no greatest.
    return best.bound if best.side != side else None


def entries(sets: Sequence[BasinSet]) -> list[Entry]:
    """Return an entry per line of the figures of `sets` (made by `basins.basin_sets`).

    Args:
        sets: with the parameterizations as panels, or one each; lines over density, width or both together.

    Raises:
        ConfigError: a line of which parameterization, width, density or depth is not one value.
    """
    found = []
    for basins in sets:
        apart = told_apart(basins, sets)
        for panel in basins.panels:
            placed = {axis: parsed(shown) for axis, shown in basins.place(panel).items()}
            further = {axis: value for axis, value in {**apart, **placed}.items() if axis not in GROUP}
            found += [_entry(basins, panel, line, further) for line in panel.lines]
    return found


def _group(basins: BasinSet, panel: Panel, line: Line) -> dict[str, Any]:
    """Return the one value of each axis that the line has."""
    known = {**basins.fixed, **basins.place(panel), **line.tied, basins.hue: line.hue}
    for axis in GROUP:
        if axis not in known:
            raise ConfigError(f"where.{axis}", "a verdict is about lines that have one value of it", allowed=GROUP)
    return {
        "parameterization": str(known["parameterization"]),
        "width": int(float(known["width"])),
        "density": float(known["density"]),
        "n_layer": int(float(known["n_layer"])),
    }


def _entry(basins: BasinSet, panel: Panel, line: Line, also: Mapping[str, Any]) -> Entry:
    best = line.optimum
    moved = shift(panel, line)
    regret = panel.regret(line)
    loss = best.best_loss
    reference = None if panel.reference is None else _group(basins, panel, panel.reference)

    def percent(value: float | None) -> float | None:
        return None if value is None or not loss else 100.0 * value / loss

    return Entry(
        x=basins.x,
        **_group(basins, panel, line),
        n_seeds=line.n_seeds,
        log2_opt=best.x,
        ci=best.ci,
        shift_octaves=moved.value,
        shift_ci=moved.ci,
        shift_bound=moved.bound,
        shift_bound_side=moved.side,
        regret=regret.value,
        regret_upper=regret.upper,
        regret_percent=percent(regret.value),
        regret_percent_upper=percent(regret.upper),
        regret_is_lower_bound=regret.lower_bound_only,
        loss_at_optimum=best.loss,
        lowest_loss=best.lowest_loss,
        censored=best.censored,
        bound=best.bound,
        bound_side=best.side,
        proposed_log2=best.proposals,
        status=best.status,
        reason="; ".join(dict.fromkeys(part for part in (best.reason, regret.reason) if part)),
        reference_density=None if reference is None else reference["density"],
        is_reference=line.hue == panel.reference_hue,
        also=also,
    )


def verdicts(found: Sequence[Entry]) -> list[Verdict]:
    """Return the verdict of each parameterization, one for each value of further axes that the figures tell apart, by `RULE`."""
    together: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in found:
        together.setdefault((entry.parameterization, *map(str, entry.also.items())), []).append(entry)
    return [
        Verdict(each[0].parameterization, *_answer([e for e in each if not e.is_reference]), each[0].also)
        for each in together.values()
    ]


def _answer(others: Sequence[Entry]) -> tuple[Answer, str]:
    """Return the answer about lines that are not the reference, and what decided it."""
    compared = [entry for entry in others if entry.reference_density is not None]
    if not compared:
        return "undecided", "there is no line to compare with a dense one"
    outside = [_at(entry) + f" shifts by {shift_text(entry)}" for entry in compared if entry.shift.outside]
    if outside:
        return "does not transfer", "; ".join(outside)
    open_ = []
    for entry in compared:
        if not entry.shift.inside:
            open_.append(f"{_at(entry)}: shift {shift_text(entry)}")
        elif entry.regret_percent_upper is None:
            open_.append(f"{_at(entry)}: regret not bounded")
        elif entry.regret_percent_upper >= MAX_REGRET_PERCENT:
            open_.append(f"{_at(entry)}: regret up to {entry.regret_percent_upper:.2f}%")
    if open_:
        return "undecided", "; ".join(open_)
    most = max(abs(end) for entry in compared for end in entry.shift_ci or ())
    cost = max(entry.regret_percent_upper or 0.0 for entry in compared)
    return "transfers", f"every shift within {most:.2f} octaves, every regret below {cost:.2f}%"


def _at(entry: Entry) -> str:
    return f"width {entry.width} density {entry.density:g}"


def shift_text(entry: Entry) -> str:
    """Return the shift in words: +0.10 octaves (+0.02 to +0.18), +3.00 octaves (>= +2.10), >= +2.10 octaves, unknown."""
    bound = ""
    if entry.shift_bound is not None:
        bound = f"{'>=' if entry.shift_bound_side == 'high' else '<='} {entry.shift_bound:+.2f}"
    if entry.shift_octaves is not None:
        ci = entry.shift_ci
        interval = bound or "no CI" if ci is None else f"{ci[0]:+.2f} to {ci[1]:+.2f}"
        return f"{entry.shift_octaves:+.2f} octaves ({interval})"
    return f"{bound} octaves" if bound else "unknown"


def proposals(found: Sequence[Entry], budget: int | None = None) -> list[dict[str, Any]]:
    """Return the grid points that would settle the censored optima: each line's group and a value of the swept axis.

    The values nearest to the grid come first, line after line, so that a budget is shared between the lines.

    Args:
        found: entries of `entries`.
        budget: at most so many points (each is a run for every seed); None = all.

    Raises:
        ConfigError: a negative budget.
    """
    if budget is not None and budget < 0:
        raise ConfigError("budget", "out of range", value=budget, allowed=">= 0")
    wanted = [
        {**{axis: getattr(entry, axis) for axis in GROUP}, **entry.also, entry.x: 2.0 ** entry.proposed_log2[rank]}
        for rank in range(max((len(entry.proposed_log2) for entry in found), default=0))
        for entry in found
        if rank < len(entry.proposed_log2)
    ]
    return wanted if budget is None else wanted[:budget]


def plain(entry: Entry) -> dict[str, Any]:
    """Return the entry as verdict.json holds it."""
    fields = asdict(entry)
    x, also = fields.pop("x"), fields.pop("also")
    names = {"log2_opt": f"log2_{x}_opt", "proposed_log2": f"proposed_log2_{x}s"}
    return {"swept": x, **also, **{names.get(name, name): value for name, value in fields.items()}}


def write(
    found: Sequence[Entry],
    folder: Path,
    statements: Sequence[Mapping[str, Any]] = (),
    prefix: str = "",
    scaling: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write verdict.json (a list of the entries) and summary.json into `folder`; return both paths.

    summary.json holds the rule, the verdicts by name, the proposed points and the statements. null, never NaN. `prefix`
    stands before both names; `scaling` (scaling.summary) stands beside the verdicts, where it was made.
    """
    summary = {
        "rule": RULE,
        "verdicts": {v.name: {"verdict": v.answer, "reason": v.reason} for v in verdicts(found)},
        "proposed": proposals(found),
        "statements": list(statements),
        **({} if scaling is None else {"scaling": scaling}),
    }
    return [
        _write_json([plain(entry) for entry in found], folder / f"{prefix}verdict.json"),
        _write_json(summary, folder / f"{prefix}summary.json"),
    ]


def _write_json(value: Any, path: Path) -> Path:
    return write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
