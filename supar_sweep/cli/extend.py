"""`supar-sweep run extend=true`: after the grid, the values that would settle its censored optima, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from supar_sweep.cli.launch import Grid, experiment_of, flops, grown, launcher_config, shape_key
from supar_sweep.cli.output import say
from supar_sweep.cli.plot import metric_of
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import decode
from supar_sweep.config.fields import check_ranges, setting
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.extension import Budget, Wanted, added_of, extend, idle
from supar_sweep.sweep.status import rows
from supar_sweep.sweep.submission import PlannedCell


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """conf/run.yaml: what may be added to a grid in all, over all calls."""

    max_flops_mult: float | None = setting("FLOPs of what is added, in those of the grid itself; null = no bound", gt=0)
    max_cells: int | None = setting("cells that are added; null = no bound", ge=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_flops_mult is None and self.max_cells is None:
            raise ConfigError(
                "max_cells", "and max_flops_mult are both null", allowed="a bound: some optima have no end"
            )


@dataclass(frozen=True)
class Extension:
    """What extend=true asks for.

    Args:
        settings: of the command.
        budget: of the settings.
        metric: the loss whose optima count: train_loss or val_loss.
    """

    settings: Settings
    budget: BudgetConfig
    metric: str

    @staticmethod
    def asked(settings: Settings) -> Extension | None:
        """Return what is asked for; None where extend is false.

        Raises:
            ConfigError: settings that cannot be, or that have no effect.
        """
        plain = settings.plain
        if not isinstance(plain["extend"], bool):
            raise ConfigError("extend", "must be true or false", value=plain["extend"])
        budget = decode(BudgetConfig, plain["budget"], prefix="budget")
        if not plain["extend"]:
            for key in settings.given("budget", "metric"):
                raise ConfigError(key, "has no effect without extend=true")
            return None
        metric = metric_of(settings)
        if not getattr(launcher_config(settings), "wait", True):
            raise ConfigError(
                "extend",
                "looks at results, and launcher.wait=false leaves before there are any",
                value=True,
                allowed="together with launcher.wait=true, now or when the cells are done: they are not trained again",
            )
        return Extension(settings, budget, metric)

    def next(self, grid: Grid) -> Grid | None:
        """Return the grid with the values of one more round; None where no optimum is censored, or the budget is spent.

        Args:
            grid: with what was added before; its cells were tried.
        """
        table = room("analysis.frames").frame(rows(experiment_of(self.settings), grid.plan))
        wanted, waiting = room("analysis.extension").wanted(table, self.metric)
        if waiting:
            say(
                f"extend: {len(waiting)} lines have runs without a result and are not looked at, the first: {waiting[0]}"
            )
        flops_of = _flops_of()
        mult = self.budget.max_flops_mult
        own_flops = sum(map(flops_of, grid.own.cells.values()))
        budget = Budget(self.budget.max_cells, None if mult is None else mult * own_flops)
        plan, stopped = extend(grid.plan, grid.own, wanted, budget, flops_of)
        before, after = added_of(grid.plan), added_of(plan)
        spent = [flops_of(cell) for this, cell in plan.cells.items() if this not in grid.own.cells]
        used = f"{len(spent)} cells and {sum(spent):.3g} FLOPs in all, of {_budget_text(budget)}"
        if len(after) == len(before):
            _say_end(wanted, stopped, waiting, used)
            return None
        n_new = len(plan.cells) - len(grid.plan.cells)
        say(f"extend, round {after[-1].round}: {n_new} cells more ({used})")
        for line in wanted:
            values = [
                f"{each.value:.4g}" for each in after[len(before) :] if each.of == line.of and each.line == line.line
            ]
            if values:
                say(f"  {line.line}: {line.axis} {', '.join(values)}; {line.why}")
        return grown(grid, plan)


def say_idle(grid: Grid) -> None:
    """Say which of the values that were added to the grid have no effect, because its settings have changed since."""
    if found := idle(grid.plan):
        lines = ", ".join(dict.fromkeys(each.line for each in found))
        say(f"note: {len(found)} values that extend=true added are of lines that this grid has not: {lines}")


def _say_end(wanted: Sequence[Wanted], stopped: Sequence[Wanted], waiting: Sequence[str], used: str) -> None:
    for line in wanted:
        say(f"extend: still censored: {line.line} ({line.why})")
    if stopped:
        say(f"extend: the budget is spent: {used}; budget.max_flops_mult and budget.max_cells set it")
    elif not wanted and not waiting:
        say("extend: no optimum is censored")


def _budget_text(budget: Budget) -> str:
    bounds = [] if budget.max_cells is None else [f"{budget.max_cells} cells"]
    return " and ".join([*bounds, *([] if budget.max_flops is None else [f"{budget.max_flops:.3g} FLOPs"])])


def _flops_of() -> Callable[[PlannedCell], float]:
    """Return what says how many FLOPs a cell's whole run takes; counted once a shape."""
    known: dict[Any, float] = {}

    def of(planned: PlannedCell) -> float:
        cell = decode(CellConfig, planned.cell)
        key = shape_key(cell)
        if key not in known:
            known[key] = flops(cell)
        return known[key]

    return of
