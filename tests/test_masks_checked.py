"""The training loop checks its masks: a cell whose dead weights move fails, sound and diverged ones end as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from supar_sweep.training import train
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.run_cell import run_cell, run_cells
from tests.short_runs import run
from tests.test_mask_updates import SPARSITY
from tests.tiny import end_of, folder_of, tiny_cell, tiny_job


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


BAD_LR = 0.0123
BAD_STEP = 5


@pytest.fixture
def corrupting() -> Iterator[None]:
    """After its step BAD_STEP, an optimizer of this process whose lr is BAD_LR moves the dead weights of one layer."""
    done: dict[int, int] = {}

    def corrupt(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer.param_groups[0]["initial_lr"] != BAD_LR:
            return
        step = done[id(optimizer)] = done.get(id(optimizer), 0) + 1
        if step == BAD_STEP:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            weight = next(weight for weight in weights if weight.dim() == 2 and bool((weight == 0).any()))
            with torch.no_grad():
                weight[weight == 0] = 1e-6

    handle = register_optimizer_step_post_hook(corrupt)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("every_steps", "runtime", "last_step"),
    [
        (100, {}, 12),  # before the result at the latest
        (4, {}, 8),
        (100, {"checkpoint_every_steps": 3}, 6),
    ],
)
def test_a_cell_whose_dead_weights_move_fails_and_names_the_layer(
    every_steps: int,
    runtime: dict[str, Any],
    last_step: int,
    corrupting: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "MASK_CHECK_STEPS", every_steps)
    job = tiny_job(tmp_path / "cells", runtime=runtime, **{"hparams.lr": BAD_LR})
    assert run_cell(job) == "failed"
    assert "blocks.0.attention.qkv.weight: " in end_of(job)["message"]
    assert " dead weights are not 0. " in end_of(job)["message"]
    assert folder_of(job).metrics()[-1]["step"] == last_step
    saved = [path.name for path in folder_of(job).checkpoints.glob("step-*.pt")]
    assert saved == (["step-00000003.pt"] if runtime else [])


def test_its_company_goes_on(corrupting: None, tmp_path: Path) -> None:
    jobs = [tiny_job(tmp_path / "cells", **{"hparams.lr": lr}) for lr in (0.01, BAD_LR, 0.02)]
    ends: dict[str, str] = {}
    run_cells(jobs, ended=lambda cell_id, end, _: ends.update({cell_id: end}))
    assert [ends[job["cell_id"]] for job in jobs] == ["done", "failed", "done"]


@pytest.mark.parametrize("name", [None, *SPARSITY])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_every_step_of_a_sound_run_passes(
    name: str | None, accumulation_steps: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparsity = {} if name is None else {"sparsity": SPARSITY[name]}
    cell = tiny_cell(**{"train.steps": 20, "train.accumulation_steps": accumulation_steps, **sparsity})
    unchecked = run(corpus, cell)[1].lines
    monkeypatch.setattr(train, "MASK_CHECK_STEPS", 1)
    outcome, sink = run(corpus, cell)
    assert outcome.end == "done"
    assert sink.lines == unchecked


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_diverged_run_stays_diverged(optimizer: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MASK_CHECK_STEPS", 1)
    settings = {"name": "sgd", "decay_mode": "scaled", "clip_norm": None, "momentum": 0.9}
    cell = tiny_cell(**{"hparams.lr": 1e30, **({"optimizer": settings} if optimizer == "sgd" else {})})
    assert run(corpus, cell)[0].end == "diverged"
