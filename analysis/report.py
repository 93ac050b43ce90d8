"""Records of a grid and its study -> Report: all that the report's page says, as plain data (drawn by report_page.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError, SuparError
from supar_sweep.rules.hparams import HParams
from supar_sweep.sweep.extension import n_added
from supar_sweep.sweep.identity import cell_id
from supar_sweep.sweep.status import STATES, CellState, first_errors, status_counts
from supar_sweep.sweep.submission import Plan
from supar_sweep.sweep.winner import Winner

from . import scaling, style
from .basins import BasinSet
from .frames import frame
from .report_cost import Cost, cost, flops_text, study_cost, time_text
from .report_figures import CurveOf, LeftOut, Own, Picture, basins_of, pictures
from .report_origin import Facts, Origin, Table, origin
from .report_tables import extension, scaling_fits
from .statements import Statement, can_be_asked, quickstart_statements
from .study import Study
from .study import study as study_data
from .tables import regret_text, value_or_bound
from .verdict import GROUP, RULE, Entry, Verdict, entries, proposals, verdicts

CELLS_LISTED = 1000
"""A page that lists more is slow to open; plan.json holds them all."""


@dataclass(frozen=True, kw_only=True)
class StudyRecords:
    """The study that a grid took its hyperparameters from. `results`: of its cells that are complete, by id."""

    winner: Winner
    trials: Sequence[Mapping[str, Any]]
    results: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Records:
    """All that a report is made from.

    Args:
        plan: the frozen grid.
        rows: one a grid point (sweep.status.rows), with `live_parameters`.
        states: where each cell stands, by id.
        results: published results, by id.
        curve_of: cell id -> its metrics.
        study: None where the grid names no study, or it is not in the runs folder.
        unfinished_s: time of the attempts that ended without a result.
        metric: train_loss or val_loss.
        argv: the words that asked for the report.
        made: when, as text. version: of supar-sweep.
        own: the figure that the experiment names; None = it names none.
    """

    plan: Plan
    rows: Sequence[Mapping[str, Any]]
    states: Mapping[str, CellState]
    results: Mapping[str, Mapping[str, Any]]
    curve_of: CurveOf
    study: StudyRecords | None
    unfinished_s: float
    metric: str
    argv: Sequence[str]
    made: str
    version: str
    own: Own | None = None


@dataclass(frozen=True)
class Report:
    """Everything the page says. `question`: what the verdicts answer; `no_verdict`: why there are none, else ""."""

    experiment: str
    question: str
    metric: str
    made: str
    version: str
    facts: Facts
    incomplete: str
    verdicts: tuple[Verdict, ...]
    no_verdict: str
    rule: str
    claims: tuple[Statement, ...]
    entries: tuple[Entry, ...]
    optima: Table | None
    proposed: Table | None
    extension: Table | None
    scaling: Table
    figures: tuple[Picture, ...]
    left_out: tuple[LeftOut, ...]
    origin: Origin
    cells: Table
    cost: Cost
    costs: Table
    states: Table
    failures: Table | None


def report(records: Records) -> Report:
    """Return the report of a grid.

    Raises:
        ConfigError: none of its cells is complete.
        SuparError: its plan holds cells that this version cannot read.
    """
    plan = records.plan
    if not records.results:
        counts = Counter(state.state for state in records.states.values())
        raise ConfigError(
            "experiment.name",
            f"no cell is complete yet ({', '.join(f'{n} {state}' for state, n in counts.most_common())}): nothing to report",
            value=plan.experiment,
            allowed="a grid with results; `run` trains them, `status` shows the first errors",
        )
    cells = {this: decode(CellConfig, planned.cell) for this, planned in plan.cells.items()}
    table = frame(records.rows)
    sets = basins_of(table, records.metric, records.own)
    found = entries(sets)
    origin_ = origin(plan, cells, records.results, records.study.winner if records.study else None, records.argv)
    drawn, left_out = pictures(table, sets, records.metric, records.curve_of, _study_data(records.study), records.own)
    spent = _cost(records, cells)
    return Report(
        experiment=plan.experiment,
        question=_question(sets),
        metric=style.METRIC_NAMES[records.metric].lower(),
        made=records.made,
        version=records.version,
        facts=_facts(table, records),
        incomplete=_incomplete(records.states),
        verdicts=tuple(verdicts(found)),
        no_verdict="" if found else "No verdict: neither lr nor init_std was swept, so there are no optima to compare.",
        rule=RULE,
        claims=tuple(_claims(found)),
        entries=tuple(found),
        optima=optima(found) if found else None,
        proposed=_proposed(found),
        extension=extension(plan),
        scaling=scaling_fits(scaling.summary(table, records.metric)),
        figures=drawn,
        left_out=left_out,
        origin=origin_,
        cells=_cells(records),
        cost=spent,
        costs=_costs(spent),
        states=_states(records),
        failures=_failures(records),
    )


def _question(sets: Sequence[BasinSet]) -> str:
    if not sets:
        return "What the grid's runs reached"
    swept, line = (style.axis_name(axis).lower() for axis in (sets[0].x, sets[0].hue))
    where = {"density": "the dense model", "width": "the narrowest model", "n_layer": "the shallowest model"}
    return f"Does the best {swept} of {where[sets[0].hue]} hold at every {line}?"


def _facts(table: pd.DataFrame, records: Records) -> Facts:
    def values(axis: str) -> str:
        listed = sorted({float(v) for v in table[axis]}, reverse=axis == "density")
        shown = [style.number(v) for v in listed]
        return ", ".join(shown) if len(shown) <= 8 else f"{shown[0]} to {shown[-1]} ({len(shown)})"

    names = [style.title(name) for name in dict.fromkeys(table["parameterization"])]
    rates = sorted(set(table["lr"].astype(float)))
    return (
        ("parameterizations", ", ".join(names)),
        ("densities", values("density")),
        ("widths", values("width")),
        ("layers", values("n_layer")),
        (
            "learning rates",
            f"{rates[0]:.3g} to {rates[-1]:.3g} ({len(rates)})" if len(rates) > 1 else f"{rates[0]:.4g}",
        ),
        ("seeds", str(table["seed"].nunique())),
        ("complete", f"{len(records.results)} of {len(records.plan.cells)} cells"),
        *([("added by extend", f"{n_added(records.plan)} cells")] if n_added(records.plan) else []),
    )


def _incomplete(states: Mapping[str, CellState]) -> str:
    left = Counter(state.state for state in states.values() if not state.complete)
    if not left:
        return ""
    each = ", ".join(f"{left[state]} {state}" for state in STATES if left[state])
    return f"The grid is not complete: {each} of {len(states)} cells. Everything below is of what is there."


def _claims(found: Sequence[Entry]) -> Iterable[Statement]:
    """Return the quick start's claims where the grid can be asked about them: densities, SP and SuPar."""
    return quickstart_statements(found) if can_be_asked(found) else ()


