"""Which cells a process is given together: those of one shape, fewer towards the end of a grid. No torch."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count

SHARES = 2
"""A group takes at most this part of a process's fair share of what is left, so that the last groups are small and no process
ends long before the others.
"""


@dataclass(frozen=True)
class Price:
    """What a cell costs, and what it can be trained with.

    Args:
        cost: relative to other cells, > 0.
        shape: equal for cells that can share a forward pass.
        together: how many of these are worth giving to one process at once, >= 1.
    """

    cost: float = 1.0
    shape: Hashable = None
    together: int = 1


class Queue:
    """Cells that wait for a process, the dearest first. Taking all of them costs time in proportion to their number.

    Args:
        cells: cell_ids; cells of one cost keep their order.
        prices: of each cell, also of those that are put back later.
        alone: cells that must not share a process.
    """

    def __init__(self, cells: Iterable[str], prices: Mapping[str, Price], alone: Iterable[str] = ()) -> None:
        self._prices = prices
        self._alone = set(alone)
        self._places = count()
        self._place: OrderedDict[str, int] = OrderedDict()
        # shape -> together -> the cells that may share a process, in the queue's order
        self._lanes: dict[Hashable, dict[int, deque[str]]] = {}
        # exact, as it grows and shrinks by one cell after another
        self._cost = Fraction(0)
        for cell_id in sorted(cells, key=lambda cell_id: -prices[cell_id].cost):
            self._append(cell_id)

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def put_back(self, cell_id: str, *, alone: bool = False) -> None:
        """Let a cell that was taken wait again, behind all others.

        Args:
            cell_id: a cell that does not wait.
            alone: from now on it must not share a process.
        """
        if alone:
            self._alone.add(cell_id)
        self._append(cell_id)

    def clear(self) -> None:
        """Take all cells out."""
        self._place.clear()
        self._lanes.clear()
        self._cost = Fraction(0)

    def take(self, slots: int) -> list[str]:
        """Remove the next group and return it: the first cell, and others of its shape in order.

        Args:
            slots: processes that work on the grid, >= 1.
        """
        first = next(iter(self._place))
        price = self._prices[first]
        if not self._may_share(first):
            self._remove(first)
            return [first]
        share = self._cost / (SHARES * slots * Fraction(price.cost))
        size = max(1, math.ceil(share))
        lanes = self._lanes[price.shape]
        group: list[str] = []
        while len(group) < size:
            # the neediest of a group says how many it may be
            open_lanes = [lane for together, lane in lanes.items() if lane and together > len(group)]
            if not open_lanes:
                break
            cell_id = min(open_lanes, key=lambda lane: self._place[lane[0]]).popleft()
            size = min(size, self._prices[cell_id].together)
            self._remove(cell_id)
            group.append(cell_id)
        return group

    def _may_share(self, cell_id: str) -> bool:
        return self._prices[cell_id].together > 1 and cell_id not in self._alone

    def _append(self, cell_id: str) -> None:
        price = self._prices[cell_id]
        self._place[cell_id] = next(self._places)
        self._cost += Fraction(price.cost)
        if self._may_share(cell_id):
            self._lanes.setdefault(price.shape, {}).setdefault(price.together, deque()).append(cell_id)

    def _remove(self, cell_id: str) -> None:
        del self._place[cell_id]
        self._cost -= Fraction(self._prices[cell_id].cost)


def groups(left: Iterable[str], prices: Mapping[str, Price], slots: int) -> Iterator[list[str]]:
    """Yield the groups of all these cells, the dearest first: what a queue is given, and what `plan` shows of it.

    Args:
        left: cell_ids.
        prices: of each.
        slots: processes that work on the grid, >= 1.
    """
    queue = Queue(left, prices)
    while queue:
        yield queue.take(slots)


def split(shapes: Sequence[Hashable], together: Sequence[int], slots: int) -> list[list[int]]:
    """Return the indices of a batch of cells as groups of one shape, as equal in size as the processes allow.

    Args:
        shapes: of each cell.
        together: most cells of its shape in a group, of each cell.
        slots: processes that work on the batch, >= 1.
    """
    of_shape: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        of_shape.setdefault(shape, []).append(index)
    groups = []
    for members in of_shape.values():
        most = min(together[index] for index in members)
        n_groups = min(len(members), max(slots, math.ceil(len(members) / most)))
        groups += [members[start::n_groups] for start in range(n_groups)]
    return groups
