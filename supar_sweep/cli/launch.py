"""Settings -> what training needs: a frozen plan, a launcher, a price for each cell. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from supar_sweep.cli.output import say
from supar_sweep.cli.rooms import PACKAGE, room
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import decode
from supar_sweep.config.fields import check_ranges, setting
from supar_sweep.config.schema import CellConfig, DataConfig, check_ranks
from supar_sweep.errors import ConfigError, RecordError
from supar_sweep.sweep.cohorts import Price
from supar_sweep.sweep.extension import Added, added_of, extended
from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.jobs import Launcher
from supar_sweep.sweep.submission import Experiment, Plan, make_plan, provenance
from supar_sweep.training.corpus import check_files, fingerprint, resolve
from supar_sweep.training.cost import flops_per_step, memory_gb, most_together, relative_cost, threads_for
from supar_sweep.training.environment import memory_of_machine_gb, versions, visible_gpus

LAUNCHERS = ("local", "slurm")


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """conf/launcher/local.yaml."""

    name: str = setting("local", choices=("local",))
    processes: int | None = setting("workers; null = cores // runtime.threads, or one a GPU", ge=1, le=1024)
    grace_s: float = setting("how long cells may take to save when stopped", ge=0, le=86_400)

    def __post_init__(self) -> None:
        check_ranges(self)


def make_launcher(settings: Settings) -> Launcher:
    """Return the launcher that the settings choose; the caller closes it (a context manager).

    Raises:
        ConfigError: an unknown launcher, or a setting that it does not have.
    """
    config, runtime = launcher_config(settings), settings.runtime()
    made: Launcher
    if not isinstance(config, LocalConfig):
        tell_environment(settings)
        size = sizes(settings)
        made = room("launchers.slurm").SlurmLauncher(
            config,
            threads=runtime.threads,
            folder=settings.runs_dir / "slurm",
            size=lambda job: size(decode(CellConfig, job["cell"])),
        )
        return made
    made = room("launchers.local").LocalLauncher(
        processes=processes_of(settings),
        threads=runtime.n_threads,
        gpus=list(gpus_for(runtime.device)),
        grace_s=config.grace_s,
        log_folder=settings.runs_dir / "logs",
    )
    return made


def processes_of(settings: Settings) -> int:
    """Return how many groups of cells the launcher trains at once, before there is one.

    Args:
        settings: after `with_threads`, where the launcher is this machine.
    """
    config, runtime = launcher_config(settings), settings.runtime()
    if not isinstance(config, LocalConfig):
        return int(config.array_parallelism * config.processes)
    cores = len(os.sched_getaffinity(0))
    a_gpu_each = len(gpus_for(runtime.device)) or int(trains_on_gpu(runtime.device))
    return config.processes or a_gpu_each or max(1, cores // runtime.n_threads)


def device_kind(settings: Settings) -> Literal["cpu", "cuda"]:
    """Return what cells will be trained on, as far as the settings and this machine tell."""
    config, device = launcher_config(settings), settings.runtime().device
    if isinstance(config, LocalConfig):
        return "cuda" if trains_on_gpu(device) else "cpu"
    return "cuda" if config.gpus_per_node and device != "cpu" else "cpu"


def with_threads(settings: Settings, cells: Collection[CellConfig]) -> Settings:
    """Return the settings with runtime.threads as asked; else 1, or more where fewer cells than cores are to be trained. On
    SLURM it is a process's share of its element's cores, and not set here where larger cells have another one.

    Args:
        settings: the settings.
        cells: that are to be trained at once, or one after another.
    """
    runtime = settings.runtime()
    if runtime.threads is not None:
        return settings
    config = launcher_config(settings)
    threads = 1
    if not isinstance(config, LocalConfig):
        threads, *others = {config.with_row(row).threads for row in range(len(config.larger) + 1)}
        if others:
            return settings
    elif cells and not trains_on_gpu(runtime.device):
        cores = len(os.sched_getaffinity(0))
        processes = min(config.processes or cores, len(cells))
        with suppress(ConfigError):  # of a cell that cannot be: its own failure comes later
            threads = min(threads_for(cell, cores // processes) for cell in cells)
    return replace(settings, plain={**settings.plain, "runtime": {**settings.plain["runtime"], "threads": threads}})


def trains_on_gpu(device: str, driver: Path = Path("/dev/nvidiactl")) -> bool:
    """Return whether workers will train on a GPU, without importing torch.

    Args:
        device: runtime.device.
        driver: a file that is there where NVIDIA's driver is.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return device == "cuda" or (device == "auto" and driver.exists() and not hidden)


