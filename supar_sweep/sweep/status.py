"""What the records say of each cell, read from the runs' own files. No torch.

States: done, diverged (complete); running (a live process holds the cell); oom, timeout, failed,
cancelled (how its last attempt ended); stale (its process died without a word); corrupt (a record
that cannot be read: `run` moves a torn result aside, and trains again); pending (a live `run` will come to it, or it is in a
cluster's queue); held (so, and somebody holds it there); missing (never begun).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from supar_sweep.errors import RecordError
from supar_sweep.sweep.pace import Spent, spent
from supar_sweep.sweep.records import COMPLETE_ENDS, CellFolder, End, Store
from supar_sweep.sweep.submission import Experiment, Plan

STATES = (
    *COMPLETE_ENDS,
    *("running", "pending", "held", "missing"),
    *("failed", "oom", "timeout", "cancelled", "stale", "corrupt"),
)
"""Every state, in the order of a table's columns: data, under way, to be tried again."""

MOST_ROWS = 200
"""A table of `status` for people has no more rows: about what a terminal can be scrolled through."""

_ENDS = frozenset(get_args(End))


class CellState(NamedTuple):
    """Where a cell stands.

    Args:
        state: one of STATES.
        message: one line on the cause; "" where the state says it all.
        attempts: how often it was begun.
        log: the traceback or folder to look into; "" where there is none.
        spent: what a complete one took; None else.
    """

    state: str
    message: str = ""
    attempts: int = 0
    log: str = ""
    spent: Spent | None = None

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state in COMPLETE_ENDS


def cell_state(folder: CellFolder) -> CellState:
    """Return where the cell stands. Whatever its files hold, one bad cell hides no other.

    Args:
        folder: the cell's folder; it need not exist.
    """
    try:
        if (result := folder.result()) is not None:
            return _complete(result)
        locked = folder.is_locked()
        attempts = folder.attempts()
        if locked:
            return CellState("running", attempts=len(attempts))
        if not attempts:
            return CellState("missing")
        end = (folder.last_end() or {}).get("end")
        # the process that held the cell may have published, and left, since the first look
        if (result := folder.result()) is not None:
            return _complete(result)
        message = str((folder.last_end() or {}).get("message", ""))
    except RecordError as error:
        return CellState("corrupt", str(error), log=str(folder.path))
    log = attempts[-1] / "log.txt"
    where = str(log if log.exists() else attempts[-1])
    if end in COMPLETE_ENDS:
        return CellState("stale", "its result.json is gone", len(attempts), where)
    if end not in _ENDS:
        return CellState("stale", "its process died without a word", len(attempts), where)
    return CellState(str(end), message, len(attempts), where)


def _complete(result: Mapping[str, Any]) -> CellState:
    return CellState(result["end"], attempts=int(result.get("attempt", 1)), spent=spent(result))


def set_aside_torn(folder: CellFolder, state: CellState) -> bool:
    """Move a torn result out of the way of a new one; return whether there was one.

    Args:
        folder: the cell's folder.
        state: where the cell stands.

    Raises:
        RecordError: that is impossible.
    """
    torn = state.state == "corrupt" and (folder.path / "result.json").exists()
    if torn:
        folder.set_aside_result()
    return torn


def states(experiment: Experiment, plan: Plan, known: Mapping[str, CellState] | None = None) -> dict[str, CellState]:
    """Return where each cell of the plan stands, by id.

    Args:
        experiment: the place of the plan; a live `run` of it turns missing cells into pending ones.
        plan: the plan.
        known: what an earlier call returned: cells that were complete then are not read again.
    """
    alive = experiment.runner() is not None
    complete = {this: state for this, state in (known or {}).items() if state.complete}
    index = experiment.store.index()
    found = {
        this: complete.get(this) or (cell_state(index[this]) if this in index else CellState("missing"))
        for this in plan.cells
    }
    if not alive:
        return found
    return {
        this: state._replace(state="pending") if state.state == "missing" else state for this, state in found.items()
    }


