"""conf/launcher/slurm.yaml: what an array asks SLURM for. No torch, no submitit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from supar_sweep.config.decode import decode, encode
from supar_sweep.config.fields import check_ranges, setting
from supar_sweep.errors import ConfigError

SET_ELSEWHERE: Mapping[str, str] = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus",
    "mem": "mem_gb",
    "time": "timeout_min",
    "array": "array_parallelism",
    "signal": "signal_delay_s",
}
"""sbatch's options that a key of their own sets."""

FIXED = (
    *("job-name", "output", "error", "open-mode", "requeue", "no-requeue", "wrap", "parsable", "wait", "test-only"),
    *("ntasks", "help", "usage", "version", "clusters"),
)
"""Those that the launcher needs as they are."""


MINUTES_A_YEAR = 365 * 24 * 60
SECONDS_A_DAY = 24 * 60 * 60
MAX_ELEMENTS = 4_000_000
"""More than SLURM takes: its MaxArraySize ends there."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Which cells a row of `larger` is for: those that exceed all of its bounds."""

    above_gb: float = setting("memory of the training, in units of 1e9 bytes, as `plan` prints it", default=0.0, ge=0)
    above_flops: float = setting("FLOPs of the whole training, as `plan` prints them", default=0.0, ge=0)

    def __post_init__(self) -> None:
        check_ranges(self)


