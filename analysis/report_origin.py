"""Where a grid's numbers come from (study -> trial -> rules -> cells), and how to make them again."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from supar_sweep.config.schema import CellConfig
from supar_sweep.rules.hparams import HParams
from supar_sweep.rules.parameterization import RULES_VERSION
from supar_sweep.rules.transfer import role_hparams
from supar_sweep.sweep.identity import cell_id
from supar_sweep.sweep.submission import Plan
from supar_sweep.sweep.winner import Winner

from . import style
from .report_cost import device

Facts = tuple[tuple[str, str], ...]

GAPS = ("", "-", "reference")
"""What a cell of a column of numbers may hold instead of one."""


@dataclass(frozen=True)
class Table:
    """A table of plain text."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, and gaps between them: they are aligned to the right."""
        columns = ([row[i] for row in self.rows if row[i] not in GAPS] for i in range(len(self.columns)))
        return tuple(bool(values) and all(map(_is_number, values)) for values in columns)


def _is_number(text: str) -> bool:
    return text.lstrip("<>=+- ")[:1].isdigit()


@dataclass(frozen=True)
class Step:
    """One link of the lineage: what it is, which one, what is known of it."""

    kind: str
    name: str
    facts: Facts


@dataclass(frozen=True)
class Origin:
    """The lineage, the tuned values, what the rules made of them, and how to do it again. `warnings`: what does not fit."""

    steps: tuple[Step, ...]
    hparams: Table
    targets: Table
    commands: tuple[tuple[str, str], ...]
    facts: Facts
    software: Table
    warnings: tuple[str, ...]


def origin(
    plan: Plan,
    cells: Mapping[str, CellConfig],
    results: Mapping[str, Mapping[str, Any]],
    winner: Winner | None,
    report_argv: Sequence[str],
) -> Origin:
    """Return where the grid's numbers come from.

    Args:
        plan: the frozen grid.
        cells: its cells, decoded, by id.
        results: of the complete ones, by id.
        winner: what the study's best.yaml holds now; None where the grid names no study, or its file is gone.
        report_argv: the words that made this report.
    """
    named = plan.provenance.get("hparams") or {}
    warnings = _doubts(plan, cells, results, named, winner)
    same = winner is not None and _is_same(named, winner)
    used = winner if same else None
    return Origin(
        steps=(*_study_steps(named, used), _rules_step(plan, cells), _cells_step(plan, results)),
        hparams=_hparams(cells, used),
        targets=_targets(cells, used),
        commands=_commands(plan, used, report_argv),
        facts=_facts(plan, results),
        software=_software(results),
        warnings=tuple(warnings),
    )


def _is_same(named: Mapping[str, Any], winner: Winner) -> bool:
    return all(winner.lineage.get(key) == named.get(key) for key in ("study", "study_hash", "trial"))


def _doubts(
    plan: Plan,
    cells: Mapping[str, CellConfig],
    results: Mapping[str, Mapping[str, Any]],
    named: Mapping[str, Any],
    winner: Winner | None,
) -> Iterable[str]:
    if named.get("study") and winner is None:
        yield f"best.yaml of study {named['study']} is not in this runs folder: its lineage is not shown."
    if winner is not None and not _is_same(named, winner):
        yield (
            f"Study {named.get('study')} has a newer winner (trial {winner.lineage.get('trial')}) than the one of this grid "
            f"(trial {named.get('trial')}): what it holds now is not shown."
        )
    if plan.provenance.get("git_dirty"):
        yield f"The code had uncommitted changes (hash {plan.provenance['git_dirty']}): the commit alone does not hold it."
    if len({str(sorted(_software_of(each).items())) for each in results.values()}) > 1:
        yield "The cells were not all trained by the same code and versions; the table below lists them."
    if not _rules_are_ours(plan, cells):
        yield (
            f"The cells' ids are of another rule table or schema than this program's (rules version {RULES_VERSION}): the "
            "factors below are this program's, and need not be those that they were trained with."
        )
    prints = {planned.fingerprint for planned in plan.cells.values()}
    data = (winner.lineage.get("data") or {}) if winner is not None else {}
    if data.get("fingerprint") and prints - {data["fingerprint"]}:
        yield "The study was tuned on other data than the grid's: their fingerprints differ."


def _rules_are_ours(plan: Plan, cells: Mapping[str, CellConfig]) -> bool:
    """Return whether this program would give the cells the ids that they have: the rules' version is part of an id."""
    return all(cell_id(cells[this], planned.fingerprint) == this for this, planned in plan.cells.items())


