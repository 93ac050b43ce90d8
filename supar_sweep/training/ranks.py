"""Several processes that train one cell together, each a share of every batch: how they find one another and stay together.

All ranks run the same loop and hold the same weights; gradients are averaged once a step, after the backward pass, when masks
have been applied to them and before they are clipped. Only rank 0 writes. Whatever the ranks do in common begins with a vote,
a few numbers that travel between CPUs: who has failed, who was told to stop, what time it is for rank 0, and where each rank
stands. So a failure is known to all before anybody waits for a rank that will not come, and every decision (to stop, to save,
to give up) is taken by all at the same step. A rank that is gone without a word is a broken connection.

Why not DistributedDataParallel: it averages within the backward pass, where a rank that fails (out of memory) leaves the
others in a collective that nobody can end, on a GPU for good. What it saves, overlap with the backward pass, is little at
batches that are worth several GPUs.

torch is imported where it is needed: a process alone needs none of this.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from supar_sweep.errors import LostRankError, RankError
from supar_sweep.training.environment import is_out_of_memory
from supar_sweep.training.member import ShouldStop, Stop, stop_reason

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: to start, or for a checkpoint, or for data that rank 0 prepares."""

_VOTES: tuple[Stop | None, ...] = (None, "cancelled", "timeout", "preempted")
_FAILED = len(_VOTES)
_STEP, _TOTAL, _FROM_FIRST, _SAME, _COPY, _LEAVE = range(6)


