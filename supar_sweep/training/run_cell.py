"""run_cells(jobs): what a worker process is told to do, from plain dicts to typed ends, whatever happens in between.

    lock each cell - already complete? - begin an attempt - resume - train, those of one shape together - publish - say how
    it ended

A job is a plain dict, frozen at submission: {"store", "folder", "cell_id", "cell", "runtime",
"fingerprint", "provenance"}.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from supar_sweep.config.decode import decode, encode
from supar_sweep.config.schema import CellConfig, DataConfig, RuntimeConfig, check_ranks
from supar_sweep.errors import (
    BusyError,
    ConfigError,
    DataError,
    LostDeviceError,
    LostRankError,
    RecordError,
    SuparError,
)
from supar_sweep.sweep.records import Attempt, CellFolder, End, finite
from supar_sweep.training.checkpoint import Checkpoints
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.environment import facts, is_out_of_memory
from supar_sweep.training.member import Outcome, ShouldStop
from supar_sweep.training.ranks import ALONE, Ranks, one_line

if TYPE_CHECKING:
    from supar_sweep.training.followers import Follower
    from supar_sweep.training.train import Run

log = logging.getLogger(__name__)

_corpora: dict[str, Corpus] = {}
"""A worker trains many cells of one corpus: read it once a process."""


def run_cell(job: Mapping[str, Any], *, should_stop: ShouldStop = lambda: None) -> End | Literal["busy"]:
    """Return how one cell ended; see `run_cells`.

    Args:
        job: the job (see above).
        should_stop: polled before each step; says why to stop (true = cancelled).

    Raises:
        RecordError: the cell's folder cannot be written, or holds a torn result: there is no place
            to say how it ended but here.
    """
    told: list[_Told] = []
    _run([job], should_stop, lambda _, end, message: told.append((end, message)), ALONE)
    ((end, message),) = told
    if end == "unrecorded":
        raise RecordError(message)
    return end


def run_cells(
    jobs: Sequence[Mapping[str, Any]],
    *,
    should_stop: ShouldStop = lambda: None,
    ended: Callable[[str, str, str], None],
    ranks: Ranks = ALONE,
) -> None:
    """Train cells in this process, those of one shape together, and tell how each ended: done, diverged, oom, timeout, failed,
    cancelled, or busy (another process has it).

    done and diverged have published a result; the others left an end.json with their message in
    the attempt's folder, and are tried again by the next `run`. Exceptions of the training end
    here, and no cell's end changes another's.

    Args:
        jobs: the jobs (see above), of different cells.
        should_stop: polled before each step; says why to stop (true = cancelled). A preempted run
            ends as cancelled.
        ended: called once for each cell as soon as it has ended, with its cell_id, its end, and one line on the cause.
        ranks: the processes that train each of the cells together, all of which call this with the same jobs. Rank 0 locks,
            records and publishes; the others are told its ends.

    Raises:
        LostRankError: one of the ranks is gone. The cell at hand gets no end: as good as a process that was killed.
    """
    if not ranks.is_first:
        from supar_sweep.training.followers import follow

        follow(jobs, should_stop=should_stop, ranks=ranks)
    told: dict[str, tuple[str, str]] = {}

    def tell(job: Mapping[str, Any], end: str, message: str) -> None:
        told[job["cell_id"]] = (_plain(end), message)
        ended(job["cell_id"], *told[job["cell_id"]])

    if ranks.is_first:
        _run(jobs, should_stop, tell, ranks)
    ends = ranks.from_first(lambda: told)
    for cell_id in ends.keys() - told.keys():
        ended(cell_id, *ends[cell_id])


_Told = tuple[End | Literal["busy", "unrecorded"], str]
_Tell = Callable[[Mapping[str, Any], End | Literal["busy", "unrecorded"], str], None]


def _plain(end: str) -> str:
    return "failed" if end == "unrecorded" else end


def _run(jobs: Sequence[Mapping[str, Any]], should_stop: ShouldStop, tell: _Tell, ranks: Ranks) -> None:
    tries = [found for job in jobs if (found := _entered(job, tell))]
    try:
        ready = [this for this in tries if this.guarded(lambda this=this: this.prepare(ranks.world_size))]  # type: ignore[misc]
        for this in [this for this in ready if this.cell.train.target]:
            this.guarded(lambda this=this: this.finish(this.train_alone(should_stop)))  # type: ignore[misc]
        ours = [this for this in ready if not this.cell.train.target]
        ranks.from_first(lambda: {this.job["cell_id"]: int((this.resume or {"step": 0})["step"]) for this in ours})
        if ours:
            train_all(ours, should_stop, ranks)
    except KeyboardInterrupt:
        for this in tries:
            this.interrupt()
        raise
    finally:
        for this in tries:
            this.attempt.close()


def _entered(job: Mapping[str, Any], tell: _Tell) -> _Try | None:
    """Return the cell's new attempt, or None, told, where there is nothing to do or nothing to be done."""
    folder = CellFolder(Path(job["store"], job["folder"]))
    try:
        if (result := folder.result()) is None:
            attempt = Attempt(folder, job["cell"], {"provenance": dict(job.get("provenance") or {})})
            try:
                if (result := folder.result()) is None:
                    return _Try(job, attempt, tell)
                shutil.rmtree(attempt.path, ignore_errors=True)  # published between the look above and the lock
            finally:
                if result is not None:
                    attempt.close()
        end: End = result["end"]
        tell(job, end, "")
    except BusyError as error:
        tell(job, "busy", str(error))
    except RecordError as error:
        tell(job, "unrecorded", str(error))
    return None


