"""Which of several runs take their next step together, and that step.

How many share a forward pass is found out while they train: the first steps are taken in stacks of each size in turn, and the
fastest size stays, for this shape and process. On a CPU the numbers of a run do not depend on it (stack.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from supar_sweep.errors import LostDeviceError
from supar_sweep.training import stack
from supar_sweep.training.environment import is_out_of_memory
from supar_sweep.training.member import Outcome, Stop
from supar_sweep.training.trainer import Trainer

if TYPE_CHECKING:
    from supar_sweep.training.train import Run

TRIALS = 3
"""Steps that each size of a stack is tried for; the first warms up."""

_fastest: dict[Hashable, tuple[int, int]] = {}
"""Shape -> (largest size tried, fastest size): later cohorts of the process start from it."""


def is_lost(device: torch.device) -> bool:
    """Return whether a GPU's context is broken, so that everything on it fails from now on. Waits for what was queued.

    Args:
        device: of the runs.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return not is_out_of_memory(error)
    return False


def stack_key(trainer: Trainer) -> Hashable:
    """Return what runs must have in common to share a forward pass.

    Args:
        trainer: of one run.
    """
    cell, train = trainer.cell, trainer.cell.train
    batch = (train.batch_seqs, train.accumulation_steps, train.precision)
    # each is compiled for itself, and shares its passes with other ranks' rather than with other runs
    alone = id(trainer) if trainer.forward is not trainer.model or trainer.ranks.world_size > 1 else None
    return cell.model, cell.data.n_vocab, batch, trainer.device, trainer.route, trainer.threads, alone


