"""One cell's training: the same bits again, the settings in force, divergence, precision, stops."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import CheckpointError, ConfigError, DataError
from supar_sweep.sparse.linear import named_masks
from supar_sweep.training import train as train_module
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.data import batch, val_batches
from supar_sweep.training.member import Outcome
from supar_sweep.training.optim import lr_factor
from supar_sweep.training.train import Trainer, pick_device, train
from tests.tiny import tiny_cell, tiny_runtime

CPU = torch.device("cpu")


class ListSink:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.saved: dict[int, Any] = {}
        self.warned: list[str] = []
        self.begun: dict[str, Any] = {}

    def begin(self, step: int, **info: Any) -> None:
        self.begun = {"step": step, **info}

    def log(self, **values: Any) -> None:
        self.lines.append(values)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        # as a file would: what is saved no longer changes with the run
        self.saved[step] = {**torch_copy(state), "step": step}

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines if "loss" in line]


def torch_copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: torch_copy(item) for key, item in value.items()}
    return [torch_copy(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


def run(
    corpus: Corpus,
    cell: CellConfig | None = None,
    runtime: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> tuple[Outcome, ListSink]:
    sink = ListSink()
    outcome = train(cell or tiny_cell(), tiny_runtime(**(runtime or {})), corpus, sink=sink, **keywords)
    return outcome, sink


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
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="no C++ compiler")
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


# ---------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("stop_after", [0, 1, 7, 11])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"optimizer": {"name": "sgd", "decay_mode": "scaled", "clip_norm": 1.0, "momentum": 0.9}},
        {"train.precision": "bfloat16", "density": 1.0},
    ],
    ids=["adamw", "sgd", "bfloat16"],
)
def test_a_stopped_run_goes_on_as_if_it_never_stopped(
    stop_after: int, overrides: dict[str, Any], corpus: Corpus
) -> None:
    cell = tiny_cell(**overrides, **{"train.eval_every_steps": 4})
    whole, whole_sink = run(corpus, cell)
    answers = iter([None] * stop_after + ["timeout"])
    stopped, first = run(corpus, cell, should_stop=lambda: next(answers))
    assert (stopped.end, stopped.steps_done) == ("timeout", stop_after)
    assert stopped.train_loss is None
    assert list(first.saved) == ([stop_after] if stop_after else [])
    # other threads and route are asked for: the checkpoint's stay
    done, second = run(
        corpus,
        cell,
        {"threads": 2, "route": "auto"} if stop_after else {},
        resume=first.saved.get(stop_after),
    )
    assert (second.begun["step"], second.begun["threads"]) == (stop_after, 1)
    assert second.begun["route"] == "torch"
    assert first.lines + second.lines == whole_sink.lines
    assert (done.train_loss, done.val_loss) == (whole.train_loss, whole.val_loss)
    assert done.last_finite_loss == whole.last_finite_loss
    assert done.facts["train_s"] > (first.saved[stop_after]["train_s"] if stop_after else 0)


def test_a_run_that_was_killed_after_its_last_checkpoint_only_reports(corpus: Corpus) -> None:
    whole, sink = run(corpus, runtime={"checkpoint_every_steps": 12})
    done, second = run(corpus, resume=sink.saved[12])
    assert (done.train_loss, done.val_loss) == (whole.train_loss, whole.val_loss)
    assert not second.lines


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        ({"checkpoint_every_steps": 5}, [5, 10]),
        ({"checkpoint_every_s": 0.0}, list(range(1, 13))),
        ({"checkpoint_every_s": 1e6}, []),
        ({}, []),
    ],
)
def test_checkpoint_cadence_changes_no_number(cadence: dict[str, Any], steps: list[int], corpus: Corpus) -> None:
    _, sink = run(corpus, runtime=cadence)
    assert list(sink.saved) == steps
    assert sink.lines == run(corpus)[1].lines


def saved_state(corpus: Corpus) -> Any:
    return run(corpus, runtime={"checkpoint_every_steps": 5})[1].saved[5]


def test_a_checkpoint_with_other_masks_is_refused(corpus: Corpus) -> None:
    state = saved_state(corpus)
    for other in ({"seed": 1}, {"density": 0.5}, {"layer_density": "er"}):
        with pytest.raises(CheckpointError, match="step 5 has other masks"):
            run(corpus, tiny_cell(**other), resume=state)
    # the hash says one thing, the stored mask another
    name = "blocks.0.mlp.up.weight_mask"
    state["model"][name] = ~state["model"][name]
    with pytest.raises(CheckpointError, match="masks stored in the checkpoint at step 5"):
        run(corpus, resume=state)


def test_a_checkpoint_of_another_shape_is_refused(corpus: Corpus) -> None:
    state = saved_state(corpus)
    del state["model"]["head.weight"]
    with pytest.raises(CheckpointError, match=r"step 5 is of another model"):
        run(corpus, resume=state)


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


@pytest.mark.parametrize("read_steps", [3, 5, 100])
def test_how_often_losses_are_read_changes_nothing(
    read_steps: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, each = run(corpus)
    monkeypatch.setattr(train_module, "CPU_READ_STEPS", read_steps)
    _, late = run(corpus)
    assert late.lines == each.lines


# ---------------------------------------------------------------- what cannot be


def test_a_corpus_shorter_than_a_batch_is_refused_before_anything_is_built() -> None:
    short = load_corpus(tiny_cell().data)
    short = Corpus("text", 256, short.train[:64], short.val, "x", 64)
    with pytest.raises(DataError, match=r"64 tokens.*= 65"):
        run(short)


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