def _study_steps(named: Mapping[str, Any], winner: Winner | None) -> Iterable[Step]:
    if winner is None:
        if named.get("study"):
            yield Step("Study", str(named["study"]), _known(hash=named.get("study_hash")))
            yield Step("Trial", str(named.get("trial", "unknown")), ())
        else:
            source = named.get("file")
            yield Step("Hyperparameters", str(source) if source else "as configured", (("study", "none recorded"),))
        return
    lineage = winner.lineage
    sampler, data = lineage.get("sampler") or {}, lineage.get("data") or {}
    yield Step(
        "Study",
        str(lineage.get("study", "unknown")),
        _known(
            trials=lineage.get("n_trials"),
            sampler=f"{sampler['name']}, seed {sampler.get('seed')}" if sampler.get("name") else None,
            loss=_metric(lineage.get("metric")),
            data=f"{data.get('name')} {str(data.get('fingerprint'))[:12]}" if data else None,
            hash=lineage.get("study_hash"),
        ),
    )
    value = lineage.get("value")
    own = next((c for c in lineage.get("confirmed") or () if c.get("trial") == lineage.get("trial")), None)
    confirmed = None
    if own and own.get("values"):
        mean = sum(own["values"]) / len(own["values"])
        confirmed = f"{mean:.4f}, mean of seeds {', '.join(map(str, own['seeds']))}"
    loss = f"{value:.4f}" if isinstance(value, float) else None
    yield Step("Trial", str(lineage.get("trial", "unknown")), _known(loss=loss, confirmed=confirmed))


def _rules_step(plan: Plan, cells: Mapping[str, CellConfig]) -> Step:
    names = dict.fromkeys(str(point["parameterization"]) for point in plan.points)
    depths = dict.fromkeys(cell.depth for cell in cells.values())
    version = f"version {RULES_VERSION}" if _rules_are_ours(plan, cells) else "another version"
    return Step("Rules", version, _known(table=", ".join(map(style.title, names)), depth=", ".join(depths)))


def _cells_step(plan: Plan, results: Mapping[str, Any]) -> Step:
    prints = dict.fromkeys(planned.fingerprint[:12] for planned in plan.cells.values())
    return Step(
        "Cells",
        str(len(plan.cells)),
        _known(complete=len(results), grid_points=len(plan.points), data=", ".join(prints)),
    )


def _known(**values: Any) -> Facts:
    return tuple((key.replace("_", " "), str(value)) for key, value in values.items() if value is not None)


def _metric(name: Any) -> str | None:
    return None if name is None else style.METRIC_NAMES.get(str(name), str(name)).lower()


def _hparams(cells: Mapping[str, CellConfig], winner: Winner | None) -> Table:
    """Return the base hyperparameters: the winner's, or those that all cells share."""
    space = (winner.lineage.get("space") or {}) if winner is not None else {}
    rows = []
    for name in (item.name for item in fields(HParams)):
        values = {getattr(cell.hparams, name) for cell in cells.values()}
        if winner is not None:
            value, searched = getattr(winner.hparams, name), space.get(name)
            low_high = (searched.get("low_log2"), searched.get("high_log2")) if isinstance(searched, Mapping) else None
            origin = f"searched, 2^{low_high[0]:g} to 2^{low_high[1]:g}" if low_high else "held fixed"
        else:
            value, origin = (values.pop(), "configured") if len(values) == 1 else (None, "swept in this grid")
        log2 = "-" if not value or value < 0 else f"{math.log2(value):.2f}"
        rows.append((name, "-" if value is None else f"{value:.6g}", log2, origin))
    heading = "Tuned hyperparameters, in base units" if winner is not None else "Hyperparameters, in base units"
    base = winner.base if winner is not None else next(iter(cells.values())).base
    note = "" if base is None else f"Base: width {base.width}, {base.n_layer} layers, dense."
    return Table(heading, ("name", "value", "log2", "from"), tuple(rows), note)


