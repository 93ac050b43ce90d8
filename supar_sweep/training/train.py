"""train(cell): one cell from its first step, or its checkpoint, to its end; train_together: several of one shape.

The same route, compute and thread count give the same bits on a CPU, killed and resumed or not, alone or with others: batches
are functions of the step, the optimizer's state is saved whole, and nothing else is random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.training.cohort import Cohort, stack_key
from supar_sweep.training.corpus import Corpus, check_length
from supar_sweep.training.held_masks import check_masks
from supar_sweep.training.member import Member, Outcome, ShouldStop, Sink, Stop, stop_reason
from supar_sweep.training.ranks import ALONE, Ranks
from supar_sweep.training.trainer import Trainer, pick_device

CPU_READ_STEPS, CUDA_READ_STEPS = 1, 10
"""Losses are read from a GPU rarely, because each read waits for all that was queued."""


def train(
    cell: CellConfig,
    runtime: RuntimeConfig,
    corpus: Corpus,
    *,
    sink: Sink,
    resume: Mapping[str, Any] | None = None,
    should_stop: ShouldStop = lambda: None,
) -> Outcome:
    """Return how the run of one cell came out. A user's own function (train.target) has this
    signature too.

    Args:
        cell: what to train.
        runtime: how to compute it; a resumed run keeps the checkpoint's route, compute and threads.
        corpus: tokens, as `cell.data` names them.
        sink: gets metrics and checkpoints.
        resume: the newest checkpoint's state with its "step", or None to start afresh.
        should_stop: polled before each step.

    Raises:
        ConfigError: a setting that cannot be used on this machine, or a model that does not start
            as the rules say.
        MaskError: a dead weight has moved.
        CheckpointError: the checkpoint's masks or shapes are not those of this cell.
        DataError: a corpus shorter than one batch or one evaluation.
    """
    run = Run(cell, runtime, corpus, sink=sink, resume=resume)
    ends: list[Outcome | Exception] = []
    train_together([run], should_stop=should_stop, ended=lambda _, end: ends.append(end))
    (end,) = ends
    if isinstance(end, Exception):
        raise end
    return end


def train_together(
    runs: Sequence[Run],
    *,
    should_stop: ShouldStop = lambda: None,
    ended: Callable[[Run, Outcome | Exception], None],
) -> None:
    """Train runs to their ends, those of one shape in as large stacks as are fastest; no end changes another run.

    Args:
        runs: at any step each; not trained any further after this.
        should_stop: polled before each step; when it answers, every run saves and ends.
        ended: called once for each run, as soon as it has come out or failed.
    """
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(stack_key(run.trainer), []).append(run)
    for members in groups.values():
        torch.set_num_threads(members[0].trainer.threads)
        cohort = Cohort(members)
        while cohort.live:
            if reason := stop_reason(should_stop()):
                cohort.stop(reason)
            else:
                cohort.step(cohort.choose())
            _tell(cohort, ended)
        _tell(cohort, ended)  # of runs that had nothing left to do


def _tell(cohort: Cohort, ended: Callable[[Run, Outcome | Exception], None]) -> None:
    for run, end in cohort.take_ends():
        ended(run, end)
        run.release()


MASK_CHECK_STEPS = 100
"""Every so many steps, and before whatever is kept of a run, dead weights must be 0: a check reads each masked weight once
and waits for the device, a hundredth to a tenth of a step.
"""


class Run:
    """One cell on its way: where it stands, what it has written, how it came out.

    Args:
        cell, runtime, corpus, sink, resume: as for `train`, which also says what is raised.
        together: cells that its process was given with it, itself included.
        ranks: the processes that train the cell together, all with the same run.
    """

    def __init__(
        self,
        cell: CellConfig,
        runtime: RuntimeConfig,
        corpus: Corpus,
        *,
        sink: Sink,
        resume: Mapping[str, Any] | None = None,
        together: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        check_length(
            corpus,
            batch_seqs=cell.train.batch_seqs,
            context_tokens=cell.model.context_tokens,
            eval_seqs=cell.train.eval_seqs,
        )
        self.runtime, self.corpus, self.sink = runtime, corpus, sink
        self.trainer = Trainer(cell, runtime, pick_device(runtime.device), resume, ranks)
        self.config = cell.train
        tokens_per_step = self.config.batch_seqs * cell.model.context_tokens
        density = None if self.trainer.masks is None else self.trainer.masks.density
        self.member = Member(self.config, corpus.n_vocab, tokens_per_step, sink, density)
        if resume:
            self.member.load(resume["member"])
        self.step = self._saved_step = int(resume["step"]) if resume else 0
        self.train_s = float(resume["train_s"]) if resume else 0.0
        self.aside_s = 0.0  # of its last step: evaluation and checkpoint
        self.outcome: Outcome | None = None
        self._saved_s = ranks.clock_s()
        self._unread: list[tuple[int, Tensor, Tensor, float]] = []
        self._read_steps = CPU_READ_STEPS if self.trainer.device.type == "cpu" else CUDA_READ_STEPS
        for message in self.trainer.warnings:
            sink.warn(message)
        sink.begin(self.step, **self.trainer.info, together=together)
        if self.step >= self.config.steps:  # killed between its last step and its result
            self._end("done")

    def took(self, loss: Tensor, grad_norm: Tensor, lr_factor: float) -> None:
        """Take in one step: its numbers, and what is due after it.

        Args:
            loss, grad_norm: 0-d.
            lr_factor: of the schedule, in [0, 1].
        """
        self.step += 1
        self.aside_s = 0.0
        config, step = self.config, self.step
        self._unread.append((step, loss, grad_norm, lr_factor))
        last = step == config.steps
        eval_due = last or (config.eval_every_steps is not None and step % config.eval_every_steps == 0)
        save_due = self._save_due() or (last and self.runtime.keep_checkpoints)
        diverged = (eval_due or save_due or len(self._unread) >= self._read_steps) and self._read()
        begun_s = time.perf_counter()
        if eval_due and not diverged:
            diverged = self.member.observe_val(step, self.trainer.evaluate(self.corpus))
        if not diverged and (last or save_due or step % MASK_CHECK_STEPS == 0):
            check_masks(self.trainer.plans)
        if save_due and not diverged:
            self._save()
        self.aside_s = time.perf_counter() - begun_s
        if last or diverged:
            self._end("done")

    def stop(self, reason: Stop) -> None:
        """Save, and come out as stopped; or as diverged, where an unread loss says so.

        Args:
            reason: why.
        """
        if not self._read() and self.step > self._saved_step:
            check_masks(self.trainer.plans)
            self._save()
        self._end(reason)

    def _end(self, end: Literal["done"] | Stop) -> None:
        outcome = self.member.outcome(end, self.step)
        facts = self.trainer.facts(outcome.steps_done)
        self.trainer.ranks.check_same(**{f"hash of the masks after step {self.step}": facts["mask_hash"]})
        self.outcome = replace(outcome, facts=facts)

    def result(self) -> Outcome:
        """Return how it came out, with the seconds that its training took, once it has."""
        assert self.outcome is not None
        return replace(self.outcome, facts={**self.outcome.facts, "train_s": self.train_s})

    def release(self) -> None:
        """Let go of the model, which the others may need the memory of."""
        del self.trainer

    def _save_due(self) -> bool:
        every_steps, every_s = self.runtime.checkpoint_every_steps, self.runtime.checkpoint_every_s
        if every_steps is not None and self.step % every_steps == 0:
            return True
        return every_s is not None and self.trainer.ranks.clock_s() - self._saved_s >= every_s

    def _save(self) -> None:
        self.sink.save(self.step, {**self.trainer.state(), "member": self.member.state(), "train_s": self.train_s})
        self._saved_step, self._saved_s = self.step, self.trainer.ranks.clock_s()

    def _read(self) -> bool:
        return read(self.member, self._unread)


def read(member: Member, unread: list[tuple[int, Tensor, Tensor, float]]) -> bool:
    """Hand queued steps to the member, with one wait for the device; return whether it diverged with one of them.

    Args:
        member: whose.
        unread: (step, loss, gradient norm, lr factor) each; emptied.
    """
    if not unread:
        return member.diverged_at is not None
    if len(unread) == 1:
        values = [[unread[0][1].item(), unread[0][2].item()]]
    else:
        pairs = [torch.stack((loss.double(), norm.double())) for _, loss, norm, _ in unread]
        values = torch.stack(pairs).tolist()
    steps = [(step, lr_factor) for step, _, _, lr_factor in unread]
    unread.clear()
    return any(
        member.observe(step, loss, norm, lr_factor)
        for (step, lr_factor), (loss, norm) in zip(steps, values, strict=True)
    )
