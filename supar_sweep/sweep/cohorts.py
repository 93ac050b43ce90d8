"""Which cells a process is given together: those of one shape, fewer towards the end of a grid. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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


def take(todo: deque[str], prices: Mapping[str, Price], slots: int, alone: Container[str] = ()) -> list[str]:
    """Remove the next group of cells from `todo` and return it: the first one and others of its shape, in order.

    Args:
        todo: cell_ids, the dearest first; at least one.
        prices: of each.
        slots: processes that work on the grid, >= 1.
        alone: cells that must not share a process.
    """
    first = todo[0]
    price = prices[first]
    if first in alone or price.together == 1:
        return [todo.popleft()]
    share = sum(prices[this].cost for this in todo) / (SHARES * slots * price.cost)
    size = min(price.together, max(1, math.ceil(share)))
    group = [first]
    for this in todo:
        if len(group) == size:
            break
        if this != first and prices[this].shape == price.shape and this not in alone:
            # the neediest of a group says how many it may be
            if len(group) >= prices[this].together:
                continue
            size = min(size, prices[this].together)
            group.append(this)
    chosen = set(group)
    left = [this for this in todo if this not in chosen]
    todo.clear()
    todo.extend(left)
    return group


def groups(left: Iterable[str], prices: Mapping[str, Price], slots: int) -> Iterator[list[str]]:
    """Yield the groups of all these cells, the dearest first: what a queue is given, and what `plan` shows of it.

    Args:
        left: cell_ids.
        prices: of each.
        slots: processes that work on the grid, >= 1.
    """
    todo = deque(sorted(left, key=lambda this: -prices[this].cost))
    while todo:
        yield take(todo, prices, slots)


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
