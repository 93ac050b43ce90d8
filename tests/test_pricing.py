"""What the scheduler knows of a machine and a cell: threads, GPUs, memory, who is trained with whom."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from supar_sweep.cli.launch import check_shares, price, with_threads
from supar_sweep.cli.rooms import conf_dir
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.cohorts import Price
from supar_sweep.training.cost import (
    COMPACT_FLOPS_MULT,
    FLOPS_A_THREAD,
    MOST_TOGETHER,
    WORTH_STACKING_FLOPS,
    count_parameters,
    flops_per_step,
    memory_gb,
    most_together,
    relative_cost,
    threads_for,
)
from supar_sweep.training.environment import memory_of_machine_gb, visible_gpus
from tests.grids import pool
from tests.tiny import RUNTIME, tiny_cell

BIG = {"model.width": 2048, "train.batch_seqs": 64}


def settings(**runtime: Any) -> Settings:
    plain = {"runtime": {**RUNTIME, **runtime}, "launcher": {"name": "local", "processes": None, "grace_s": 1.0}}
    return Settings(command="run", plain=plain, overrides=())


def test_a_cells_cost_is_its_flops_and_compact_layers_save_those_of_dead_weights() -> None:
    cell = tiny_cell(density=1 / 16)
    steps, dense = cell.train.steps, flops_per_step(cell, dense_compute=True)
    assert relative_cost(cell, compact=False) == steps * dense
    hidden = 6 * cell.train.batch_seqs * cell.model.context_tokens * count_parameters(cell).sparse_total
    expected = steps * (dense - hidden * (1 - COMPACT_FLOPS_MULT / 16))
    assert relative_cost(cell, compact=True) == pytest.approx(expected)
    almost_dense = tiny_cell(density=0.9)  # compact would be slower, so nobody computes it so
    assert relative_cost(almost_dense, compact=True) == relative_cost(almost_dense, compact=False)


def test_small_cells_are_trained_together_as_far_as_memory_goes() -> None:
    cell = tiny_cell()
    assert most_together(cell, device="cpu", free_gb=math.inf) == MOST_TOGETHER["cpu"]
    assert most_together(cell, device="cuda", free_gb=math.inf) == MOST_TOGETHER["cuda"]
    assert most_together(cell, device="cpu", free_gb=3.5 * memory_gb(cell)) == 3
    assert most_together(cell, device="cpu", free_gb=0) == 1
    big = tiny_cell(**BIG)
    assert flops_per_step(big, dense_compute=True) > WORTH_STACKING_FLOPS["cpu"]
    assert most_together(big, device="cpu", free_gb=math.inf) == 1


def test_idle_cores_become_threads_where_there_is_work_for_them() -> None:
    big, small = tiny_cell(**BIG), tiny_cell()
    assert flops_per_step(big) > 4 * FLOPS_A_THREAD
    assert threads_for(big, 4) == 4
    assert threads_for(small, 4) == 1
    assert threads_for(big, 0) == 1


def test_threads_are_as_asked_else_what_the_cells_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    big = tiny_cell(**BIG)

    def threads(n_cells: int, **runtime: Any) -> int | None:
        return with_threads(settings(**{"threads": None, **runtime}), [big] * n_cells).runtime().threads

    assert [threads(n) for n in (0, 1, 2, 3, 8, 100)] == [1, 8, 4, 2, 1, 1]
    assert threads(1, threads=3) == 3


def test_a_price_says_who_can_be_trained_together(tmp_path: Path) -> None:
    cell = tiny_cell()
    others = {
        "seed, lr, density and rules": (
            tiny_cell(seed=1, density=0.5, parameterization="sp", **{"hparams.lr": 1.0}),
            True,
        ),
        "steps": (tiny_cell(**{"train.steps": 99}), True),
        "width": (tiny_cell(**{"model.width": 64}), False),
        "batch": (tiny_cell(**{"train.batch_seqs": 8}), False),
        "precision": (tiny_cell(**{"train.precision": "float64"}), False),
        "data": (tiny_cell(**{"data.val_fraction": 0.2}), False),
    }
    with pool(tmp_path) as launcher:
        of = price(settings(), launcher.processes)
        for what, (other, same) in others.items():
            assert (of(other).shape == of(cell).shape) == same, what
        assert of(cell).together == MOST_TOGETHER["cpu"]
        assert price(settings(cohort=3), launcher.processes)(cell).together == 3
        assert price(settings(compile=True), launcher.processes)(cell).together == 1
        assert of(tiny_cell(**{"train.target": "mine.train"})).together == 1
        assert of(tiny_cell(density=0.01)).cost == price(settings(compute="dense"), launcher.processes)(cell).cost
        assert price(settings(compute="auto"), launcher.processes)(tiny_cell(density=0.01)).cost < of(cell).cost
    assert encode(cell.model)["width"] == 32


def test_on_slurm_an_elements_processes_share_its_memory_and_larger_cells_have_more(tmp_path: Path) -> None:
    small, large = tiny_cell(), tiny_cell(**{"model.width": 64})
    assert memory_gb(small) < memory_gb(large)
    between_gb = (memory_gb(small) + memory_gb(large)) / 2
    plain = {
        **dict.fromkeys(("partition", "account", "qos", "constraint", "gpus_per_node", "gpu_memory_gb")),
        **{
            "name": "slurm",
            "wait": True,
            "nodes": 1,
            "tasks_per_node": None,
            "cpus": 1,
            "processes_per_gpu": None,
            "mem_gb": 3.5 * memory_gb(large) / 0.8,
        },
        **{"timeout_min": 10, "array_parallelism": 4, "max_elements": 100, "signal_delay_s": 30, "poll_s": 1.0},
        **{"grace_s": 2.0, "setup": [], "sbatch": {}, "larger": []},
    }

    def of(compute: str = "dense", **changes: Any) -> Callable[[CellConfig], Price]:
        runtime = {**RUNTIME, "compute": compute}
        command = Settings(command="run", plain={"runtime": runtime, "launcher": {**plain, **changes}}, overrides=())
        with pool(tmp_path) as launcher:
            return price(command, launcher.processes)

    assert of()(large).together == 3
    assert of(processes_per_gpu=3)(large).together == 1
    row = {"above_gb": between_gb, "mem_gb": 5.5 * memory_gb(large) / 0.8}
    assert of(larger=[row])(large).together == 5
    assert of(larger=[row])(small).together == of()(small).together

    # so do its cores, and nobody says how many threads where some cells have others
    def threads(**changes: Any) -> int | None:
        runtime = {**RUNTIME, "threads": None}
        command = Settings(command="run", plain={"runtime": runtime, "launcher": {**plain, **changes}}, overrides=())
        return with_threads(command, []).runtime().threads

    assert [threads(cpus=8), threads(cpus=8, processes_per_gpu=3), threads(cpus=8, processes_per_gpu=9)] == [8, 2, 1]
    assert threads(cpus=8, larger=[row]) == 8
    assert threads(cpus=8, larger=[{"above_gb": 1, "cpus": 16}]) is None
    # cells of one shape that ask for different things are not trained by one process
    sparse = tiny_cell(density=0.1)
    between_gb = (memory_gb(sparse, compact=True) + memory_gb(small, compact=True)) / 2
    row = {"above_gb": between_gb, "timeout_min": 20}
    assert of("compact")(sparse).shape == of("compact")(small).shape
    assert of("compact", larger=[row])(sparse).shape != of("compact", larger=[row])(small).shape


def over_ranks(**runtime: Any) -> Settings:
    launcher = OmegaConf.to_container(OmegaConf.load(conf_dir() / "launcher" / "slurm.yaml"))
    assert isinstance(launcher, dict)
    plain = {"runtime": {**RUNTIME, **runtime}, "launcher": {**launcher, "nodes": 2, "gpus_per_node": 2}}
    return Settings(command="run", plain=plain, overrides=())


def test_what_several_processes_train_together_they_train_alone(tmp_path: Path) -> None:
    cell = tiny_cell()
    with pool(tmp_path) as launcher:
        assert price(over_ranks(), launcher.processes)(cell).together == 1
    check_shares(over_ranks(), [cell])
    check_shares(settings(cohort=3), [tiny_cell(**{"train.batch_seqs": 3})])  # one process takes any
    with pytest.raises(ConfigError, match=r"train.batch_seqs: cannot be shared by 4 processes \(got 6\)"):
        check_shares(over_ranks(), [cell, tiny_cell(**{"train.batch_seqs": 6})])
    with pytest.raises(ConfigError, match=r"runtime.cohort: has no effect where 4 processes train each cell together"):
        check_shares(over_ranks(cohort=3), [cell])
    row = {"above_gb": memory_gb(cell), "nodes": 3, "gpus_per_node": 1}
    plain = over_ranks().plain
    changed = {"nodes": 1, "gpus_per_node": 1, "larger": [row]}
    larger = replace(over_ranks(), plain={**plain, "launcher": {**plain["launcher"], **changed}})
    check_shares(larger, [cell])
    with pytest.raises(ConfigError, match=r"cannot be shared by 3 processes \(got 4\)"):
        check_shares(larger, [cell, tiny_cell(**{"model.width": 64})])


SMI = """#!/bin/sh
echo "0, GPU-aa, 81559"
echo "1, GPU-bb, 40960"
"""


def test_gpus_are_those_that_the_driver_lists_and_the_user_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == {}
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    big, small = 81559 * 2**20 / 1e9, 40960 * 2**20 / 1e9
    assert visible_gpus() == {"0": big, "1": small}
    for allowed, expected in {"1": {"1": small}, "GPU-bb,0": {"GPU-bb": small, "0": big}, "": {}, "7": {}}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
        assert visible_gpus() == expected
        assert list(visible_gpus()) == list(expected)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == {}


def test_free_memory_is_less_than_there_is() -> None:
    assert 0 < memory_of_machine_gb() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
