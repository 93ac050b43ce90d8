"""SET, RigL and GMP in training: what changes at an update, what never does, and runs that were stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import CheckpointError, ConfigError
from supar_sweep.sparse.linear import named_masks
from supar_sweep.sparse.noise import bits, stream_key
from supar_sweep.training.checkpoint import Checkpoints
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.probes import cell_coordinates
from supar_sweep.training.trainer import Trainer
from tests.short_runs import run
from tests.tiny import tiny_cell, tiny_runtime

SWAPS = {"update_fraction": 0.1, "stop_fraction": 0.75, "drop_fraction": 0.3}
PRUNES = {"method": "gmp", "update_fraction": 0.1, "start_fraction": 0.1, "stop_fraction": 0.75}
SPARSITY: dict[str, dict[str, Any]] = {
    "set": {"method": "set", **SWAPS},
    "rigl": {"method": "rigl", **SWAPS},
    "gmp": {**PRUNES, "hparams_density": "final"},
    "gmp, current": {**PRUNES, "hparams_density": "current"},
}
SGD = {"name": "sgd", "decay_mode": "scaled", "clip_norm": 1.0, "momentum": 0.9}
STEPS = 20  # updates after steps 2, 4, 6, ... up to 14


def cell_of(name: str, **overrides: Any) -> CellConfig:
    return tiny_cell(**{"train.steps": STEPS, "sparsity": SPARSITY[name], **overrides})


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


def trainer_of(cell: CellConfig) -> Trainer:
    return Trainer(cell, tiny_runtime(), torch.device("cpu"), None)


def masks_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in named_masks(trainer.model).items()}


@pytest.mark.parametrize(
    "overrides",
    [{}, {"optimizer": SGD}, {"layer_density": "er", "density": 0.4}, {"train.precision": "float64"}],
    ids=["adamw", "sgd", "er", "float64"],
)
@pytest.mark.parametrize("name", SPARSITY)
def test_counts_are_exact_and_what_is_dead_is_zero(name: str, overrides: dict[str, Any], corpus: Corpus) -> None:
    cell = cell_of(name, **overrides)
    trainer = trainer_of(cell)
    schedule = cell.mask_schedule()
    assert schedule is not None
    assert trainer.masks is not None
    first, final = masks_of(trainer), trainer.masks.final
    assert {key: int(mask.sum()) for key, mask in first.items()} == {
        key: mask.numel() if name.startswith("gmp") else final[key] for key, mask in first.items()
    }
    before, n_changed = first, 0
    ages = {key: torch.zeros(mask.shape, dtype=torch.int64) for key, mask in first.items()}
    for step in range(STEPS):
        trainer.step(corpus, step)
        masks = masks_of(trainer)
        for plan in trainer.plans:
            if plan.name not in masks:
                continue
            mask = masks[plan.name]
            assert int(mask.sum()) == schedule.live(mask.numel(), final[plan.name], step + 1)
            state = trainer.optimizer.state[plan.parameter]
            moments = [state[key] for key in ("exp_avg", "exp_avg_sq", "momentum_buffer") if key in state]
            assert moments
            for tensor in (plan.parameter, *moments):
                assert not tensor[~mask].any()
            grown = mask & ~before[plan.name]
            for tensor in (plan.parameter, *moments):
                assert not tensor[grown].any()
            ages[plan.name] = (ages[plan.name] + 1).masked_fill(grown, 0)
            if name in ("set", "rigl") and "exp_avg" in state:
                assert torch.equal(state["step"][mask].long(), ages[plan.name][mask])
            assert name in ("set", "rigl") or not grown.any()  # pruned masks are nested
        changed = any(not torch.equal(masks[key], before[key]) for key in masks)
        assert schedule.is_update(step + 1) or not changed
        before, n_changed = masks, n_changed + changed
    # the last swaps are of a weight or two a layer, and RigL may choose the same again
    assert schedule.n_updates - 1 <= n_changed <= schedule.n_updates
    assert n_changed > 4
    live = {key: int(mask.sum()) for key, mask in before.items()}
    assert live == {key: final[key] for key in live}


def smallest(scores: Mapping[tuple[int, int], float], count: int) -> set[tuple[int, int]]:
    return set(sorted(scores, key=lambda at: scores[at])[:count])


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("name", ["set", "rigl", "gmp"])
def test_an_update_is_what_plain_python_makes_of_weights_and_gradients(
    name: str, accumulation_steps: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cell_of(name, **{"train.precision": "float64", "train.accumulation_steps": accumulation_steps})
    trainer, twin = trainer_of(cell), trainer_of(cell)
    schedule = cell.mask_schedule()
    assert schedule is not None
    assert trainer.masks is not None
    assert twin.masks is not None
    update = next(step for step in range(1, STEPS) if schedule.is_update(step))
    if name == "gmp":
        assert update == 4  # begins after two steps
    for step in range(update - 1):
        trainer.step(corpus, step)
        twin.step(corpus, step)
    # gradients by autograd.grad, which runs no hook: those of dead weights are there
    x, y = twin.batch(corpus, update - 1)
    weights = {plan.name: plan.parameter for plan in twin.plans if plan.name in named_masks(twin.model)}
    gradients = torch.autograd.grad(twin._loss(twin.model, x, y), list(weights.values()))
    monkeypatch.setattr(twin.masks, "after_step", lambda steps_done: None)
    old = masks_of(trainer)
    trainer.step(corpus, update - 1)
    twin.step(corpus, update - 1)  # the same step without the update
    new = masks_of(trainer)
    for (key, weight), gradient in zip(weights.items(), gradients, strict=True):
        live, stepped = {(int(r), int(c)) for r, c in old[key].nonzero()}, weight.detach()
        size, final = weight.numel(), trainer.masks.final[key]
        if name == "gmp":
            n_drop = len(live) - schedule.live(size, final, update)
        else:
            n_drop = int(0.15 * (1 + math.cos(math.pi * update / 15)) * len(live))
        assert n_drop > 10
        kept = live - smallest({at: abs(float(stepped[at])) for at in live}, n_drop)
        dead = {(r, c) for r in range(weight.shape[0]) for c in range(weight.shape[1])} - kept
        if name == "rigl":
            kept |= smallest({at: -abs(float(gradient[at])) for at in dead}, n_drop)
        elif name == "set":
            noise = stream_key(cell.seed, "growth", f"{key} {update}")
            kept |= smallest({at: int(bits(noise, at[0], at[1])) for at in dead}, n_drop)
        assert {(int(r), int(c)) for r, c in new[key].nonzero()} == kept
        # what stayed live has taken the step like any other
        stays = old[key] & new[key]
        assert torch.equal(trainer.model.get_parameter(key)[stays], weight[stays])


def test_gradients_of_dead_weights_pass_at_rigls_updates_only_and_reach_nobody(corpus: Corpus) -> None:
    # up to their first update SET and RigL are the same run; at it, RigL's dead gradients must change no number
    lines = {name: run(corpus, cell_of(name))[1].lines for name in ("set", "rigl")}
    assert lines["set"][:2] == lines["rigl"][:2]
    assert lines["set"][2:] != lines["rigl"][2:]
    trainer = trainer_of(cell_of("rigl"))
    for step in range(4):
        x, y = trainer.batch(corpus, step)
        trainer._loss(trainer.model, x, y).backward()  # type: ignore[no-untyped-call]
        dead = [plan.parameter.grad[~mask] for plan, mask in masked(trainer) if plan.parameter.grad is not None]
        assert any(bool(grad.any()) for grad in dead) == (step + 1 in (2, 4))
        trainer.update()


def masked(trainer: Trainer) -> list[tuple[Any, Tensor]]:
    masks = named_masks(trainer.model)
    return [(plan, masks[plan.name]) for plan in trainer.plans if plan.name in masks]


@pytest.mark.parametrize("which", ["final", "current"])
def test_gmp_starts_dense_with_the_init_and_lr_of_the_density_that_was_chosen(which: str, corpus: Corpus) -> None:
    cell = cell_of("gmp" if which == "final" else "gmp, current", **{"hparams.weight_decay": 0.1})
    trainer = trainer_of(cell)
    schedule = cell.mask_schedule()
    assert schedule is not None
    decays: set[float] = set()
    for step in range(STEPS):
        density = 0.25 if which == "final" else schedule.density(0.25, step)
        for plan in trainer.plans:
            if plan.role != "hidden":
                continue
            if step == 0:
                assert plan.live == plan.parameter.numel()
                assert plan.hparams.init_std == pytest.approx(0.08 / math.sqrt(2 * density))  # m_d = 32 / 16
                spread = float(plan.parameter.detach().square().mean().sqrt())
                assert spread == pytest.approx(plan.hparams.init_std, rel=0.1)
            group = group_of(trainer, plan)
            factor = trainer.scheduler.get_last_lr()[0] / trainer.base_lr
            assert group["lr"] == pytest.approx(factor * 0.01 / (2 * density), rel=1e-12)
            decays.add(round(group["lr"] * group["weight_decay"] / factor, 12))
        trainer.step(corpus, step)
    assert decays == {0.001}  # lr * weight_decay of the base, at every density


def group_of(trainer: Trainer, plan: Any) -> dict[str, Any]:
    (group,) = (g for g in trainer.optimizer.param_groups if any(p is plan.parameter for p in g["params"]))
    return group


def peak_lr(trainer: Trainer, plan: Any) -> float:
    return float(group_of(trainer, plan)["initial_lr"])


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["rigl", "gmp, current"])
def test_the_exponent_sets_how_lr_goes_with_density(name: str, exponent: float, corpus: Corpus) -> None:
    cell = cell_of(name, sparsity={**SPARSITY[name], "dynamic_lr_exponent": exponent})
    trainer = trainer_of(cell)
    for step in range(STEPS - 1):
        trainer.step(corpus, step)
    for plan in trainer.plans:
        wanted = 0.01 / 2 * 0.25**-exponent if "hidden" in plan.role else 0.01
        assert peak_lr(trainer, plan) == pytest.approx(wanted, rel=1e-12)


def test_er_layers_follow_their_own_density(corpus: Corpus) -> None:
    cell = cell_of("gmp, current", layer_density="er", density=0.4)
    trainer = trainer_of(cell)
    assert trainer.masks is not None
    for step in range(STEPS - 1):
        trainer.step(corpus, step)
    hidden = [plan for plan in trainer.plans if plan.name in trainer.masks.final]
    own = {plan.name: trainer.masks.final[plan.name] / plan.parameter.numel() for plan in hidden}
    assert len(set(own.values())) > 1
    for plan in hidden:
        assert peak_lr(trainer, plan) == pytest.approx(0.01 / 2 / own[plan.name], rel=1e-12)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 14, 19])
@pytest.mark.parametrize("name", SPARSITY)
def test_a_stopped_run_goes_on_as_if_it_never_stopped(
    name: str, stop_after: int, corpus: Corpus, tmp_path: Path
) -> None:
    cell = cell_of(name, **({"optimizer": SGD} if stop_after == 5 else {}))
    whole, whole_sink = run(corpus, cell)
    answers = iter([None] * stop_after + ["timeout"])
    _, first = run(corpus, cell, should_stop=lambda: next(answers))
    # by way of a file, as after a kill
    checkpoints = Checkpoints(tmp_path, "cell")
    assert checkpoints.save(stop_after, first.saved[stop_after])
    done, second = run(corpus, cell, resume=checkpoints.newest())
    assert first.lines + second.lines == whole_sink.lines
    assert (done.train_loss, done.val_loss) == (whole.train_loss, whole.val_loss)
    for key in ("mask_hash", "params", "layers", "mask_updates", "flops"):
        assert done.facts[key] == whole.facts[key]


def test_a_checkpoint_of_other_masks_is_refused(corpus: Corpus) -> None:
    cell = cell_of("rigl")
    state = run(corpus, cell, {"checkpoint_every_steps": 5})[1].saved[5]
    assert state["mask_hash"] != state["first_mask_hash"]
    with pytest.raises(CheckpointError, match="step 5 has other masks"):
        run(corpus, cell_of("rigl", seed=1), resume=state)
    name = "blocks.0.mlp.up.weight_mask"
    with pytest.raises(CheckpointError, match="masks stored in the checkpoint at step 5"):
        run(corpus, cell, resume={**state, "model": {**state["model"], name: ~state["model"][name]}})
    pruned = run(corpus, cell_of("gmp"), {"checkpoint_every_steps": 8})[1].saved[8]
    with pytest.raises(CheckpointError, match=r"step 8 has \d+ live weights in blocks"):
        run(corpus, cell_of("gmp", density=0.5), resume=pruned)


@pytest.mark.parametrize("name", SPARSITY)
def test_each_method_learns_and_says_what_it_did(name: str, corpus: Corpus) -> None:
    outcome, sink = run(corpus, cell_of(name, **{"train.steps": 60}))
    losses = sink.losses()
    assert outcome.end == "done"
    # an untrained model is at log(256) = 5.5; a text's byte frequencies alone take it below 4
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < 4
    assert outcome.facts["mask_updates"] == (6 if name.startswith("gmp") else 7)
    assert set(outcome.facts["compute"].values()) == {"dense"}
    sparse_total, sparse_live = 2 * 12 * 32**2, 2 * 12 * 32**2 // 4
    densities = [line["density"] for line in sink.lines if "loss" in line]
    assert len(densities) == 60
    assert densities[-1] == 0.25
    assert outcome.facts["m_rho"] == 0.25
    if name.startswith("gmp"):
        # pruned first after step 12, so step 13 is the first with fewer: 1 - s_f (1 - (5/6)^3)
        assert densities[:12] == [1.0] * 12
        assert densities[12] == pytest.approx(0.25 + 0.75 * (5 / 6) ** 3, abs=1e-3)
        assert densities == sorted(densities, reverse=True)
    else:
        assert set(densities) == {0.25}
    assert outcome.facts["params"]["total"] - outcome.facts["params"]["live"] == sparse_total - sparse_live
    static = run(corpus, tiny_cell())[1]
    assert not any("density" in line for line in static.lines)


def test_a_dense_cell_trains_as_without_changing_masks(corpus: Corpus) -> None:
    plain, dynamic = (
        run(corpus, tiny_cell(density=1.0, sparsity=each)) for each in ({"method": "static"}, SPARSITY["set"])
    )
    assert plain[1].lines == dynamic[1].lines
    assert "mask_updates" not in dynamic[0].facts


def test_compact_layers_cannot_change_their_masks(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.compute: cannot be had with sparsity\.method=rigl"):
        run(corpus, cell_of("rigl"), {"compute": "compact"})
    outcome, _ = run(corpus, cell_of("rigl"), {"compute": "auto"})
    assert outcome.facts["compute_reason"] == "masks change (sparsity.method=rigl)"


def test_a_coordinate_check_has_static_masks(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"sparsity.method: has no effect on a coordinate check"):
        cell_coordinates(cell_of("set"), corpus, "cpu")
