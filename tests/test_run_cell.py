"""run_cell with real processes, real kills and real full disks: every way in, every typed end."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig, DataConfig
from supar_sweep.sweep.records import Attempt, CellFolder
from supar_sweep.training import run_cell as run_cell_module
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.member import Outcome
from supar_sweep.training.run_cell import run_cell
from tests.tiny import end_of, folder_of, result_of, tiny_job

EVERY_2 = {"checkpoint_every_steps": 2}
RESUMED_ONLY = {
    "attempt",
    "pid",
    "started_s",
    "resumed_from_step",
    "route_reason",
    "compute_reason",
    "kernel_reason",
    "warnings",
}
TIMES = {"wall_s", "train_s"}


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must not hang on how often a run was interrupted."""
    return {k: v for k, v in result.items() if k not in RESUMED_ONLY | TIMES}


def assert_as_uninterrupted(job: Any, tmp_path: Path) -> None:
    whole = {**job, "store": str(tmp_path / "uninterrupted")}
    assert run_cell(whole) == "done"
    assert folder_of(job).metrics() == folder_of(whole).metrics()
    assert numbers(result_of(job)) == numbers(result_of(whole))


# ---------------------------------------------------------------- in a process of its own


def killed_at_poll(job: Any, poll: int) -> None:
    polls = 0

    def should_stop() -> bool:
        nonlocal polls
        if polls == poll:
            os.kill(os.getpid(), signal.SIGKILL)
        polls += 1
        return False

    run_cell(job, should_stop=should_stop)