@cache
def gpus_for(device: str) -> dict[str, float]:
    """Return the GPUs that workers will train on, as `visible_gpus` does; {} where they train on the CPU, or none is told.

    Args:
        device: runtime.device.
    """
    return visible_gpus() if trains_on_gpu(device) else {}


def launcher_config(settings: Settings) -> Any:
    """Return the launcher's own settings, checked. Raises ConfigError as `make_launcher`."""
    plain = settings.plain["launcher"]
    name = plain.get("name")
    if name not in LAUNCHERS:
        raise ConfigError("launcher.name", "no such launcher", value=name, allowed=LAUNCHERS, nearest_to=str(name))
    schema = LocalConfig if name == "local" else room("launchers.slurm_config").SlurmConfig
    if "launcher.name" in settings.given() and plain.keys() != {item.name for item in fields(schema)}:
        allowed = f"launcher={name}, which brings the settings that go with it"
        raise ConfigError(
            "launcher.name", "does not go with the launcher's other settings", value=name, allowed=allowed
        )
    defaults = {} if name == "local" else room("launchers.slurm_environment").taken(plain, os.environ)
    return decode(schema, {**plain, **defaults}, prefix="launcher")


def tell_environment(settings: Settings) -> None:
    """Say what the environment's variables for SLURM's commands come to: launcher=slurm only."""
    for line in room("launchers.slurm_environment").notes(settings.plain["launcher"], os.environ):
        say(line)


def experiment_of(settings: Settings) -> Experiment:
    """Return the grid's place in the runs folder. Raises ConfigError for an experiment that is no grid."""
    settings.refuse_check()
    return Experiment(settings.runs_dir, settings.experiment)


@dataclass(frozen=True)
class Grid:
    """A grid as it would be submitted now.

    Args:
        plan: with what `extend=true` added to it before.
        own: without.
        cells: of the plan, decoded, by id.
    """

    plan: Plan
    own: Plan
    cells: dict[str, CellConfig]


def grown(grid: Grid, plan: Plan) -> Grid:
    """Return the grid with a plan that holds more cells."""
    more = {this: decode(CellConfig, each.cell) for this, each in plan.cells.items() if this not in grid.cells}
    return replace(grid, plan=plan, cells={**grid.cells, **more})


def freeze(settings: Settings) -> Grid:
    """Return the grid of the settings, with what was added to its lines before: enumerated, checked, its data found and
    fingerprinted.

    Raises:
        ConfigError, GridError: settings or cells that cannot be.
        DataError: data that is missing, unreadable, or shorter than a batch.
    """
    name, runtime = settings.experiment, settings.runtime()
    launcher_config(settings)  # wrong settings of it come to light before anything starts
    found: dict[DataConfig, DataConfig] = {}
    points = []
    for point in settings.points():
        if point.cell.data not in found:
            found[point.cell.data] = resolve(point.cell.data)
        data = found[point.cell.data]
        same = data == point.cell.data
        points.append(point if same else GridPoint(point.axes, replace(point.cell, data=data)))
    plan = make_plan(
        name,
        points,
        runtime=runtime,
        fingerprint=fingerprint,
        provenance=submission_facts(settings),
    )
    cells = {row["cell_id"]: point.cell for row, point in zip(plan.points, points, strict=True)}
    check_corpora(cells.values())
    check_shares(settings, cells.values())
    check_targets(settings, cells.values())
    return grown(Grid(plan, plan, cells), extended(plan, _added_before(experiment_of(settings))))