def _targets(cells: Mapping[str, CellConfig], winner: Winner | None) -> Table:
    """Return what the rules make of the base values for the hidden weights of each shape."""
    rows: dict[tuple[str, ...], None] = {}
    for cell in cells.values():
        hparams = cell.hparams if winner is None else winner.hparams
        ratios = cell.ratios()
        found = role_hparams("hidden", cell.method(), ratios, hparams, in_block=True, eps=cell.optimizer.eps)
        values = ("-", "-") if winner is None else (f"{found.lr:.4g}", f"{found.init_std:.4g}")
        rows[
            (
                style.title(cell.parameterization),
                str(cell.model.width),
                style.number(cell.density),
                str(cell.model.n_layer),
                f"{ratios.m_d:g}",
                style.number(ratios.m_rho),
                f"{ratios.m_L:g}",
                _factor(found.lr, hparams.lr),
                _factor(found.init_std, hparams.init_std),
                *values,
            )
        ] = None
    columns = ("", "width", "density", "layers", "m_d", "m_rho", "m_L", "lr x", "init_std x", "lr", "init_std")
    shown = columns if winner is not None else columns[:-2]
    return Table(
        "What the rules make of them: hidden weights",
        shown,
        tuple(row[: len(shown)] for row in rows),
        "lr x and init_std x are the factors on the base values"
        + ("; lr and init_std what the tuned values become." if winner is not None else "."),
    )


def _factor(value: float, base: float) -> str:
    return "-" if not base else f"{value / base:.4g}"


def command_text(argv: Sequence[str]) -> str:
    """Return a command line as a person would type it: without what the program itself gives Hydra.

    It clears an axis before it sets it (++key=null ++key=value): that is one word of the person's.
    """
    program, *words = map(str, argv)
    cleared = {word[2:].removesuffix("=null") for word in words if word.startswith("++") and word.endswith("=null")}
    own = []
    for word in words:
        key = word.removeprefix("++").partition("=")[0]
        if word.startswith(("hydra.", "hydra/")) or word == f"++{key}=null":
            continue
        own.append(word.removeprefix("++") if key in cleared else word)
    return " ".join([program, *map(shlex.quote, own)])


def _commands(plan: Plan, winner: Winner | None, report_argv: Sequence[str]) -> tuple[tuple[str, str], ...]:
    found = []
    sha = plan.provenance.get("git_sha")
    if sha:
        found.append(("the code", f"git checkout {sha}"))
    tuned = (winner.lineage.get("provenance") or {}).get("argv") if winner is not None else None
    if tuned:
        found.append(("the study", command_text(tuned)))
    if argv := plan.provenance.get("argv"):
        found.append(("the grid", command_text(argv)))
    found.append(("this report", command_text(report_argv)))
    merged: dict[str, list[str]] = {}
    for what, command in found:
        merged.setdefault(command, []).append(what)
    return tuple((" and ".join(whats), command) for command, whats in merged.items())


def _facts(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> Facts:
    provenance = plan.provenance
    data = Counter(
        (str(each.get("name")), str(each.get("fingerprint")), int(each.get("bytes") or 0))
        for each in (result.get("data") or {} for result in results.values())
        if each
    )
    shown = [f"{name}, {size:,} bytes, fingerprint {mark}" for name, mark, size in data]
    if not shown:
        shown = [f"fingerprint {mark}" for mark in dict.fromkeys(p.fingerprint for p in plan.cells.values())]
    dirty = provenance.get("git_dirty")
    runtime = ", ".join(f"{key}={_word(value)}" for key, value in plan.runtime.items())
    return (
        ("code", f"{provenance.get('git_sha') or 'no git checkout'}{' with uncommitted changes' if dirty else ''}"),
        ("submitted", f"{provenance.get('time', 'unknown')} on {provenance.get('host', 'unknown')}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in (provenance.get("versions") or {}).items())),
        ("data", "; ".join(shown)),
        ("runtime", runtime),
    )


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _software_of(result: Mapping[str, Any]) -> dict[str, str]:
    provenance = result.get("provenance") or {}
    sha = str(provenance.get("git_sha") or "-")[:12] + ("+" if provenance.get("git_dirty") else "")
    return {"commit": sha, **{name: str(v) for name, v in (result.get("versions") or {}).items()}}


def _software(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return which code, versions and devices trained how many of the complete cells."""
    counted = Counter((*_software_of(each).items(), ("device", device(each))) for each in results.values())
    names = tuple(dict.fromkeys(name for row in counted for name, _ in row))
    rows = tuple((*(dict(row).get(name, "-") for name in names), str(n)) for row, n in counted.most_common())
    return Table("What trained the complete cells", (*names, "cells"), rows, "A + after a commit: uncommitted changes.")
