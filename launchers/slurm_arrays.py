"""Groups of cells -> job arrays: those that ask for the same together, several groups an element, no array too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from supar_sweep.sweep.arrays import ArrayFolder, Group
from supar_sweep.sweep.jobs import Job

from .slurm_config import SlurmConfig

T = TypeVar("T")

USUAL_MAX_ARRAY_SIZE = 1001
"""SLURM's default, for who plans away from the cluster."""


class Size(NamedTuple):
    """What a cell takes: memory in units of 1e9 bytes, training FLOPs of its whole run."""

    memory_gb: float = 0.0
    flops: float = 0.0


@dataclass
class Batch:
    """Elements that are to be one array.

    Args:
        config: what each of them asks for.
        elements: the groups of jobs of each.
        at_once: how many of them may run at once.
        array: its folder, where sbatch was asked and its answer lost.
    """

    config: SlurmConfig
    elements: list[list[Group]]
    at_once: int
    array: ArrayFolder | None = None

    @property
    def jobs(self) -> Iterator[Job]:
        """All of them."""
        return (job for groups in self.elements for group in groups for job in group)


def batches(
    groups: Sequence[Group],
    config: SlurmConfig,
    *,
    size: Callable[[Job], Size],
    threads: int | None,
    max_array_size: int,
) -> list[Batch]:
    """Return the arrays that groups of cells are submitted as.

    Args:
        groups: the jobs that one process trains together, in order.
        config: conf/launcher/slurm.yaml; `larger` says who asks for more.
        size: of a job's cell. The largest cell of a group speaks for all.
        threads: of each process; None = its share of the element's cores.
        max_array_size: elements of an array, at most.
    """
    alike: dict[int, list[Group]] = {}
    for group in groups:
        row = max(config.row_for(*size(job)) for job in group) if config.larger else 0
        alike.setdefault(row, []).append(group)
    found = []
    for row, members in alike.items():
        asked = config.with_row(row)
        n_threads = threads or asked.threads
        ready: list[Group] = [[with_threads(job, n_threads) for job in group] for group in members]
        found += [Batch(asked, chunk, 0) for chunk in parts(parts(ready, asked.processes), max_array_size)]
    shares = parallelism([len(batch.elements) for batch in found], config.array_parallelism)
    for batch, share in zip(found, shares, strict=True):
        batch.at_once = share
    return found


def with_threads(job: Job, threads: int) -> Job:
    """Return the job, to be trained with so many threads."""
    return {**job, "runtime": {**job["runtime"], "threads": threads}}


def parallelism(sizes: Sequence[int], at_once: int) -> list[int]:
    """Return how many elements of each array may run at once, so that all together are `at_once`, and each at least one.

    Args:
        sizes: elements of each array, >= 1.
        at_once: elements that may run at once, >= 1.

    >>> parallelism([1000, 1000, 500], 64)
    [26, 25, 13]
    >>> parallelism([3, 3], 1)
    [1, 1]
    """
    shares = []
    left, to_share = at_once, sum(sizes)
    for size in sizes:
        share = min(size, max(1, round(left * size / to_share)))
        shares.append(share)
        left, to_share = max(0, left - share), to_share - size
    return shares


def parts(items: Sequence[T], size: int) -> list[list[T]]:
    """Return the items in order as lists of `size`, the last one shorter.

    >>> parts("abcde", 2)
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