def _added_before(experiment: Experiment) -> tuple[Added, ...]:
    """Return what was added to the experiment's grid by the runs before this one."""
    if not experiment.may_be_extended():
        return ()
    try:
        return added_of(experiment.plan())
    except RecordError:  # torn: `run` writes it anew, and extend=true finds the same values again, their cells done
        return ()


def check_corpora(cells: Iterable[CellConfig]) -> None:
    """Raise DataError for the first cell whose corpus is shorter than its batch or evaluation.

    A training function of the user's own may make do with less.
    """
    asked = {
        (cell.data, cell.train.batch_seqs, cell.model.context_tokens, cell.train.eval_seqs): None
        for cell in cells
        if cell.train.target is None
    }
    for data, batch_seqs, context_tokens, eval_seqs in asked:
        check_files(data, batch_seqs=batch_seqs, context_tokens=context_tokens, eval_seqs=eval_seqs)


def check_targets(settings: Settings, cells: Iterable[CellConfig]) -> None:
    """Raise ConfigError for a training function whose package is not there. It is not imported: that may take seconds.

    Workers look for it where this process does. Commands of the job's own (launcher.setup) may add places that only they see.

    Args:
        settings: which launcher.
        cells: that are to be trained.
    """
    if getattr(launcher_config(settings), "setup", ()):
        return
    for target in dict.fromkeys(cell.train.target for cell in cells):
        if target is not None and find_spec(target.partition(".")[0]) is None:
            allowed = "package.module.function, importable here and where the cell runs: installed, or its folder in PYTHONPATH"
            raise ConfigError("train.target", "cannot be found", value=target, allowed=allowed)


def check_shares(settings: Settings, cells: Iterable[CellConfig]) -> None:
    """Raise ConfigError for the first cell whose batches the launcher's processes cannot share.

    Args:
        settings: which launcher.
        cells: that are to be trained.
    """
    ranks_of, cohort = ranks_for(settings), settings.runtime().cohort
    for cell in cells:
        ranks = ranks_of(cell)
        if ranks > 1 and cohort not in (None, 1):
            problem = f"has no effect where {ranks} processes train each cell together (launcher.nodes, gpus_per_node)"
            raise ConfigError("runtime.cohort", problem, value=cohort, allowed="1 or null")
        check_ranks(cell, ranks)


def ranks_for(settings: Settings) -> Callable[[CellConfig], int]:
    """Return what says how many processes train a cell together.

    Args:
        settings: which launcher.
    """
    config = launcher_config(settings)
    if isinstance(config, LocalConfig):
        return lambda cell: 1
    size = sizes(settings)
    by_row = [int(config.with_row(row).ranks) for row in range(len(config.larger) + 1)]
    return lambda cell: by_row[config.row_for(*size(cell)) if config.larger else 0]


def say_other_optimizer(settings: Settings, cells: Iterable[CellConfig]) -> None:
    """Say where hyperparameters that were tuned with one optimizer train cells with another: no rule carries them over.

    Args:
        settings: with what is known of the proxy.
        cells: that are to be trained.
    """
    if settings.winner and settings.winner.lineage.get("proxy"):
        proxy = decode(CellConfig, settings.winner.lineage["proxy"], prefix="lineage.proxy")
        tuned: str | None = proxy.optimizer.name
    else:
        tuned = (settings.plain.get("tuned_at") or {}).get("optimizer_name")
    if tuned is None or "hparams.lr" in settings.given():
        return
    lr = settings.cell().hparams.lr  # an axis may give others
    if others := {str(cell.optimizer.name) for cell in cells if cell.hparams.lr == lr} - {tuned}:
        say(
            f"warning: the hyperparameters were tuned with {tuned}, and their lr is not one for {', '.join(sorted(others))}"
        )


def submission_facts(settings: Settings) -> dict[str, Any]:
    """Return the provenance of a submission: code, versions, command, hyperparameters' origin."""
    facts = provenance(PACKAGE, versions())
    if settings.winner is not None:
        lineage = settings.winner.lineage
        facts["hparams"] = {
            "file": settings.plain.get("hparams_file"),
            **{key: lineage[key] for key in ("study", "study_hash", "trial") if key in lineage},
        }
    return facts


