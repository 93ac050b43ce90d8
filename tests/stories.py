"""Stories told side by side on one cluster: most of what they do is wait, for SLURM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from tests.clusters import Cluster

T = TypeVar("T")


@dataclass
class Stories(Generic[T]):
    """The stories of a module. All begin at once, in a runs folder each; a test asks for one by its function, and gets what it
    returns.
    """

    tellers: list[Callable[[Cluster, Path], T]] = field(default_factory=list)

    def __call__(self, teller: Callable[[Cluster, Path], T]) -> Callable[[Cluster, Path], T]:
        """Add a story (a decorator)."""
        self.tellers.append(teller)
        return teller

    @contextmanager
    def told(
        self, slurm: Cluster, folders: pytest.TempPathFactory
    ) -> Iterator[Callable[[Callable[[Cluster, Path], T]], T]]:
        """Begin all stories, and give the function that returns what came of one. Asked for a second time (its test runs
        again), a story is told again.
        """
        futures: dict[str, Future[T]] = {}
        heard: set[str] = set()

        def begin(teller: Callable[[Cluster, Path], T]) -> None:
            futures[teller.__name__] = threads.submit(teller, slurm, folders.mktemp(teller.__name__[:40]))

        def result(teller: Callable[[Cluster, Path], T]) -> T:
            name = teller.__name__
            if name in heard:
                begin(teller)
            heard.add(name)
            return futures[name].result()

        with ThreadPoolExecutor(len(self.tellers)) as threads:
            for teller in self.tellers:
                begin(teller)
            yield result