class Ranks:
    """A process alone: it is its own first rank, and nothing that ranks do in common costs it anything.

    Args:
        heard: why this process was told to stop; see member.ShouldStop.
    """

    rank = 0
    world_size = 1
    lost = False
    """Whether another rank is gone without a word: nothing can be done in common any more."""

    def __init__(self, heard: ShouldStop = lambda: None) -> None:
        self._heard = heard

    @property
    def is_first(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def why(self) -> Stop | None:
        """Return why all ranks are to stop, as of their last vote; None = go on."""
        return stop_reason(self._heard())

    def clock_s(self) -> float:
        """Return a time that all ranks agree on, in seconds since an unknown moment, as of their last vote."""
        return time.monotonic()

    def from_first(self, work: Callable[[], T]) -> T:
        """Return what `work` returns on rank 0, on every rank; the others do not call it.

        Args:
            work: returns something that can be pickled. Its failure is every rank's.
        """
        return work()

    def average(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Replace gradients by their means over the ranks, and return the mean loss (0-d).

        Args:
            gradients: the same shapes on every rank.
            loss: 0-d, of this rank's share of the batch.
        """
        return loss

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks.

        Args:
            value: the same shape on every rank; may be overwritten.
        """
        return value

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of rank 0.

        Args:
            tensors: the same shapes on every rank.
        """

    def check_same(self, **facts: object) -> None:
        """Raise RankError, on every rank, where ranks disagree on a fact.

        Args:
            facts: by name, in words for a message.
        """

    def tell(self, error: BaseException) -> None:
        """Make a failure of this rank known to the others, each of which raises it from its next vote.

        Args:
            error: what was raised; one that came from another rank is told already.
        """

    def leave(self) -> None:
        """Wait for the others, and part."""


ALONE = Ranks()


class JoinedRanks(Ranks):
    """One of several ranks.

    Args:
        heard: why this process was told to stop.
        rank: 0 is the one that writes.
        world_size: ranks in all, >= 2. torch's process group is theirs.
    """

    def __init__(self, heard: ShouldStop, *, rank: int, world_size: int) -> None:
        super().__init__(heard)
        self.rank, self.world_size = rank, world_size
        self._why: Stop | None = None
        self._clock_s = time.monotonic()
        self._told: BaseException | None = None

    def why(self) -> Stop | None:
        return self._why

    def clock_s(self) -> float:
        return self._clock_s

    def from_first(self, work: Callable[[], T]) -> T:
        import torch.distributed as dist

        box: list[Any] = [None]
        if self.is_first:
            try:
                box = [work()]
            except Exception as error:
                self.tell(error)
                raise
        self._vote(_FROM_FIRST)
        with self._in_common():
            dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def average(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        import torch
        import torch.distributed as dist

        loss = loss.detach().clone()
        of_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in (*gradients, loss):
            of_type.setdefault(tensor.dtype, []).append(tensor)
        # memory for it is found before the vote: what fails must fail before the others wait
        packed = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in of_type.values()]
        self._vote(_STEP)
        with self._in_common():
            for flat in packed:
                dist.all_reduce(flat)
        for flat, tensors in zip(packed, of_type.values(), strict=True):
            parts = torch.split(flat.div_(self.world_size), [tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        return loss

    def total(self, value: Tensor) -> Tensor:
        import torch.distributed as dist

        self._vote(_TOTAL)
        with self._in_common():
            dist.all_reduce(value)
        return value

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        import torch.distributed as dist

        self._vote(_COPY)
        with self._in_common():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def check_same(self, **facts: object) -> None:
        self._vote(_SAME)
        everyone = self._gather(facts)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs[name] != value:
                    self._told = RankError(
                        f"{name}: rank {rank} of {self.world_size} has {theirs[name]}, rank 0 has {value}; they must not "
                        "differ: is the code, and its packages, the same on every node?"
                    )
                    raise self._told

    def tell(self, error: BaseException) -> None:
        if error is not self._told and not self.lost:
            self._told = error
            with suppress(LostRankError):
                self._vote(_STEP, error)

    def leave(self) -> None:
        import torch.distributed as dist

        with suppress(Exception):
            self._vote(_LEAVE)
        if not self.lost:  # with a rank that is gone, a GPU's part of it could wait for ever
            dist.destroy_process_group()

    def _vote(self, place: int, error: BaseException | None = None) -> None:
        """Learn how all ranks stand; raise what another one has failed with."""
        import torch
        import torch.distributed as dist

        mine = _FAILED if error is not None else _VOTES.index(stop_reason(self._heard()))
        clock_s = time.monotonic() if self.is_first else -math.inf
        votes = torch.tensor([mine, clock_s, place, -place], dtype=torch.float64)
        with self._in_common():
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        worst, self._clock_s, furthest, minus_nearest = votes.tolist()
        if worst == _FAILED:
            self._hear_failures(error)
        elif furthest != -minus_nearest:
            self._told = RankError(f"the {self.world_size} ranks no longer take the same steps")
            raise self._told
        elif self._why is None:
            self._why = _VOTES[int(worst)]

    def _hear_failures(self, own: BaseException | None) -> None:
        said = self._gather(None if own is None else (one_line(own), is_out_of_memory(own)))
        if own is None:
            rank, (text, out_of_memory) = next((rank, each) for rank, each in enumerate(said) if each is not None)
            text = f"rank {rank} of {self.world_size}: {text}"
            self._told = MemoryError(text) if out_of_memory else RankError(text)
            raise self._told

    def _gather(self, mine: Any) -> list[Any]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.world_size
        with self._in_common():
            dist.all_gather_object(everyone, mine)
        return everyone

    @contextmanager
    def _in_common(self) -> Iterator[None]:
        if self.lost:
            raise LostRankError("another rank is gone")
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            log.warning("rank %d: %s", self.rank, one_line(error))
            raise LostRankError(f"one of the {self.world_size} ranks is gone, or out of reach") from error


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its text.

    Args:
        error: any.
    """
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def join(heard: ShouldStop, *, world_size: int, device: str) -> Ranks:
    """Return this process' place among the tasks of its SLURM step, once all have come.

    Args:
        heard: why this process was told to stop.
        world_size: tasks that train a cell together, >= 1.
        device: runtime.device: where the ranks train, a GPU each, in the order of the tasks on a node.

    Raises:
        RankError: SLURM has started another number of tasks.
    """
    if world_size == 1:
        return Ranks(heard)
    import torch
    import torch.distributed as dist
    from submitit.helpers import TorchDistributedEnvironment

    slurm = TorchDistributedEnvironment()
    if slurm.world_size != world_size:
        raise RankError(f"SLURM has started {slurm.world_size} tasks, not {world_size}")
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        # a site may show each task its own GPU only
        torch.cuda.set_device(slurm.local_rank % torch.cuda.device_count())
    # srun runs on the first node, and this address of it needs no name service
    host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", slurm.master_addr)
    meeting = f"tcp://{f'[{host}]' if ':' in host else host}:{slurm.master_port}"
    log.info("rank %d of %d, rank 0 at %s, %s", slurm.rank, world_size, meeting, backend)
    dist.init_process_group(backend, init_method=meeting, rank=slurm.rank, world_size=world_size, timeout=PATIENCE)
    return JoinedRanks(heard, rank=slurm.rank, world_size=world_size)