def flops(cell: CellConfig, *, dense_compute: bool = False) -> float:
    """Return the training FLOPs of a whole run of the cell."""
    return float(cell.train.steps) * flops_per_step(cell, dense_compute=dense_compute)


def price(settings: Settings, processes: int) -> Callable[[CellConfig], Price]:
    """Return what says of a cell what it costs beside others, and with how many of its shape it is trained.

    Args:
        settings: runtime.cohort decides where it is set, else shape and memory.
        processes: of the launcher, which share the memory where they are on this machine.
    """
    runtime, config = settings.runtime(), launcher_config(settings)
    size = sizes(settings)
    if isinstance(config, LocalConfig):
        gpus_gb = gpus_for(runtime.device).values()
        # of the machine a fifth is left to others; a GPU's processes share it
        all_gb = min(gpus_gb) * len(gpus_gb) if gpus_gb else memory_of_machine_gb()
        here = _Place("cuda" if gpus_gb else "cpu", 0.8 * all_gb / processes)

    def place(cell: CellConfig) -> _Place:
        if isinstance(config, LocalConfig):
            return here
        row = config.row_for(*size(cell)) if config.larger else 0
        asked = config.with_row(row)
        if asked.gpus_per_node and runtime.device != "cpu":
            return _Place("cuda", 0.8 * asked.gpu_memory_gb / (asked.processes_per_gpu or 1), row, asked.ranks > 1)
        return _Place("cpu", 0.8 * (asked.mem_gb or 0.0) / asked.processes, row, asked.ranks > 1)

    # what the price depends on; thousands of cells share a few of these
    known: dict[Any, Price] = {}

    def of(cell: CellConfig) -> Price:
        key = (*shape_key(cell), cell.data)
        if key not in known:
            known[key] = Price()
            with suppress(ConfigError):  # a layer without a live weight: the cell's own failure, not the grid's
                known[key] = priced(cell)
        return known[key]

    def priced(cell: CellConfig) -> Price:
        where = place(cell)
        return Price(
            cost=relative_cost(cell, compact=runtime.compute != "dense" and not runtime.compile),
            # what training.cohort.stack_key asks for, as far as the settings know it
            shape=(
                cell.model,
                cell.data,
                cell.train.batch_seqs,
                cell.train.accumulation_steps,
                cell.train.precision,
                cell.train.target,
                where.row,
            ),
            together=together(cell, where),
        )

    def together(cell: CellConfig, where: _Place) -> int:
        if cell.train.target is not None or runtime.compile or where.over_ranks:
            return 1
        return runtime.cohort or most_together(cell, device=where.device, free_gb=where.free_gb)

    return of


class _Place(NamedTuple):
    """Where a cell is trained.

    Args:
        device: "cpu" or "cuda".
        free_gb: memory for its process there.
        row: of `larger`, by which it asks for that.
        over_ranks: several processes train it together.
    """

    device: str
    free_gb: float
    row: int = 0
    over_ranks: bool = False


def sizes(settings: Settings) -> Callable[[CellConfig], tuple[float, float]]:
    """Return what says how large a cell is: GB of its training and FLOPs of all of it, as `plan` prints them; zeros for a cell
    that cannot be, whose own failure comes later.

    Args:
        settings: runtime.compute=compact counts live weights alone.
    """
    compact = settings.runtime().compute == "compact"
    known: dict[Any, tuple[float, float]] = {}

    def of(cell: CellConfig) -> tuple[float, float]:
        key = shape_key(cell)
        if key not in known:
            known[key] = (0.0, 0.0)
            with suppress(ConfigError):
                known[key] = (memory_gb(cell, compact=compact), flops(cell))
        return known[key]

    return of


def shape_key(cell: CellConfig) -> tuple[Any, ...]:
    """Return what parameters, FLOPs and memory of a cell depend on."""
    optimizer = (cell.optimizer.name, cell.optimizer.momentum)
    masks = (cell.density, cell.layer_density, cell.sparsity)
    return (cell.model, cell.train, *masks, cell.data.n_vocab, optimizer)
