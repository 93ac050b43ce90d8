"""run_cell where things fail: bad settings, changed data, exceptions, full disks, torn records."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_sweep.errors import RecordError
from supar_sweep.training import run_cell as run_cell_module
from supar_sweep.training.member import Outcome
from supar_sweep.training.run_cell import run_cell
from tests.full_disk import files_up_to
from tests.tiny import end_of, folder_of, result_of, tiny_job, tiny_plain


def assert_as_uninterrupted(job: Any, tmp_path: Path) -> None:
    whole = {**job, "store": str(tmp_path / "uninterrupted")}
    assert run_cell(whole) == "done"
    assert folder_of(job).metrics() == folder_of(whole).metrics()
    assert result_of(job)["summary"] == result_of(whole)["summary"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.width": 33}, "cell.model.width: must be a multiple of d_head"),
        ({"density": 0}, "cell.density: out of range"),
        ({"train.stepz": 3}, "cell.train.stepz: unknown key; did you mean 'steps'?"),
        ({"train.target": "nowhere.to.be_found"}, "train.target: cannot be imported"),
        ({"train.target": "nodots"}, "cell.train.target: is not a dotted path"),
        ({"train.target": "math.nothing"}, "train.target: cannot be imported"),
        ({"train.target": "math.pi"}, "train.target: is not a function"),
        ({"density": 1e-5}, "density: leaves layer blocks.0.attention.qkv.weight"),
        ({"data": {"name": "text", "val_fraction": 0.1, "paths": ["/nowhere"]}}, "data.paths: no"),
        ({"train.batch_seqs": 10**7}, "data.name=stdlib: the training part has"),
    ],
)
def test_bad_settings_end_as_failed_with_their_text(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    job = {**tiny_job(tmp_path), "cell": tiny_plain(**overrides)}
    assert run_cell(job) == "failed"
    end = end_of(job)
    assert end["end"] == "failed"
    assert end["message"].startswith(message)
    assert "Traceback" in (folder_of(job).attempts()[-1] / "log.txt").read_text()
    assert folder_of(job).result() is None


def test_a_corpus_that_changed_since_submission_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "corpus.txt"
    path.write_bytes(bytes(range(256)) * 20)
    data = {"name": "text", "val_fraction": 0.2, "paths": [str(path)]}
    job = tiny_job(tmp_path / "cells", data=data)
    path.write_bytes(bytes(range(256)) * 19)
    assert run_cell(job) == "failed"
    assert "the corpus has changed since this cell was submitted" in end_of(job)["message"]
    path.write_bytes(bytes(range(256)) * 20)
    monkeypatch.setattr(run_cell_module, "_corpora", {})
    assert run_cell(job) == "done"


def out_of_memory(*_: Any, **__: Any) -> Outcome:
    raise MemoryError


def out_of_torch_memory(*_: Any, **__: Any) -> Outcome:
    torch.empty(1 << 60, dtype=torch.uint8)  # the allocator's own error
    raise AssertionError("an exbibyte was there")


def out_of_gpu_memory(*_: Any, **__: Any) -> Outcome:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024 GiB")


def no_room_on_the_gpu(*_: Any, **__: Any) -> Outcome:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def broken(*_: Any, **__: Any) -> Outcome:
    return Outcome(end="done", steps_done=1 // 0)


def leaves(*_: Any, **__: Any) -> Outcome:
    sys.exit("enough")


def fills_the_disk(*_: Any, **__: Any) -> Outcome:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    raise OSError("the first error")


def returns_nonsense(*_: Any, **__: Any) -> Any:
    return 0.5


@pytest.mark.parametrize(
    ("function", "end", "message"),
    [
        (out_of_memory, "oom", "out of memory"),
        (out_of_torch_memory, "oom", "RuntimeError: "),
        (out_of_gpu_memory, "oom", "OutOfMemoryError: CUDA out of memory"),
        (no_room_on_the_gpu, "oom", "RuntimeError: CUDA error: out of memory"),
        (broken, "failed", "ZeroDivisionError: "),
        (leaves, "failed", "SystemExit: enough"),
        (returns_nonsense, "failed", "train.target: must return"),
    ],
)
def test_exceptions_become_typed_ends(function: Callable[..., Any], end: str, message: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **{"train.target": f"{__name__}.{function.__name__}"})
    assert run_cell(job) == end
    assert end_of(job)["end"] == end
    assert end_of(job)["message"].startswith(message)
    log = (folder_of(job).attempts()[-1] / "log.txt").read_text()
    assert function.__name__ in log or function is returns_nonsense  # it had returned when it failed


def ends_without_a_number(*_: Any, **__: Any) -> Outcome:
    return Outcome(end="done", steps_done=10, train_loss=math.nan, val_loss=0.1, last_finite_loss=0.5)


def test_a_loss_that_is_no_number_is_a_divergence_whatever_the_users_function_calls_it(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **{"train.target": f"{__name__}.{ends_without_a_number.__name__}"})
    assert run_cell(job) == "diverged"
    result = folder_of(job).result()
    assert result is not None
    assert result["end"] == "diverged"
    assert result["summary"] == {"train_loss": None, "val_loss": None, "last_finite_loss": 0.5, "steps_done": 10}


def test_a_result_that_cannot_be_written_fails_and_loses_nothing(tmp_path: Path) -> None:
    # metrics and the end's file fit, the result does not, and no checkpoint does
    job = tiny_job(tmp_path / "cells", runtime={"checkpoint_every_steps": 6})
    with files_up_to(3000):
        assert run_cell(job) == "failed"
    assert "cannot write" in end_of(job)["message"]
    assert "result.json" in end_of(job)["message"]
    assert folder_of(job).result() is None
    assert run_cell(job) == "done"
    assert_as_uninterrupted(job, tmp_path)


def test_an_end_that_cannot_be_written_is_handed_on(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **{"train.target": f"{__name__}.fills_the_disk"})
    with (
        pytest.raises(RecordError, match=r"the first error; nor could this end be recorded"),
        files_up_to(10**9),
    ):
        run_cell(job)


def test_checkpoints_that_cannot_be_written_are_warnings_on_record(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime={"checkpoint_every_steps": 6})
    with files_up_to(60_000):  # a checkpoint has about 700 kB
        assert run_cell(job) == "done"
    warned = result_of(job)["warnings"]
    assert [w.partition(" not written")[0] for w in warned] == [
        "checkpoint at step 6",
        "checkpoint at step 12",
    ]
    assert_as_uninterrupted(job, tmp_path)


def test_a_store_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = {**tiny_job(tmp_path), "store": str(tmp_path / "file")}
    with pytest.raises(RecordError, match=r"cannot write .*file"):
        run_cell(job)


def test_a_torn_result_is_one_clear_error(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    assert run_cell(job) == "done"
    (folder_of(job).path / "result.json").write_text('{"end": "do')
    with pytest.raises(RecordError, match=r"result\.json"):
        run_cell(job)


def test_ctrl_c_is_on_record_and_goes_through(tmp_path: Path) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    job = tiny_job(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_cell(job, should_stop=interrupt)
    assert end_of(job)["end"] == "cancelled"
    assert run_cell(job) == "done"