def folders(store: Store, plan: Plan) -> dict[str, CellFolder]:
    """Return the folder of each cell of a plan by id, existing or not, after one walk over the
    store.
    """
    index = store.index()
    return {
        this: index.get(this) or CellFolder(store.root / this[:2] / f"{cell.label}-{this}")
        for this, cell in plan.cells.items()
    }


def status_counts(plan: Plan, found: Mapping[str, CellState], by: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return one row a group of grid points: its values, `n`, and how many are in each state.

    Args:
        plan: the plan.
        found: state of each cell, by id.
        by: columns to group by (an axis, or one of submission.facts); none = one row over the
            distinct cells.
    """
    if not by:
        return [_count({}, (found[this].state for this in plan.cells))]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for point in plan.points:
        groups.setdefault(tuple(point.get(key) for key in by), []).append(point["cell_id"])
    return [
        _count(dict(zip(by, values, strict=True)), (found[this].state for this in cells))
        for values, cells in groups.items()
    ]


def folded_counts(plan: Plan, found: Mapping[str, CellState], by: Sequence[str]) -> list[dict[str, Any]]:
    """Return `status_counts` in at most MOST_ROWS rows: where there are more, the axes with the most values are told in words.

    Args:
        plan, found, by: as for `status_counts`.
    """
    kept, folded = list(by), list[str]()
    groups = status_counts(plan, found, kept)
    while len(groups) > MOST_ROWS and kept:
        longest = max(kept, key=lambda key: len({point.get(key) for point in plan.points}))
        kept.remove(longest)
        folded.append(longest)
        groups = status_counts(plan, found, kept)
    if not folded:
        return groups
    values: dict[tuple[Any, ...], dict[str, set[Any]]] = {}
    for point in plan.points:
        of_group = values.setdefault(tuple(point.get(key) for key in kept), {axis: set() for axis in folded})
        for axis in folded:
            of_group[axis].add(point.get(axis))
    return [
        {**{axis: _in_words(those) for axis, those in values[tuple(group.get(key) for key in kept)].items()}, **group}
        for group in groups
    ]


def _in_words(values: set[Any]) -> str:
    if len(values) > 1 and all(isinstance(value, int | float) for value in values):
        return f"{len(values)} values, {min(values):g} to {max(values):g}"
    return f"{len(values)} values" if len(values) > 1 else str(*values)


def _count(group: dict[str, Any], members: Iterable[str]) -> dict[str, Any]:
    counts = dict.fromkeys(STATES, 0)
    for state in members:
        counts[state] += 1
    return {**group, "n": sum(counts.values()), **counts}


def first_errors(plan: Plan, found: Mapping[str, CellState]) -> list[dict[str, Any]]:
    """Return one row a kind of trouble: state, how many cells, and the first one's message and log, with how often it was begun.

    Args:
        plan: the plan.
        found: state of each cell, by id.
    """
    rows: dict[str, dict[str, Any]] = {}
    for this, state in found.items():
        if not state.message:
            continue
        tries = f"; begun {state.attempts} times" if state.attempts > 1 else ""
        first = {
            "cell": f"{plan.cells[this].label}-{this}",
            "message": state.message + tries,
            "attempts": state.attempts,
        }
        row = rows.setdefault(state.state, {"state": state.state, "n": 0, **first, "log": state.log})
        row["n"] += 1
    return list(rows.values())


def rows(experiment: Experiment, plan: Plan) -> list[dict[str, Any]]:
    """Return one row a grid point, for analysis.

    Each holds parameterization, width, density, n_layer, lr, init_std, seed, the axes' values,
    cell_id, `end` (a state) and train_loss, val_loss, last_finite_loss (None where there is none).
    Points that share a cell get a row each.

    Args:
        experiment: the place of the plan.
        plan: the plan.
    """
    losses = {}
    for this, folder in folders(experiment.store, plan).items():
        try:
            result = folder.result()
        except RecordError:
            result = None
        if result is None:
            end, summary = cell_state(folder).state, {}
        else:
            end, summary = result["end"], result.get("summary", {})
        names = ("train_loss", "val_loss", "last_finite_loss")
        losses[this] = {"end": end, **{name: summary.get(name) for name in names}}
    return [{**point, **losses[point["cell_id"]]} for point in plan.points]