def _killed_at_publish(job: Any) -> None:
    def publish(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Attempt.publish = publish  # type: ignore[method-assign]
    run_cell(job)


def _run_slowly(job: Any) -> None:
    run_cell(job, should_stop=lambda: time.sleep(0.01))


def start(target: Callable[..., None], *args: Any) -> Any:
    # a fork of a clean process that has torch imported (its optimizers import dynamo): no 3 s each
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["supar_sweep.training.train", "torch._dynamo"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def killed(target: Callable[..., None], *args: Any) -> None:
    process = start(target, *args)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


# ---------------------------------------------------------------- tests


def test_a_cell_runs_and_says_everything(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, runtime=EVERY_2)
    assert run_cell(job) == "done"
    result = result_of(job)
    assert result["end"] == "done"
    assert result["cell_id"] == job["cell_id"] == folder_of(job).cell_id
    assert result["fingerprint"] == result["data"]["fingerprint"] == job["fingerprint"]
    assert result["data"]["name"] == "stdlib"
    assert result["provenance"] == {"tests": True}
    assert set(result["summary"]) == {"train_loss", "val_loss", "last_finite_loss", "steps_done"}
    assert result["summary"]["steps_done"] == 12
    assert 3 < result["summary"]["val_loss"] < 5.5
    assert result["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "supar_sweep"} <= set(result["versions"])
    for key in ("host", "device_name", "route", "threads", "m_d", "m_rho", "mask_hash", "flops"):
        assert result[key], key
    assert 0 < result["train_s"] <= result["wall_s"]
    assert result["cell"]["model"]["width"] == 32
    # the stored cell is the whole cell, as a reader of records decodes it
    assert decode(CellConfig, result["cell"]) == decode(CellConfig, job["cell"])
    assert end_of(job)["end"] == "done"
    assert not (folder_of(job).path / "checkpoints").exists()
    assert len([m for m in folder_of(job).metrics() if "loss" in m]) == 12


def test_a_complete_cell_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(tmp_path)
    assert run_cell(job) == "done"
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run_cell(job) == "done"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    # published by another process between our look and our lock
    real, looks = CellFolder.result, iter([None])
    monkeypatch.setattr(CellFolder, "result", lambda self: next(looks, real(self)))
    assert run_cell(job) == "done"
    assert len(folder_of(job).attempts()) == 1


def test_checkpoints_are_kept_where_asked(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, runtime={**EVERY_2, "keep_checkpoints": True})
    assert run_cell(job) == "done"
    kept = sorted(p.name for p in (folder_of(job).path / "checkpoints").glob("*.pt"))
    assert kept == ["step-00000010.pt", "step-00000012.pt"]


@pytest.mark.parametrize("poll", [0, 1, *random.Random(0).sample(range(2, 12), 3)])
def test_sigkill_at_any_step_then_again_is_as_never_killed(poll: int, tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2, **{"train.eval_every_steps": 3})
    killed(killed_at_poll, job, poll)
    assert folder_of(job).result() is None
    assert run_cell(job) == "done"
    assert result_of(job)["resumed_from_step"] == poll // 2 * 2
    assert_as_uninterrupted(job, tmp_path)


def test_killed_again_and_again(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2)
    for _ in range(4):
        killed(killed_at_poll, job, 3)  # three steps further each time, of which two are kept
    assert run_cell(job) == "done"
    assert result_of(job)["attempt"] == 5
    assert result_of(job)["resumed_from_step"] == 8
    assert_as_uninterrupted(job, tmp_path)


@pytest.mark.parametrize("poll", [3, 6])
@pytest.mark.parametrize("method", ["set", "rigl", "gmp"])
def test_killed_between_changes_of_its_masks(method: str, poll: int, tmp_path: Path) -> None:
    sparsity: dict[str, Any] = {"method": method, "update_fraction": 0.2, "stop_fraction": 0.75}
    more = {"start_fraction": 0.0, "hparams_density": "current"} if method == "gmp" else {"drop_fraction": 0.3}
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2, sparsity={**sparsity, **more})
    killed(killed_at_poll, job, poll)
    assert run_cell(job) == "done"
    result = result_of(job)
    assert result["resumed_from_step"] == 2 * (poll // 2)
    assert result["mask_updates"] == 4
    assert_as_uninterrupted(job, tmp_path)


def test_killed_between_the_last_checkpoint_and_publication(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2)
    killed(_killed_at_publish, job)
    assert run_cell(job) == "done"
    assert result_of(job)["resumed_from_step"] == 12
    assert_as_uninterrupted(job, tmp_path)


def test_killed_from_outside_at_any_moment(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2, **{"train.steps": 60})
    process = start(_run_slowly, job)
    checkpoints = folder_of(job).path / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run_cell(job) == "busy"
    time.sleep(random.Random().uniform(0, 0.2))
    process.kill()
    process.join()
    assert run_cell(job) == "done"
    assert result_of(job)["resumed_from_step"] > 0
    assert_as_uninterrupted(job, tmp_path)


@pytest.mark.parametrize("n_damaged", [1, 2])
def test_damaged_checkpoints_cost_time_only_and_are_on_record(n_damaged: int, tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2)
    killed(killed_at_poll, job, 7)
    paths = sorted((folder_of(job).path / "checkpoints").glob("*.pt"))
    for path in paths[-n_damaged:]:
        os.truncate(path, path.stat().st_size - 100)
    assert run_cell(job) == "done"
    result = result_of(job)
    assert result["resumed_from_step"] == {1: 4, 2: 0}[n_damaged]
    assert len(result["warnings"]) == n_damaged
    assert "torn" in result["warnings"][0]
    assert_as_uninterrupted(job, tmp_path)


def test_a_checkpoint_of_another_cell_fails_and_is_not_touched(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, runtime=EVERY_2)
    other = tiny_job(tmp_path, runtime=EVERY_2, seed=1)
    killed(killed_at_poll, other, 5)
    there, here = (folder_of(j).path / "checkpoints" for j in (other, job))
    here.parent.mkdir(parents=True)
    there.rename(here)
    assert run_cell(job) == "failed"
    assert f"belongs to cell {other['cell_id']}, not to {job['cell_id']}" in end_of(job)["message"]
    here.rename(there)
    assert run_cell(other) == "done"
    assert run_cell(job) == "done"


def test_a_mask_that_does_not_match_fails_with_its_hash(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, runtime=EVERY_2)
    killed(killed_at_poll, {**job, "cell": {**job["cell"], "seed": 5}}, 5)
    assert run_cell(job) == "failed"
    assert "has other masks (hash" in end_of(job)["message"]
    assert list((folder_of(job).path / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (True, "cancelled"),
        ("cancelled", "cancelled"),
        ("timeout", "timeout"),
        ("preempted", "cancelled"),
    ],
)
def test_a_stop_in_the_middle_goes_on_later(answer: Any, end: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells")
    answers = iter([None] * 7 + [answer])
    assert run_cell(job, should_stop=lambda: next(answers)) == end
    assert end_of(job)["end"] == end
    assert end_of(job)["message"].endswith("after 7 of 12 steps")
    assert run_cell(job) == "done"
    assert result_of(job)["resumed_from_step"] == 7
    assert_as_uninterrupted(job, tmp_path)


def test_a_cell_that_another_works_on_is_busy(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    with Attempt(folder_of(job), job["cell"], {}):
        assert run_cell(job) == "busy"
    assert run_cell(job) == "done"


def test_divergence_is_published(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **{"hparams.lr": 1e30})
    assert run_cell(job) == "diverged"
    summary = result_of(job)["summary"]
    assert summary["train_loss"] is summary["val_loss"] is None
    assert summary["last_finite_loss"] > 0
    assert summary["steps_done"] < 12
    assert folder_of(job).metrics()[-1]["loss"] is None or summary["steps_done"] >= 3
    assert run_cell(job) == "diverged"
    assert len(folder_of(job).attempts()) == 1


def test_a_training_function_of_ones_own(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **{"train.target": f"{__name__}.counts_to_ten"})
    polls = iter([False] * 3 + [True])
    assert run_cell(job, should_stop=lambda: next(polls)) == "cancelled"
    assert run_cell(job) == "done"
    result = result_of(job)
    assert (result["summary"]["train_loss"], result["resumed_from_step"]) == (0.1, 4)
    assert (result["colour"], result["end"]) == ("green", "done")
    assert [line["step"] for line in folder_of(job).metrics()] == list(range(1, 11))


def counts_to_ten(cell: Any, runtime: Any, corpus: Any, *, sink: Any, resume: Any, should_stop: Any) -> Outcome:
    """A training function of a user's own, with metrics, a checkpoint and a stop."""
    start_at = resume["step"] if resume else 0
    sink.begin(start_at)
    for step in range(start_at + 1, 11):
        sink.log(step=step, loss=1.0 / step)
        sink.save(step, {"total": torch.tensor(step)})
        if should_stop():
            return Outcome(end="cancelled", steps_done=step)
    return Outcome(end="done", steps_done=10, train_loss=0.1, facts={"colour": "green", "end": "red"})


def test_a_corpus_is_read_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[DataConfig] = []

    def counted(data: DataConfig) -> Corpus:
        reads.append(data)
        return load_corpus(data)

    monkeypatch.setattr(run_cell_module, "_corpora", {})
    monkeypatch.setattr(run_cell_module, "load_corpus", counted)
    for seed in (0, 1):
        assert run_cell(tiny_job(tmp_path, seed=seed)) == "done"
    assert len(reads) == 1


def test_a_job_is_plain_json_and_a_moved_store_still_works(tmp_path: Path) -> None:
    job = json.loads(json.dumps(tiny_job(tmp_path / "here", runtime=EVERY_2)))
    killed(killed_at_poll, job, 5)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = {**job, "store": str(tmp_path / "there")}
    assert run_cell(moved) == "done"
    assert result_of(moved)["resumed_from_step"] == 4


FREED = """
import gc, sys, weakref
from supar_sweep.training import environment, trainer
from supar_sweep.training.corpus import load_corpus
from tests.short_runs import run
from tests.tiny import tiny_cell

environment.prepare_process(1)
built, models = trainer.build, []

def build(*arguments):
    model, plans = built(*arguments)
    models.append(weakref.ref(model))
    return model, plans

trainer.build = build
gc.disable()
run(load_corpus(tiny_cell().data), runtime={"compute": sys.argv[1]})
sys.exit(len(models) != 1 or models[0]() is not None)
"""


@pytest.mark.parametrize("compute", ["dense", "compact"])
def test_a_workers_first_model_is_freed_without_waiting_for_the_collector(compute: str) -> None:
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", FREED, compute], cwd=root, timeout=120).returncode == 0


def test_importing_run_cell_loads_no_torch() -> None:
    code = "import sys, supar_sweep.training.run_cell; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
