"""One cell's training: the same bits again, the settings in force, divergence, precision, wrong starts."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError, DataError
from supar_sweep.sparse.linear import named_masks
from supar_sweep.sparse.noise import normal_block
from supar_sweep.training import train as train_module
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.data import batch, val_batches
from supar_sweep.training.optim import lr_factor
from supar_sweep.training.tags import tag
from supar_sweep.training.train import train
from supar_sweep.training.trainer import Trainer, pick_device
from tests.short_runs import ListSink, run
from tests.tiny import tiny_cell, tiny_runtime

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


def test_the_same_cell_gives_the_same_bits_and_learns(corpus: Corpus) -> None:
    outcome, sink = run(corpus)
    again, same = run(corpus)
    assert sink.lines == same.lines
    assert (outcome.train_loss, outcome.val_loss) == (again.train_loss, again.val_loss)
    losses = sink.losses()
    assert abs(losses[0] - math.log(256)) < 0.5
    assert losses[-1] < losses[0] - 0.5
    other, _ = run(corpus, tiny_cell(seed=1))
    assert other.train_loss != outcome.train_loss


@pytest.mark.parametrize(
    "overrides",
    [
        {"parameterization": "sp"},
        {"parameterization": "mup"},
        {"model.width": 64},
        {"density": 1.0},
        {"hparams.lr": 0.1},
        {"model.n_layer": 1},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_every_cell_of_a_seed_reads_the_same_batches(overrides: dict[str, Any], corpus: Corpus) -> None:
    def batches(cell: CellConfig) -> list[Any]:
        trainer, read = Trainer(cell, tiny_runtime(), CPU, None), []
        trainer.model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].tolist()))
        for step in range(2):
            trainer.step(corpus, step)
        return read

    assert batches(tiny_cell(**overrides)) == batches(tiny_cell())
    assert batches(tiny_cell(**overrides, seed=1)) != batches(tiny_cell())


def test_metrics_and_summary_are_what_they_say(corpus: Corpus) -> None:
    cell = tiny_cell(**{"train.eval_every_steps": 5})
    outcome, sink = run(corpus, cell)
    steps = [line for line in sink.lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for line in steps:
        assert line["lr_factor"] == pytest.approx(lr_factor(cell.schedule, line["step"] - 1, 12))
        assert line["tokens"] == line["step"] * 4 * 16
        assert line["grad_norm"] > 0
    evaluated = [line for line in sink.lines if "val_loss" in line]
    assert [line["step"] for line in evaluated] == [5, 10, 12]
    assert outcome.end == "done"
    assert outcome.steps_done == 12
    assert outcome.train_loss == pytest.approx(sum(sink.losses()[-4:]) / 4, rel=1e-12)
    assert outcome.val_loss == evaluated[-1]["val_loss"]
    assert outcome.last_finite_loss == sink.losses()[-1]
    # evaluating more often changes nothing else
    assert run(corpus)[1].losses() == sink.losses()


def test_facts_say_what_was_trained(corpus: Corpus) -> None:
    cell = tiny_cell()
    outcome, _ = run(corpus, cell)
    facts = outcome.facts
    assert (facts["m_d"], facts["m_rho"], facts["m_L"]) == (32 / 16, 0.25, 1.0)
    assert facts["tokens"] == 12 * 4 * 16
    hidden = 2 * 12 * 32**2
    dense = 2 * 256 * 32 + 16 * 32 + 5 * 32
    assert facts["params"] == {"total": hidden + dense, "live": hidden // 4 + dense}
    assert (facts["route"], facts["threads"], facts["device"]) == ("torch", 1, "cpu")
    names = {layer["name"]: layer for layer in facts["layers"]}
    assert names["blocks.0.mlp.up.weight"]["density"] == 0.25
    assert names["head.weight"]["density"] == 1


def test_held_out_loss_is_the_mean_over_the_held_out_sequences(corpus: Corpus) -> None:
    trainer = Trainer(tiny_cell(**{"train.eval_seqs": 7}), tiny_runtime(), CPU, None)
    pieces = []
    for x, y in val_batches(corpus, eval_seqs=7, context_tokens=16, batch_seqs=1):
        with torch.no_grad():
            pieces.append(F.cross_entropy(trainer.model(x)[0], y[0]).item())
    assert trainer.evaluate(corpus) == pytest.approx(sum(pieces) / 7, rel=1e-6)


def test_masked_entries_stay_zero_in_weights_and_moments(corpus: Corpus) -> None:
    trainer = Trainer(tiny_cell(), tiny_runtime(), CPU, None)
    for step in range(4):
        trainer.step(corpus, step)
    masks = named_masks(trainer.model)
    assert len(masks) == 8
    for name, mask in masks.items():
        parameter = trainer.model.get_parameter(name)
        moments = trainer.optimizer.state[parameter]
        for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
            assert not tensor[~mask].any()
            assert tensor[mask].any()


@pytest.mark.parametrize("clip_norm", [0.05, 1e9, None])
def test_clipping(clip_norm: float | None, corpus: Corpus) -> None:
    trainer = Trainer(tiny_cell(**{"optimizer.clip_norm": clip_norm}), tiny_runtime(), CPU, None)
    x, y = batch(corpus, seed=0, step=0, batch_seqs=4, context_tokens=16)
    F.cross_entropy(trainer.model(x).flatten(0, 1), y.flatten()).backward()  # type: ignore[no-untyped-call]

    def measure() -> float:
        squares = [p.grad.double().square().sum() for p in trainer.parameters if p.grad is not None]
        return math.sqrt(float(torch.stack(squares).sum()))

    before = measure()
    assert trainer._clip().item() == pytest.approx(before, rel=1e-5)
    # torch divides by norm + 1e-6, so that a norm of 0 stays 0
    wanted = before if clip_norm != 0.05 else before * clip_norm / (before + 1e-6)
    assert measure() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(parts: int, corpus: Corpus) -> None:
    # float64: what is left of the difference is rounding, not chaos
    whole, whole_sink = run(corpus, tiny_cell(**{"train.precision": "float64"}))
    cell = tiny_cell(**{"train.precision": "float64", "train.accumulation_steps": parts})
    split, split_sink = run(corpus, cell)
    assert split_sink.losses() == pytest.approx(whole_sink.losses(), rel=1e-12)
    assert split.val_loss == pytest.approx(whole.val_loss, rel=1e-12)
    _, single = run(corpus, tiny_cell(**{"train.accumulation_steps": parts}))
    assert single.losses() == pytest.approx(whole_sink.losses(), abs=1e-4)
    assert single.losses()[0] == pytest.approx(whole_sink.losses()[0], rel=1e-6)


def test_float64_computes_in_float64(corpus: Corpus) -> None:
    _, sink = run(corpus)
    _, fine = run(corpus, tiny_cell(**{"train.precision": "float64"}))
    assert sink.losses() == pytest.approx(fine.losses(), abs=1e-4)
    assert sink.losses() != fine.losses()
    trainer = Trainer(tiny_cell(**{"train.precision": "float64"}), tiny_runtime(), CPU, None)
    assert {p.dtype for p in trainer.parameters} == {torch.float64}


def test_bfloat16_is_autocast(corpus: Corpus) -> None:
    cell = tiny_cell(**{"train.precision": "bfloat16"})
    outcome, sink = run(corpus, cell, {"route": "auto"})
    _, fine = run(corpus)
    assert outcome.end == "done"
    assert sink.losses() == pytest.approx(fine.losses(), rel=0.02)
    assert sink.losses() != fine.losses()
    trainer = Trainer(cell, tiny_runtime(), CPU, None)
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    assert trainer.step(corpus, 0)[0].dtype == torch.float32


def test_sgd(corpus: Corpus) -> None:
    sgd = {"name": "sgd", "decay_mode": "scaled", "clip_norm": None, "momentum": 0.9}
    outcome, sink = run(corpus, tiny_cell(optimizer=sgd, **{"hparams.lr": 0.3}))
    assert outcome.end == "done"
    assert sink.losses()[-1] < sink.losses()[0] - 0.3


def test_routes_differ_by_rounding_only(corpus: Corpus) -> None:
    _, plain = run(corpus)
    _, routed = run(corpus, runtime={"route": "onednn"})
    assert routed.begun["route"] == "onednn"
    assert routed.losses() == pytest.approx(plain.losses(), abs=1e-3)


@pytest.mark.parametrize(
    ("precision", "compiled", "why"),
    [
        ("float64", False, "with train.precision=float64"),
        ("bfloat16", False, "with train.precision=bfloat16"),
        ("float32", True, "with runtime.compile"),
    ],
)
def test_a_route_without_effect_is_an_error_and_auto_takes_torchs(precision: str, compiled: bool, why: str) -> None:
    cell = tiny_cell(**{"train.precision": precision})
    with pytest.raises(ConfigError, match=rf"runtime\.route: has no effect {re.escape(why)}"):
        Trainer(cell, tiny_runtime(route="onednn", compile=compiled), CPU, None)
    if not compiled:
        trainer = Trainer(cell, tiny_runtime(route="auto"), CPU, None)
        assert trainer.info["route"] == "torch"
        assert why in str(trainer.info["route_reason"])


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_is_the_same_to_rounding(corpus: Corpus) -> None:
    _, plain = run(corpus)
    outcome, compiled = run(corpus, runtime={"compile": True})
    assert compiled.begun["compiled"]
    assert not compiled.warned
    assert outcome.end == "done"
    assert compiled.losses() == pytest.approx(plain.losses(), abs=1e-3)


def test_a_failing_compiler_is_a_warning(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler here")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **_: real(m, backend=broken))
    outcome, sink = run(corpus, runtime={"compile": True})
    assert not sink.begun["compiled"]
    assert sink.losses() == run(corpus)[1].losses()
    assert outcome.end == "done"
    (warning,) = sink.warned
    assert warning.startswith("runtime.compile: torch.compile failed here")


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("lr", [30.0, 1e30])
def test_a_huge_lr_diverges_with_a_finite_last_loss(lr: float, corpus: Corpus) -> None:
    outcome, sink = run(corpus, tiny_cell(**{"hparams.lr": lr}))
    assert outcome.end == "diverged"
    assert outcome.steps_done == len(sink.losses()) < 12
    assert outcome.last_finite_loss is not None
    assert math.isfinite(outcome.last_finite_loss)
    assert outcome.train_loss is None
    assert not [line for line in sink.lines if "val_loss" in line]


def test_a_last_update_that_breaks_the_model_is_divergence(corpus: Corpus) -> None:
    # every training loss is finite, and yet there is no model left
    cell = tiny_cell(
        schedule={"name": "constant", "warmup_steps": 0},
        **{"hparams.lr": 1e30, "train.steps": 1, "train.summary_last_steps": 1},
    )
    outcome, sink = run(corpus, cell)
    assert math.isfinite(sink.losses()[0])
    assert (outcome.end, outcome.train_loss, outcome.val_loss) == ("diverged", None, None)


@pytest.mark.parametrize("read_steps", [3, 5, 100])
@pytest.mark.parametrize("lr", [0.01, 30.0])
def test_how_often_losses_are_read_changes_nothing(
    lr: float, read_steps: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = tiny_cell(**{"hparams.lr": lr})
    wanted, each = run(corpus, cell)
    monkeypatch.setattr(train_module, "CPU_READ_STEPS", read_steps)
    outcome, late = run(corpus, cell)
    assert str(late.lines) == str(each.lines)  # as text: nan is not equal to itself
    assert (outcome.end, outcome.steps_done) == (wanted.end, wanted.steps_done)


# ---------------------------------------------------------------- what cannot be


def test_a_corpus_shorter_than_a_batch_is_refused_before_anything_is_built() -> None:
    short = load_corpus(tiny_cell().data)
    short = Corpus("text", 256, short.train[:64], short.val, "x", 64)
    with pytest.raises(DataError, match=r"64 tokens.*= 65"):
        run(short)


def test_a_wrong_start_stops_the_run_before_its_first_step(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    real = normal_block
    monkeypatch.setattr("supar_sweep.training.roles.normal_block", lambda *args: real(*args) * 1.1)
    sink = ListSink()
    with pytest.raises(ConfigError, match=r"^embedding\.tokens\.weight: starts with the wrong standard deviation"):
        train(tiny_cell(), tiny_runtime(), corpus, sink=sink)
    assert not sink.lines


def test_a_missing_role_stops_the_run_before_its_first_step(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tag
    without = "hidden_residual"
    monkeypatch.setattr(
        "supar_sweep.training.model.tag", lambda *a, **more: None if a[2] == without else real(*a, **more)
    )
    sink = ListSink()
    with pytest.raises(ConfigError, match=r"^blocks\.0\.attention\.out\.weight: has no role"):
        train(tiny_cell(), tiny_runtime(), corpus, sink=sink)
    assert not sink.lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device.*cuda.*allowed: auto or cpu"):
        pick_device("cuda")
    assert pick_device("auto") == CPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gpu_agrees_with_cpu(precision: str, corpus: Corpus) -> None:
    cell = tiny_cell(**{"train.precision": precision, "train.eval_every_steps": 5})
    _, host = run(corpus)
    outcome, sink = run(corpus, cell, {"device": "cuda"})
    assert outcome.facts["device"] == "cuda"
    assert sink.losses() == pytest.approx(host.losses(), rel=0.03)
    stopped_after = iter([None] * 7 + ["timeout"])
    _, first = run(corpus, cell, {"device": "cuda"}, should_stop=lambda: next(stopped_after))
    _, second = run(corpus, cell, {"device": "cuda"}, resume=first.saved[7])
    resumed = first.losses() + second.losses()
    assert resumed == pytest.approx(sink.losses(), rel=1e-3)