def optima(found: Sequence[Entry]) -> Table:
    """Return a row per line: its optimum, shift and regret with their 95% intervals, in text."""
    name = found[0].x
    rows = [
        (
            style.place_text({"parameterization": entry.parameterization, **entry.also}),
            str(entry.width),
            style.number(entry.density),
            str(entry.n_layer),
            str(entry.n_seeds),
            "-" if entry.log2_opt is None else f"{2.0**entry.log2_opt:.4g}",
            value_or_bound(entry.log2_opt, entry.bound, entry.bound_side, "{:.2f}"),
            _interval(entry.ci, "{:.2f}"),
            "reference" if entry.is_reference else value_or_bound(
                entry.shift_octaves, entry.shift_bound, entry.shift_bound_side, "{:+.2f}"
            ),
            "" if entry.is_reference else _interval(entry.shift_ci, "{:+.2f}"),
            "" if entry.is_reference else regret_text(entry, entry.regret, "{:.4f}"),
            "" if entry.is_reference else regret_text(entry, entry.regret_percent, "{:.2f}"),
            "" if entry.is_reference or entry.regret_percent_upper is None else f"{entry.regret_percent_upper:.2f}",
            "-" if entry.best_loss is None else f"{'' if entry.loss_at_optimum else '<= '}{entry.best_loss:.4f}",
            entry.reason,
        )
        for entry in found
    ]  # fmt: skip
    columns = (
        *("", "width", "density", "layers", "seeds"),
        *(f"best {name}", f"log2 {name}", "95% CI", "shift, octaves", "95% CI"),
        *("regret, nats", "regret, %", "at most, %", "best loss", "note"),
    )
    return _without_constant(
        Table("Optima, shifts and regret", columns, tuple(rows)), ("width", "layers", "seeds", "note")
    )


def _interval(ends: tuple[float, float] | None, form: str) -> str:
    return "-" if ends is None else f"{form.format(ends[0])} to {form.format(ends[1])}"


def _without_constant(table: Table, names: Iterable[str]) -> Table:
    """Return the table without those of the named columns that have one value, which go into its note."""
    apart = [
        i for i, name in enumerate(table.columns) if name in set(names) and len({row[i] for row in table.rows}) == 1
    ]
    kept = [i for i in range(len(table.columns)) if i not in apart]
    said = [f"{table.columns[i]} {table.rows[0][i]}" for i in apart if table.rows and table.rows[0][i]]
    return Table(
        table.heading,
        tuple(table.columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in table.rows),
        ". ".join(part for part in (f"All: {', '.join(said)}" if said else "", table.note) if part),
    )


def _proposed(found: Sequence[Entry]) -> Table | None:
    rows = proposals(found)
    if not rows:
        return None
    name = found[0].x
    return Table(
        "Runs that would settle the censored optima",
        ("", "width", "density", "layers", name),
        tuple(
            (
                style.place_text({axis: row[axis] for axis in row if axis not in (*GROUP[1:], name)}),
                str(row["width"]),
                style.number(row["density"]),
                str(row["n_layer"]),
                f"{row[name]:.4g}",
            )
            for row in rows
        ),
        "Each with every seed of the grid.",
    )


