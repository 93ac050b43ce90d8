"""Several processes that train one cell together: real ones, over gloo, against one process alone."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from supar_sweep.config.schema import check_ranks
from supar_sweep.errors import ConfigError
from supar_sweep.training.run_cell import run_cells
from tests import rank_cells
from tests.elements import start, wait
from tests.tiny import end_of, folder_of, result_of, tiny_cell, tiny_job

# starting torch twice is most of an element's time, so few elements, with many cells each
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

SWAPS = {"update_fraction": 0.2, "drop_fraction": 0.3, "stop_fraction": 0.75}
LEFT = 128 + signal.SIGTERM

CELLS: dict[str, dict[str, Any]] = {
    "dense": {"density": 1.0},
    "masked": {"train.eval_every_steps": 5, "runtime": {"checkpoint_every_s": 0.01}},
    "compact": {"density": 1 / 8, "runtime": {"compute": "compact"}},
    "rigl": {"sparsity": {"method": "rigl", **SWAPS}},
    "in parts": {"train.accumulation_steps": 2, "optimizer.clip_norm": 0.01},
    "saved": {"train.steps": 13, "runtime": {"checkpoint_every_steps": 1, "keep_checkpoints": True}},
}


def alone(job: Any, folder: Path) -> Any:
    """The same job, trained by this process."""
    job = {**job, "store": str(folder)}
    run_cells([job], ended=lambda *_: None)
    return job


def assert_same_curve(job: Any, solo: Any, rel: float = 1e-5) -> None:
    """Not bit for bit: sums are taken in another order."""
    lines, expected = folder_of(job).metrics(), folder_of(solo).metrics()
    assert len(lines) >= job["cell"]["train"]["steps"]
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=rel)


@pytest.fixture(scope="module")
def element(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """All kinds of cells, trained by two tasks, of which the second cannot write a file."""
    runs = tmp_path_factory.mktemp("runs")
    jobs = {name: tiny_job(runs / "cells", **cell) for name, cell in CELLS.items()}
    codes, printed = wait(start(runs, list(jobs.values()), tasks=2, mute={1}))
    assert codes == [0, 0], "\n".join(printed)
    return jobs, printed


@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_give_the_curve_of_one(element: Any, name: str, tmp_path: Path) -> None:
    job, solo = element[0][name], alone(element[0][name], tmp_path)
    assert_same_curve(job, solo)
    together, one = result_of(job), result_of(solo)
    assert (together["ranks"], one["ranks"]) == (2, 1)
    for key in ("end", "mask_hash", "params", "tokens", "flops", "compute"):
        assert together[key] == one[key], key
    assert together["summary"] == pytest.approx(one["summary"], rel=1e-5)


def test_only_rank_0_writes_and_all_know_how_it_ended(element: Any) -> None:
    jobs, printed = element
    for job in jobs.values():
        assert len(folder_of(job).attempts()) == 1
        assert f"{job['cell_id']}: done" in printed[1]
    assert (folder_of(jobs["saved"]).checkpoints / "step-00000013.pt").exists()


def test_what_goes_wrong_on_one_rank_ends_the_cell_on_all_with_a_word(tmp_path: Path) -> None:
    seeds = (rank_cells.OTHER_MASKS, rank_cells.RAISES, rank_cells.HUNGRY, 0, rank_cells.KILLED)
    other_masks, raises, hungry, good, killed = jobs = [tiny_job(tmp_path / "cells", seed=seed) for seed in seeds]
    codes, printed = wait(start(tmp_path, jobs, tasks=2, function=rank_cells.RUN))

    said = [end_of(job) for job in (other_masks, raises, hungry)]
    assert [each["end"] for each in said] == ["failed", "failed", "oom"], printed
    assert said[0]["message"].startswith("hash of the masks: rank 1 of 2 has ")
    assert said[1]["message"] == "rank 1 of 2: RuntimeError: no luck"
    assert "rank 1 of 2: MemoryError: not one byte left" in said[2]["message"]
    assert folder_of(other_masks).metrics() == []
    for job in (raises, hungry):
        assert folder_of(job).metrics()[-1]["step"] == rank_cells.AT_STEP
    assert result_of(good)["end"] == "done"
    # who kills a process is for SLURM to say: the other leaves the cell as a process that was killed does
    assert codes == [1, -signal.SIGKILL]
    assert folder_of(killed).last_end() is None
    assert not folder_of(killed).is_locked()
    assert "one of the 2 ranks is gone" in printed[0]


@pytest.mark.gpu
def test_two_gpus_give_the_curve_of_one(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed: NCCL takes no more than one rank each")
    runtime = {"device": "cuda", "checkpoint_every_steps": 5}
    jobs = [
        tiny_job(tmp_path / "cells", runtime=runtime),
        tiny_job(tmp_path / "cells", runtime={**runtime, "compute": "compact"}, seed=1),
        tiny_job(tmp_path / "cells", runtime=runtime, sparsity={"method": "rigl", **SWAPS}),
    ]
    codes, printed = wait(start(tmp_path, jobs, tasks=2))
    assert codes == [0, 0], printed
    for job in jobs:
        assert (result_of(job)["ranks"], result_of(job)["device"]) == (2, "cuda")
        assert_same_curve(job, alone(job, tmp_path / "alone"), rel=1e-4)


def begun(job: Any, processes: list[subprocess.Popen[str]], steps: int) -> None:
    """Wait until a cell has so many steps."""
    while not any(line["step"] >= steps for line in folder_of(job).metrics()):
        assert all(process.poll() is None for process in processes), wait(processes)
        time.sleep(0.05)


def test_a_stop_that_one_rank_hears_saves_and_ends_all_and_the_next_start_goes_on(tmp_path: Path) -> None:
    long = {"train.steps": 300, "train.precision": "float64"}
    job = tiny_job(tmp_path / "cells", runtime={"checkpoint_every_steps": 10}, **long)
    processes = start(tmp_path, [job], tasks=2)
    begun(job, processes, 10)
    processes[1].send_signal(signal.SIGTERM)
    codes, printed = wait(processes)
    assert codes == [LEFT, 0], printed
    end = end_of(job)
    done = folder_of(job).metrics()[-1]["step"]
    assert (end["end"], end["message"]) == ("cancelled", f"cancelled after {done} of 300 steps")
    assert (folder_of(job).checkpoints / f"step-{done:08d}.pt").exists()

    codes, printed = wait(start(tmp_path, [job], tasks=2))
    assert codes == [0, 0], printed
    assert len(folder_of(job).attempts()) == 2
    assert_same_curve(job, alone(job, tmp_path / "alone"), rel=1e-9)


@pytest.mark.slow
def test_ranks_go_back_together_where_the_past_is_lost(tmp_path: Path) -> None:
    long = {"train.steps": 300, "train.precision": "float64"}
    job = tiny_job(tmp_path / "cells", runtime={"checkpoint_every_steps": 10}, **long)
    processes = start(tmp_path, [job], tasks=2)
    begun(job, processes, 10)
    processes[1].send_signal(signal.SIGTERM)
    wait(processes)
    (folder_of(job).attempts()[0] / "metrics.jsonl").write_bytes(b"")
    codes, printed = wait(start(tmp_path, [job], tasks=2))
    assert codes == [0, 0], printed
    assert result_of(job)["resumed_from_step"] == 0
    assert all("are lost" in warning for warning in result_of(job)["warnings"])
    assert_same_curve(job, alone(job, tmp_path / "alone"), rel=1e-9)


@pytest.mark.parametrize(
    ("overrides", "world_size", "said"),
    [
        ({}, 3, "train.batch_seqs: cannot be shared by 3 processes (got 4); allowed: a multiple of 3"),
        (
            {"train.accumulation_steps": 2},
            4,
            "train.batch_seqs: cannot be shared by 4 processes in train.accumulation_steps = 2 parts (got 4); "
            "allowed: a multiple of 8",
        ),
        ({"train.target": "mine.train"}, 2, "train.target: cannot be trained by 2 processes together"),
    ],
)
def test_batches_that_cannot_be_shared_are_an_error(overrides: dict[str, Any], world_size: int, said: str) -> None:
    cell = tiny_cell(**overrides)
    check_ranks(cell, 1)
    with pytest.raises(ConfigError) as error:
        check_ranks(cell, world_size)
    assert str(error.value).startswith(said)