class Cohort:
    """Runs of one stack_key on their way.

    Args:
        runs: at any step each; those that have come out already are only told.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.live = [run for run in runs if run.outcome is None]
        self._ended: list[tuple[Run, Exception | None]] = [(run, None) for run in runs if run.outcome is not None]
        self._key, self._device = stack_key(runs[0].trainer), runs[0].trainer.device
        self._passes = dict.fromkeys(map(id, self.live), 0)
        self._times_s: dict[int, list[float]] = {}
        self._limit = len(self.live)
        largest, fastest = _fastest.get(self._key, (0, 0))
        self._sizes = [] if largest >= self._limit else _halves(self._limit)
        self._size = min(fastest, self._limit) or 1

    @property
    def settled(self) -> bool:
        """Whether it is known how many share a pass."""
        return not self._sizes

    def choose(self) -> list[Run]:
        """Return the runs to step next; [] when all have come out."""
        if self._sizes:
            # every run gets its turn while sizes are tried, so that none is far behind
            return sorted(self.live, key=lambda run: self._passes[id(run)])[: self._sizes[0]]
        # the first ones go on to their end, and others move up
        return self.live[: self._size]

    def step(self, runs: Sequence[Run]) -> None:
        """Take one optimizer step of each of these runs. What fails in one ends that one only.

        Args:
            runs: from `choose`.
        """
        begun_s = time.perf_counter()
        if len(runs) == 1:
            self._alone(runs[0])
        elif not self._stacked(runs):
            return
        if self._sizes and is_lost(self._device):  # what is timed must have happened
            self._abandon("its error came late")
            return
        took_s = (time.perf_counter() - begun_s) / len(runs)
        for run in runs:
            run.train_s += took_s
            self._passes[id(run)] += 1
        self._learn(len(runs), took_s - sum(run.aside_s for run in runs) / len(runs))

    def stop(self, reason: Stop) -> None:
        """Have every run save and come out as stopped.

        Args:
            reason: why.
        """
        for run in list(self.live):
            try:
                run.stop(reason)
            except Exception as error:  # a disk that is full for one is no reason to lose the others
                self._leave(run, error)
            else:
                self._leave(run)

    def take_ends(self) -> list[tuple[Run, Outcome | Exception]]:
        """Return how runs came out since the last call: what they say, or what failed in them."""
        ended, self._ended = self._ended, []
        return [(run, error or run.result()) for run, error in ended]

    def backward(self, runs: Sequence[Run]) -> list[torch.Tensor]:
        """Leave every run's gradients of its next step in its parameters; return their losses, 0-d each.

        Args:
            runs: of this cohort.
        """
        first = runs[0].trainer
        batches = [run.trainer.batch(run.corpus, run.step) for run in runs]
        x_KBT, y_KBT = (first.to_device(torch.stack(part)) for part in zip(*batches, strict=True))
        models = [run.trainer.model for run in runs]
        parts = first.cell.train.accumulation_steps
        found = []
        for x, y in zip(x_KBT.chunk(parts, 1), y_KBT.chunk(parts, 1), strict=True):
            with first.autocast():
                losses_K = stack.losses(models, x, y)
            losses_K = losses_K if parts == 1 else losses_K / parts
            losses_K.sum().backward()  # type: ignore[no-untyped-call]
            found.append(losses_K.detach())
        if parts == 1:
            return list(found[0].unbind(0))
        # in the order of a run alone
        return [torch.stack(losses).sum() for losses in zip(*(losses_K.unbind(0) for losses_K in found), strict=True)]

    def _alone(self, run: Run) -> None:
        try:
            run.took(*run.trainer.step(run.corpus, run.step))
        except Exception as error:  # this run's, whatever it is
            self._leave(run, error)
        else:
            if run.outcome is not None:
                self._leave(run)

    def _stacked(self, runs: Sequence[Run]) -> bool:
        """Step several runs in one pass; return false where that failed, so that nothing has changed but the size to try."""
        try:
            run_losses = self.backward(runs)
        except Exception as error:  # whose it is will show in smaller stacks, at the latest alone
            if is_lost(self._device):
                self._abandon(error)
                return False
            for run in runs:
                run.trainer.optimizer.zero_grad(set_to_none=True)
            self._shrink(len(runs) // 2 if is_out_of_memory(error) else 1, error)
            return False
        for run, loss in zip(runs, run_losses, strict=True):
            try:
                run.took(loss, *run.trainer.update())
            except Exception as error:
                self._leave(run, error)
            else:
                if run.outcome is not None:
                    self._leave(run)
        return True

    def _leave(self, run: Run, error: Exception | None = None) -> None:
        self.live.remove(run)
        self._ended.append((run, error))
        if not isinstance(error, LostDeviceError):
            run.trainer.optimizer.zero_grad(set_to_none=True)
        self._sizes = [size for size in self._sizes if size <= len(self.live)]

    def _abandon(self, reason: object) -> None:
        """End every run: the GPU answers nothing any more."""
        for run in list(self.live):
            self._leave(run, LostDeviceError(f"the GPU was lost to this process ({reason})"))

    def _shrink(self, limit: int, error: Exception) -> None:
        """Go on in smaller stacks."""
        reason = str(error).strip().partition("\n")[0]
        for run in self.live:
            run.sink.warn(f"cannot be trained in a stack of more than {limit} here ({reason})")
        self._limit = limit
        self._sizes = [size for size in self._sizes if size <= limit]
        self._size = min(self._size, limit)

    def _learn(self, size: int, took_s: float) -> None:
        """Note the time of a run's step in a stack of this size; choose once all sizes were tried."""
        if not self._sizes or size != self._sizes[0]:
            return
        times_s = self._times_s.setdefault(size, [])
        times_s.append(took_s)
        if len(times_s) == TRIALS:
            self._sizes.pop(0)
        if not self._sizes:
            medians_s = {size: statistics.median(times[1:] or times) for size, times in self._times_s.items()}
            self._size = min(medians_s, key=medians_s.__getitem__)
            _fastest[self._key] = (self._limit, self._size)


def _halves(size: int) -> list[int]:
    """Return size, size // 2, ... 1; nothing where there is nothing to choose."""
    sizes = []
    while size > 1:
        sizes.append(size)
        size //= 2
    return [*sizes, 1] if sizes else []
