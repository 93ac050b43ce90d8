"""A cell whose metrics were lost or damaged between two attempts: time is lost, never a part of the curve."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supar_sweep.training import run_cell as run_cell_module
from supar_sweep.training.run_cell import run_cell
from tests.test_run_cell import EVERY_2, assert_as_uninterrupted, killed, killed_at_poll
from tests.tiny import folder_of, result_of, tiny_job


def _metrics_of(job: Any) -> Path:
    return next(folder_of(job).path.glob("attempts/*/metrics.jsonl"))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut_in_a_line(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b'"step": 5') + 3])  # after four whole lines


def _noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def _wrong_line(line: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:4], line + b"\n", *lines[5:]]))

    return spoil


LOST: dict[str, tuple[Callable[[Path], Any], int]] = {
    "emptied": (_empty, 0),
    "deleted": (Path.unlink, 0),
    "random bytes": (_noise, 0),
    "cut": (_cut_in_a_line, 4),
    "{}": (_wrong_line(b"{}"), 4),
    "[]": (_wrong_line(b"[]"), 4),
    "no step": (_wrong_line(b'{"loss": 1.0}'), 4),
}


@pytest.mark.parametrize("damage", LOST)
def test_a_lost_past_costs_time_only_and_is_on_record(damage: str, tmp_path: Path) -> None:
    spoil, begun_at = LOST[damage]
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2)
    killed(killed_at_poll, job, 7)  # checkpoints of steps 4 and 6
    spoil(_metrics_of(job))
    assert run_cell(job) == "done"
    result = result_of(job)
    assert result["resumed_from_step"] == begun_at
    assert [
        f"metrics before step {step} are lost" in text for step, text in zip((6, 4), result["warnings"], strict=False)
    ]
    assert len(result["warnings"]) == (1 if begun_at else 2)
    assert all("are lost" in text for text in result["warnings"])
    assert_as_uninterrupted(job, tmp_path)


def test_a_checkpoint_from_before_its_lines_were_counted_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = run_cell_module.AttemptSink.save
    for spoilt in (False, True):
        job = tiny_job(tmp_path / f"{spoilt}", runtime=EVERY_2)
        with monkeypatch.context() as old:
            old.setattr(run_cell_module.AttemptSink, "save", _save_without_count)
            assert run_cell(job, should_stop=_stop_at(6)) == "cancelled"
        if spoilt:
            _empty(_metrics_of(job))
        assert run_cell(job) == "done"
        assert result_of(job)["resumed_from_step"] == (0 if spoilt else 6)
        assert_as_uninterrupted(job, tmp_path / f"{spoilt}")
    assert run_cell_module.AttemptSink.save is save


def _save_without_count(self: Any, step: int, state: Any) -> None:
    self.attempt.flush()
    self.checkpoints.save(step, state)


def _stop_at(poll: int) -> Callable[[], bool]:
    polls = iter(range(1_000))
    return lambda: next(polls) >= poll


def test_the_cells_of_a_cohort_lose_their_past_one_by_one(tmp_path: Path) -> None:
    jobs = [tiny_job(tmp_path / "cells", runtime=EVERY_2, seed=seed, **{"train.steps": 40}) for seed in range(3)]

    def each_has_saved() -> bool:  # how many steps that takes depends on how many share a pass
        return all(any(folder_of(job).checkpoints.glob("step-*.pt")) for job in jobs)

    run_cell_module.run_cells(jobs, should_stop=each_has_saved, ended=lambda *_: None)
    assert not any(folder_of(job).result() for job in jobs)
    _empty(_metrics_of(jobs[1]))
    ends: dict[str, str] = {}
    run_cell_module.run_cells(jobs, ended=lambda cell_id, end, _: ends.update({cell_id: end}))
    assert set(ends.values()) == {"done"}
    begun_at = [result_of(job)["resumed_from_step"] for job in jobs]
    assert begun_at[1] == 0
    assert min(begun_at[0], begun_at[2]) > 0
    for job in jobs:
        assert [line["step"] for line in folder_of(job).metrics() if "loss" in line] == list(
            range(1, job["cell"]["train"]["steps"] + 1)
        )


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock"])
def test_a_folder_in_the_place_of_a_record_says_what_to_remove(name: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime=EVERY_2)
    assert run_cell(job, should_stop=_stop_at(6)) == "cancelled"
    path = _metrics_of(job) if name == "metrics.jsonl" else folder_of(job).path / "lock"
    path.unlink()
    path.mkdir()
    ends: list[tuple[str, str]] = []
    run_cell_module.run_cells([job], ended=lambda _, end, message: ends.append((end, message)))
    ((end, message),) = ends
    assert end == "failed"
    assert f"{path} is a folder, where a file must be: remove it" in message
    path.rmdir()
    assert run_cell(job) == "done"
    assert_as_uninterrupted(job, tmp_path)
