"""run_cell(job): what a worker process is told to do, from a plain dict to a typed end, whatever
happens in between.

    lock the cell - already complete? - begin an attempt - resume - train - publish - say how it
    ended

A job is a plain dict, frozen at submission: {"store", "folder", "cell_id", "cell", "runtime",
"fingerprint", "provenance"}.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from supar_sweep.config.decode import decode, encode
from supar_sweep.config.schema import CellConfig, DataConfig, RuntimeConfig
from supar_sweep.errors import BusyError, ConfigError, DataError, RecordError, SuparError
from supar_sweep.sweep.records import Attempt, CellFolder, End, finite
from supar_sweep.training.checkpoint import Checkpoints
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.environment import facts
from supar_sweep.training.member import Outcome, ShouldStop

log = logging.getLogger(__name__)

_OOM_TEXTS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

_corpora: dict[str, Corpus] = {}
"""A worker trains many cells of one corpus: read it once a process."""


def run_cell(job: Mapping[str, Any], *, should_stop: ShouldStop = lambda: None) -> End | Literal["busy"]:
    """Return how the cell ended: done, diverged, oom, timeout, failed, cancelled, or busy (another
    process has it).

    done and diverged have published a result; the others left an end.json with their message in
    the attempt's folder, and are tried again by the next `run`. Exceptions of the training end
    here.

    Args:
        job: the job (see above).
        should_stop: polled before each step; says why to stop (true = cancelled). A preempted run
            ends as cancelled.

    Raises:
        RecordError: the cell's folder cannot be written, or holds a torn result: there is no place
            to say how it ended but here.
    """
    folder = CellFolder(Path(job["store"], job["folder"]))
    if (result := folder.result()) is not None:
        return _end_of(result)
    try:
        attempt = Attempt(folder, job["cell"], {"provenance": dict(job.get("provenance") or {})})
    except BusyError:
        return "busy"
    with attempt:
        if (result := folder.result()) is not None:  # published between the look above and the lock
            shutil.rmtree(attempt.path, ignore_errors=True)
            return _end_of(result)
        end, message, trace = _guarded(job, attempt, should_stop)
        if end not in ("done", "diverged"):
            attempt.end(end, message, trace)
            if end != "cancelled":
                log.error("%s: %s: %s", folder.path.name, end, message)
            if not (attempt.path / "end.json").exists():  # a full disk: hand the text on
                raise RecordError(f"{message}; nor could this end be recorded in {attempt.path}")
    return end


def _end_of(result: Mapping[str, Any]) -> End:
    end: End = result["end"]
    return end


def _guarded(job: Mapping[str, Any], attempt: Attempt, should_stop: ShouldStop) -> tuple[End, str, str]:
    """Return (end, message, traceback) of the work; only what asks Python itself to stop passes
    through.
    """
    try:
        return _work(job, attempt, should_stop)
    except SuparError as error:  # its text says it all; the traceback is for a report
        return "failed", str(error), traceback.format_exc()
    except MemoryError as error:
        return "oom", f"out of memory {error}".strip(), traceback.format_exc()
    except (Exception, SystemExit) as error:  # a function of the user's may call sys.exit
        kind: End = "oom" if _is_oom(error) else "failed"
        message = f"{type(error).__name__}: {error}"
        return kind, message.partition("\n")[0], traceback.format_exc()
    except KeyboardInterrupt:
        attempt.end("cancelled", "interrupted")
        raise


def _is_oom(error: BaseException) -> bool:
    # torch.OutOfMemoryError is its GPU allocator's; the CPU's, the CUDA driver's (no room for one
    # more process) and cuBLAS's are plain RuntimeErrors
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in _OOM_TEXTS)


def _work(job: Mapping[str, Any], attempt: Attempt, should_stop: ShouldStop) -> tuple[End, str, str]:
    cell = decode(CellConfig, job["cell"], prefix="cell")
    runtime = decode(RuntimeConfig, job["runtime"], prefix="runtime")
    corpus = _corpus(cell.data)
    if corpus.fingerprint != job["fingerprint"]:
        raise DataError(
            f"data.name={cell.data.name}: the corpus has changed since this cell was submitted "
            f"(fingerprint {corpus.fingerprint[:12]}, was {job['fingerprint'][:12]}); restore it, "
            "or submit again, which makes new cells"
        )
    train = _target(cell.train.target)
    checkpoints = Checkpoints(attempt.checkpoints, job["cell_id"])
    sink = AttemptSink(attempt, checkpoints)
    begun_s = time.monotonic()
    resume = checkpoints.newest()
    outcome = train(cell, runtime, corpus, sink=sink, resume=resume, should_stop=should_stop)
    if not isinstance(outcome, Outcome):
        raise ConfigError("train.target", "must return a supar_sweep.training.member.Outcome", value=outcome)
    if outcome.end not in ("done", "diverged"):
        at = f"{outcome.end} after {outcome.steps_done} of {cell.train.steps} steps"
        return ("timeout" if outcome.end == "timeout" else "cancelled"), at, ""
    attempt.publish(
        {
            **outcome.facts,  # first: a user's function must not overwrite what the record says
            "end": outcome.end,
            "cell_id": job["cell_id"],
            "cell": encode(cell),
            "fingerprint": job["fingerprint"],
            "summary": {
                "train_loss": finite(outcome.train_loss),
                "val_loss": finite(outcome.val_loss),
                "last_finite_loss": finite(outcome.last_finite_loss),
                "steps_done": outcome.steps_done,
            },
            "data": {
                "name": corpus.name,
                "bytes": corpus.n_bytes,
                "fingerprint": corpus.fingerprint,
            },
            **facts(str(outcome.facts.get("device", "cpu"))),
            "warnings": list(checkpoints.warnings),
            "wall_s": time.monotonic() - begun_s,
        },
        keep_checkpoints=runtime.keep_checkpoints,
    )
    return outcome.end, "", ""


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
        self.checkpoints.save(step, state)

    def warn(self, message: str) -> None:
        """Note something that went wrong without ending the run."""
        self.checkpoints.warn(message)


def _corpus(data: DataConfig) -> Corpus:
    key = json.dumps(encode(data), sort_keys=True)
    if key not in _corpora:
        _corpora[key] = load_corpus(data)
    return _corpora[key]


def _target(dotted: str | None) -> Callable[..., Outcome]:
    """Return the function that trains: the GPT's, or the user's own, imported by its dotted
    path.
    """
    if dotted is None:
        from supar_sweep.training.train import train

        return train
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