def _study_data(study: StudyRecords | None) -> Study | None:
    if study is None or not study.trials:
        return None
    lineage = study.winner.lineage
    confirmed = {each["trial"]: each["values"] for each in lineage.get("confirmed") or ()}
    return study_data(study.trials, str(lineage.get("study")), str(lineage.get("metric", "train_loss")), confirmed)


def _ended(study: StudyRecords) -> list[Mapping[str, Any]]:
    return [trial for trial in study.trials if trial["end"] in ("done", "diverged")]


def proxy_of(winner: Winner) -> CellConfig | None:
    """Return the cell that a study tuned; None where its lineage does not hold one that this version can read."""
    plain = winner.lineage.get("proxy")
    try:
        return decode(CellConfig, plain) if plain else None
    except SuparError:
        return None


def study_cell_ids(winner: Winner, trials: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the ids of a study's cells, trials and confirmations: worked out, as the study itself did, from its proxy.

    Args:
        winner: best.yaml, with its lineage.
        trials: rows of sweep.trials.
    """
    proxy, mark = proxy_of(winner), (winner.lineage.get("data") or {}).get("fingerprint")
    if proxy is None or mark is None:
        return set()
    tried: dict[int, HParams] = {
        row["number"]: replace(proxy.hparams, **row["params"]) for row in trials if row["params"]
    }
    found = {cell_id(replace(proxy, hparams=hparams), mark) for hparams in tried.values()}
    for each in winner.lineage.get("confirmed") or ():
        if each["trial"] in tried:
            found |= {cell_id(replace(proxy, hparams=tried[each["trial"]], seed=seed), mark) for seed in each["seeds"]}
    return found


def _cost(records: Records, cells: Mapping[str, CellConfig]) -> Cost:
    study, proxy, tuned = records.study, None, None
    if study is not None:
        proxy = proxy_of(study.winner)
        ended = _ended(study)
        n_confirmed = sum(len(each["values"]) for each in study.winner.lineage.get("confirmed") or ())
        wanted = study_cell_ids(study.winner, ended)
        whole = bool(wanted) and wanted <= set(study.results)
        tuned = study_cost(len(ended) + n_confirmed, list(study.results.values()) if whole else [])
    return cost(cells, records.results, study=tuned, proxy=proxy, unfinished_s=records.unfinished_s)


def _costs(spent: Cost) -> Table:
    rows = [
        (
            str(shape.width),
            style.number(shape.density),
            str(shape.n_layer),
            str(shape.steps),
            f"{shape.n_complete} of {shape.n_cells}",
            flops_text(shape.flops_a_run),
            flops_text(shape.flops),
            time_text(shape.train_s),
            flops_text(shape.direct_flops),
            time_text(shape.direct_s),
        )
        for shape in spent.shapes
    ]
    columns = ("width", "density", "layers", "steps", "complete", "a run", "spent", "time", "direct tuning", "its time")
    n_shown = len(columns) - (2 if spent.direct_flops is None else 0)
    table = Table("By shape", columns[:n_shown], tuple(row[:n_shown] for row in rows))
    return _without_constant(table, ("layers", "steps"))


def _states(records: Records) -> Table:
    axes = [
        a for a in ("parameterization", "width", "n_layer", "density") if len({p[a] for p in records.plan.points}) > 1
    ]
    groups = status_counts(records.plan, records.states, by=axes)
    shown = [state for state in STATES if any(group[state] for group in groups)]
    names = {"parameterization": "", "n_layer": "layers"}
    return Table(
        "Grid points by state",
        (*(names.get(axis, axis) for axis in axes), *shown, "all"),
        tuple(
            (*(_axis_text(axis, group[axis]) for axis in axes), *(str(group[s]) for s in shown), str(group["n"]))
            for group in groups
        ),
        "Diverged is data, not a failure: such a value is never taken for an optimum." if "diverged" in shown else "",
    )


def _axis_text(axis: str, value: Any) -> str:
    return style.title(str(value)) if axis == "parameterization" else style.number(float(value))


def _failures(records: Records) -> Table | None:
    rows = first_errors(records.plan, records.states)
    if not rows:
        return None
    return Table(
        "Failures by kind",
        ("kind", "cells", "first message", "log", "first cell"),
        tuple((row["state"], str(row["n"]), row["message"], row["log"] or "-", row["cell"]) for row in rows),
    )


def _cells(records: Records) -> Table:
    listed = list(records.plan.cells.items())
    more = len(listed) - CELLS_LISTED
    return Table(
        f"All {len(listed)} cells",
        ("cell", "id", "state"),
        tuple((cell.label, this, records.states[this].state) for this, cell in listed[:CELLS_LISTED]),
        f"{more} more are in plan.json." if more > 0 else "",
    )