BOUNDS = tuple(item.name for item in fields(Bounds))
OF_ALL = ("name", "wait", "array_parallelism", "max_elements", "poll_s", "grace_s", "larger")
"""Settings of the launcher, and not of an element."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """conf/launcher/slurm.yaml."""

    name: str = setting("slurm", choices=("slurm",))
    wait: bool = setting("follow the jobs to their end; false: submit, and return at once")
    partition: str | None = setting("partition; null = SBATCH_PARTITION, or the cluster's default")
    account: str | None = setting("account; null = SBATCH_ACCOUNT, or yours by default")
    qos: str | None = setting("quality of service; null = SBATCH_QOS, or the default")
    constraint: str | None = setting("features that a node must have; null = any node")
    nodes: int = setting("nodes of an element; on several, all train each cell together", ge=1, le=10_000)
    tasks_per_node: int | None = setting(
        "processes on each node that train a cell together; null = one a GPU, or one", ge=1, le=1024
    )
    gpus_per_node: int | None = setting("GPUs of an element on each node; null = none asked for", ge=1, le=128)
    processes_per_gpu: int | None = setting(
        "processes on each GPU of an element, or on its cores, each with cells of its own; null = one for the element, or ranks",
        ge=1,
        le=1024,
    )
    gpu_memory_gb: float | None = setting(
        "memory of a GPU: how many small cells fit; null without GPUs", gt=0, le=10_000
    )
    cpus: int = setting("cores of each process", ge=1, le=10_000)
    mem_gb: float | None = setting(  # sbatch counts in MB, and takes 0 for all that the node has
        "memory of an element on each node; null = the partition's default", ge=0.001, le=100_000
    )
    timeout_min: int = setting("time limit; a cell that reaches it is saved and requeued", ge=1, le=MINUTES_A_YEAR)
    array_parallelism: int = setting("elements that run at once", ge=1, le=MAX_ELEMENTS)
    max_elements: int = setting("elements in the queue at once, the running ones counted", ge=1, le=MAX_ELEMENTS)
    signal_delay_s: int = setting("how long before the time limit cells are told to save", ge=1, le=65_535)
    poll_s: float = setting("seconds between two looks at the queue", ge=0.1, le=SECONDS_A_DAY)
    grace_s: float = setting("how long a file of an ended job may take to be seen here", ge=0, le=SECONDS_A_DAY)
    setup: tuple[str, ...] = setting("shell commands of the job, before Python starts")
    sbatch: Mapping[str, Any] = setting("any further option of sbatch, by its own name")
    larger: tuple[Mapping[str, Any], ...] = setting(
        "what larger cells ask for: rows of bounds, and of settings instead"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for key in ("partition", "account", "qos", "constraint"):
            _check_one_line(key, getattr(self, key))
        for index, line in enumerate(self.setup):
            _check_one_line(f"setup[{index}]", line.replace("\n", " ").replace("\t", " "))
        for name, value in self.sbatch.items():
            _check_one_line(f"sbatch.{name}", value if isinstance(value, str) else None)
            dashed = name.replace("_", "-")
            if dashed in SET_ELSEWHERE:
                raise ConfigError(f"sbatch.{name}", f"is set by launcher.{SET_ELSEWHERE[dashed]}", value=value)
            if dashed in FIXED:
                raise ConfigError(f"sbatch.{name}", "is the launcher's own", value=value)
            if not isinstance(value, (str, int, float)) or value is False:
                raise ConfigError(
                    f"sbatch.{name}", "must be text, a number, or true for an option without a value", value=value
                )
        if (self.gpu_memory_gb is None) != (self.gpus_per_node is None):
            allowed = "a number with gpus_per_node, null without"
            raise ConfigError(
                "gpu_memory_gb", "does not go with gpus_per_node", value=self.gpu_memory_gb, allowed=allowed
            )
        if self.gpus_per_node is not None and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                "tasks_per_node",
                f"does not go with gpus_per_node={self.gpus_per_node}: a process has one GPU, and every GPU a process",
                value=self.tasks_per_node,
                allowed="null",
            )
        if self.processes_per_gpu and (self.nodes > 1 or self.tasks_per_node):
            key = "nodes" if self.nodes > 1 else "tasks_per_node"
            problem = "has all processes train each cell together, and processes_per_gpu gives each cells of its own"
            allowed = "1" if self.nodes > 1 else "null"
            raise ConfigError(key, problem, value=getattr(self, key), allowed=f"{allowed}, or processes_per_gpu=null")
        if self.signal_delay_s >= self.timeout_min * 60:
            raise ConfigError(
                "signal_delay_s", "leaves no time before it", value=self.signal_delay_s, allowed="< 60 * timeout_min"
            )

        for index, row in enumerate(self.larger):
            self._check_row(index, row)

    def _check_row(self, index: int, row: Mapping[str, Any]) -> None:
        """Raise ConfigError where a row of `larger` says what cannot be, or nothing."""
        where, settings = f"larger[{index}]", [item.name for item in fields(self) if item.name not in OF_ALL]
        for key in row:
            if key not in (*BOUNDS, *settings):
                problem = "is the same for all cells" if key in OF_ALL else "unknown key"
                known = (*BOUNDS, *settings)
                raise ConfigError(f"{where}.{key}", problem, value=row[key], allowed=known, nearest_to=str(key))
        if not row.keys() & {*BOUNDS} or not row.keys() - {*BOUNDS}:
            allowed = f"one of {', '.join(BOUNDS)}, and what cells above it ask for, such as mem_gb"
            raise ConfigError(where, "needs a bound and a setting", value=dict(row), allowed=allowed)
        if self.with_row(index + 1) == self.with_row(0):
            raise ConfigError(where, "has no effect: it asks for what all cells ask for", value=dict(row))
        mine = self._bounds[index]
        for later, other in enumerate(self._bounds[index + 1 :], index + 1):
            if other.above_gb <= mine.above_gb and other.above_flops <= mine.above_flops:
                problem = f"has no effect: larger[{later}] is for all of its cells too, and the last one counts"
                raise ConfigError(where, problem, value=dict(row), allowed="rows in rising order of their bounds")

    @cached_property
    def _bounds(self) -> tuple[Bounds, ...]:
        plain = [{key: value for key, value in row.items() if key in BOUNDS} for row in self.larger]
        return tuple(decode(Bounds, bounds, prefix=f"larger[{index}]") for index, bounds in enumerate(plain))

    def row_for(self, memory_gb: float, flops: float) -> int:
        """Return by which row of `larger` a cell of this size asks: the last one whose bounds it exceeds, from 1; 0 = by none.

        Args:
            memory_gb: of the cell's training, in units of 1e9 bytes.
            flops: of its whole training.
        """
        rows = enumerate(self._bounds, 1)
        return max((row for row, over in rows if memory_gb > over.above_gb and flops > over.above_flops), default=0)

    def with_row(self, row: int) -> SlurmConfig:
        """Return what a cell asks for that asks by this row of `larger`.

        Args:
            row: from 1; 0 = by none.
        """
        changes = {key: value for key, value in self.larger[row - 1].items() if key not in BOUNDS} if row else {}
        return decode(
            SlurmConfig, {**encode(self), "larger": (), **changes}, prefix=f"larger[{row - 1}]" if row else ""
        )

    @property
    def processes(self) -> int:
        """How many groups of cells an element trains side by side, a process each."""
        return self.processes_per_gpu * (self.gpus_per_node or 1) if self.processes_per_gpu else 1

    @property
    def threads(self) -> int:
        """The cores of each of these processes, at least one."""
        return max(1, self.cpus // self.processes)

    @property
    def ranks_per_node(self) -> int:
        """Tasks of SLURM's on each node of an element."""
        return 1 if self.processes_per_gpu else self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Processes that train a cell together."""
        return self.nodes * self.ranks_per_node

    @property
    def further_options(self) -> list[tuple[str, str]]:
        """The further options of sbatch that all cells, or those of a row of `larger`, ask for: their keys and names."""
        rows = {f"larger[{index}].": row.get("sbatch") or {} for index, row in enumerate(self.larger)}
        return [
            (f"launcher.{row}sbatch.{name}", name) for row, more in {"": self.sbatch, **rows}.items() for name in more
        ]

    def check_options(self, known: Collection[str]) -> None:
        """Raise ConfigError for the first further option that sbatch does not have.

        Args:
            known: the options that it has (`options_in`).
        """
        allowed = sorted(set(known) - SET_ELSEWHERE.keys() - {*FIXED})
        for key, name in self.further_options:
            if name.replace("_", "-") not in known:
                raise ConfigError(key, "no such option of sbatch", allowed=allowed, nearest_to=name)


def is_one_line(text: str) -> bool:
    """Return whether a text has no line break and no other control character.

    >>> is_one_line("gpu-long"), is_one_line("gpu\\nlong")
    (True, False)
    """
    return re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text) is None


def _check_one_line(key: str, value: str | None) -> None:
    if value is not None and not is_one_line(value):
        problem = "has a line break or another control character in it, which sbatch would read as something else"
        raise ConfigError(key, problem, value=value, allowed="one line")


def options_in(usage: str) -> set[str]:
    """Return the names of the long options that a `sbatch --help` lists, those of the site's plugins among them.

    >>> sorted(options_in("  -a, --array=indexes  job array\\n      --bb=<spec>  burst\\n  --exclusive[=user] alone, see --bb"))
    ['array', 'bb', 'exclusive']
    """
    return set(re.findall(r"^\s+(?:-\w, )?--([a-z][a-z0-9-]*)", usage, re.MULTILINE))