def train_all(tries: Sequence[_Try | Follower], should_stop: ShouldStop, ranks: Ranks) -> None:
    """Train cells to their ends, those of one shape together. What fails on one rank fails on all, and ends its cell only.

    Args:
        tries: what each run is made of, and who hears how it came out.
        should_stop: polled before each step.
        ranks: all of them call this with the same cells.
    """
    from supar_sweep.training.train import train_together

    of_run: dict[int, _Try | Follower] = {}
    runs: list[Run] = []

    def ended(run: Run, end: Outcome | Exception) -> None:
        failed(of_run[id(run)], end) if isinstance(end, Exception) else of_run[id(run)].come_out(end)

    def failed(this: _Try | Follower, error: Exception) -> None:
        this.fail(error)
        ranks.tell(error)

    for this in tries:
        try:
            run = this.begin(len(tries), ranks)
        except Exception as error:
            failed(this, error)
        else:
            of_run[id(run)] = this
            runs.append(run)
    train_together(runs, should_stop=should_stop, ended=ended)


class _Try:
    """One attempt at one cell, from its job to its told end.

    Args:
        job: the job.
        attempt: new.
        tell: told the end, once.
    """

    cell: CellConfig
    runtime: RuntimeConfig
    corpus: Corpus
    resume: Mapping[str, Any] | None

    def __init__(self, job: Mapping[str, Any], attempt: Attempt, tell: _Tell) -> None:
        self.job, self.attempt, self._tell = job, attempt, tell
        self.checkpoints = Checkpoints(attempt.checkpoints, job["cell_id"])
        self.sink = AttemptSink(attempt, self.checkpoints)
        self._begun_s = time.monotonic()
        self._open = True

    def prepare(self, world_size: int) -> None:
        """Read what the job names, for so many ranks."""
        self.cell = decode(CellConfig, self.job["cell"], prefix="cell")
        self.runtime = decode(RuntimeConfig, self.job["runtime"], prefix="runtime")
        check_ranks(self.cell, world_size)
        self.corpus = corpus_of(self.cell.data, self.job["fingerprint"])
        self.resume = self.checkpoints.newest(self._has_past)

    def _has_past(self, state: Mapping[str, Any]) -> bool:
        """Return whether the metrics hold all that was logged before a checkpoint."""
        # one of before they were counted: the GPT's own loop logs a line a step, another function what it likes
        at_least = 0 if self.cell.train.target else int(state["step"])
        return self.attempt.has_past(int(state.get("metrics_lines", at_least)))

    def begin(self, together: int, ranks: Ranks) -> Run:
        """Return the cell's run; see `train.Run`."""
        from supar_sweep.training.train import Run

        run = Run(
            self.cell,
            self.runtime,
            self.corpus,
            sink=self.sink,
            resume=self.resume,
            together=together,
            ranks=ranks,
        )
        self.resume = None  # its tensors are in the model now
        return run

    def train_alone(self, should_stop: ShouldStop) -> Outcome:
        """Return what the user's own function says of this cell."""
        train = _target(str(self.cell.train.target))
        outcome = train(
            self.cell, self.runtime, self.corpus, sink=self.sink, resume=self.resume, should_stop=should_stop
        )
        if not isinstance(outcome, Outcome):
            raise ConfigError("train.target", "must return a supar_sweep.training.member.Outcome", value=outcome)
        return outcome

    def come_out(self, outcome: Outcome) -> None:
        """End the cell as its run came out."""
        self.guarded(lambda: self.finish(outcome))

    def finish(self, outcome: Outcome) -> None:
        """Publish the result, or say why there is none yet."""
        if outcome.end not in ("done", "diverged"):
            at = f"{outcome.end} after {outcome.steps_done} of {self.cell.train.steps} steps"
            self._end("timeout" if outcome.end == "timeout" else "cancelled", at, "")
            return
        end, loss = outcome.end, outcome.train_loss
        if loss is not None and not math.isfinite(loss):
            # a function of the user's need not look; as done, its loss would be missing from every figure without a word
            end, outcome = "diverged", replace(outcome, end="diverged", train_loss=None, val_loss=None)
        self.attempt.publish(self._result(outcome), keep_checkpoints=self.runtime.keep_checkpoints)
        self._close(end, "")

    def guarded(self, work: Callable[[], None]) -> bool:
        """Do some of the work and return whether it went well; else the cell has ended with what went wrong. Only what asks
        Python itself to stop passes through.
        """
        try:
            work()
        except (Exception, SystemExit) as error:  # a function of the user's may call sys.exit
            self.fail(error)
            return False
        return True

    def fail(self, error: Exception | SystemExit) -> None:
        """End the cell with an error."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, LostRankError):  # what ended the other rank is SLURM's to say
            log.error("%s: %s", self.attempt.cell.path.name, error)
            self._close("cancelled", str(error))
            return
        if isinstance(error, LostDeviceError):  # another cell's doing: as good as a process that was killed
            self._end("cancelled", str(error).partition("\n")[0], trace)
        elif isinstance(error, SuparError):  # its text says it all; the traceback is for a report
            self._end("failed", str(error), trace)
        elif isinstance(error, MemoryError):
            self._end("oom", f"out of memory {error}".strip(), trace)
        else:
            kind: End = "oom" if is_out_of_memory(error) else "failed"
            self._end(kind, one_line(error), trace)

    def interrupt(self) -> None:
        """Leave a word where Python itself was told to stop."""
        if self._open:
            self.attempt.end("cancelled", "interrupted")

    def _end(self, end: End, message: str, trace: str) -> None:
        self.attempt.end(end, message, trace)
        if end != "cancelled":
            log.error("%s: %s: %s", self.attempt.cell.path.name, end, message)
        if (self.attempt.path / "end.json").exists():
            self._close(end, message)
        else:  # a full disk: hand the text on
            self._close("unrecorded", f"{message}; nor could this end be recorded in {self.attempt.path}")

    def _close(self, end: End | Literal["unrecorded"], message: str) -> None:
        self.attempt.close()
        self._open, self.resume = False, None
        self._tell(self.job, end, message)

    def _result(self, outcome: Outcome) -> dict[str, Any]:
        return {
            **outcome.facts,  # first: a user's function must not overwrite what the record says
            "end": outcome.end,
            "cell_id": self.job["cell_id"],
            "cell": encode(self.cell),
            "fingerprint": self.job["fingerprint"],
            "summary": {
                "train_loss": finite(outcome.train_loss),
                "val_loss": finite(outcome.val_loss),
                "last_finite_loss": finite(outcome.last_finite_loss),
                "steps_done": outcome.steps_done,
            },
            "data": {
                "name": self.corpus.name,
                "bytes": self.corpus.n_bytes,
                "fingerprint": self.corpus.fingerprint,
            },
            **facts(str(outcome.facts.get("device", "cpu"))),
            "warnings": list(self.checkpoints.warnings),
            "wall_s": time.monotonic() - self._begun_s,
        }


class AttemptSink:
    """Metrics and checkpoints of one attempt.

    Args:
        attempt: where metrics go.
        checkpoints: where checkpoints go, and the list that warnings join.
    """

    def __init__(self, attempt: Attempt, checkpoints: Checkpoints) -> None:
        self.attempt, self.checkpoints = attempt, checkpoints

    def begin(self, step: int, **info: Any) -> None:
        """Start the attempt's metrics with the cell's past up to `step`."""
        self.attempt.begin(step, **info, warnings=list(self.checkpoints.warnings))

    def log(self, **values: Any) -> None:
        """Append one line of metrics."""
        self.attempt.log(**values)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Make the metrics durable, then write a checkpoint."""
        self.attempt.flush()
        self.checkpoints.save(step, {**state, "metrics_lines": self.attempt.n_lines})

    def warn(self, message: str) -> None:
        """Note something that went wrong without ending the run."""
        self.checkpoints.warn(message)


def corpus_of(data: DataConfig, fingerprint: str) -> Corpus:
    """Return a corpus, read once a process.

    Args:
        data: which.
        fingerprint: what it had when its cells were submitted.

    Raises:
        DataError: it cannot be read, or has changed.
    """
    key = json.dumps(encode(data), sort_keys=True)
    if key not in _corpora:
        _corpora[key] = load_corpus(data)
    corpus = _corpora[key]
    if corpus.fingerprint != fingerprint:
        raise DataError(
            f"data.name={data.name}: the corpus has changed since this cell was submitted "
            f"(fingerprint {corpus.fingerprint[:12]}, was {fingerprint[:12]}); restore it, "
            "or submit again, which makes new cells"
        )
    return corpus


def _target(dotted: str) -> Callable[..., Outcome]:
    """Return the user's own function, imported by its dotted path."""
    module_name, _, name = dotted.rpartition(".")
    allowed = "package.module.function, importable where the cell runs"
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a user's module may fail in any way
        raise ConfigError("train.target", f"cannot be imported ({error})", value=dotted, allowed=allowed) from error
    if not callable(function):
        raise ConfigError("train.target", "is not a function", value=dotted, allowed=allowed)
    found: Callable[..., Outcome] = function
    return found
