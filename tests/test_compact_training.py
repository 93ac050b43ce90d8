"""Whole runs in the compact form: the dense run's losses, checkpoints of either form, exact resumption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from supar_sweep.errors import CheckpointError, ConfigError
from supar_sweep.sparse import kernel
from supar_sweep.sparse.compact import CompactLinear, compact_layers
from supar_sweep.sparse.linear import MaskedLinear
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.cost import memory_gb, sparse_shapes
from supar_sweep.training.trainer import Trainer
from tests.short_runs import run
from tests.tiny import tiny_cell, tiny_runtime

CPU = torch.device("cpu")
COMPACT = {"compute": "compact"}
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
SGD = {"name": "sgd", "decay_mode": "scaled", "clip_norm": 1.0, "momentum": 0.9}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


def forms(cell: Any, form: str) -> dict[str, str]:
    return dict.fromkeys(sparse_shapes(cell), form)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"optimizer": SGD, "hparams.lr": 0.1},
        {"density": 1 / 16, "layer_density": "er"},
        {"model.bias": True, "model.activation": "swiglu", "model.position": "alibi", "model.tied_head": True},
        {"train.accumulation_steps": 2},
        {"model.context_tokens": 64, "train.batch_seqs": 2},  # long enough for the MLP's layers to hand over tiles
        {"model.context_tokens": 64, "train.batch_seqs": 2, "model.activation": "swiglu", "model.bias": True},
    ],
    ids=["adamw", "sgd", "er", "swiglu", "accumulation", "tiles", "tiles-swiglu"],
)
def test_the_loss_curve_is_the_dense_one(overrides: dict[str, Any], precision: str, corpus: Corpus) -> None:
    moderate = {"hparams.lr": 2**-8, "train.steps": 20, "train.precision": precision}
    cell = tiny_cell(**{**moderate, **overrides})
    dense_outcome, dense = run(corpus, cell)
    outcome, compact = run(corpus, cell, COMPACT)
    assert compact.losses() == pytest.approx(dense.losses(), abs=TOLERANCE[precision])
    for name in ("grad_norm", "lr_factor"):
        pairs = ([line[name] for line in sink.lines if name in line] for sink in (compact, dense))
        got, want = pairs
        assert got == pytest.approx(want, rel=10 * TOLERANCE[precision])
    assert outcome.val_loss == pytest.approx(dense_outcome.val_loss, abs=TOLERANCE[precision])
    same = ("params", "m_d", "m_rho", "m_L", "mask_hash", "tokens", "flops")
    assert {k: outcome.facts[k] for k in same} == {k: dense_outcome.facts[k] for k in same}
    assert [layer["name"] for layer in outcome.facts["layers"]] == [
        layer["name"] for layer in dense_outcome.facts["layers"]
    ]


def test_bfloat16_learns_as_the_dense_run_does(corpus: Corpus) -> None:
    cell = tiny_cell(**{"train.precision": "bfloat16", "train.steps": 20})
    dense, compact = run(corpus, cell)[1], run(corpus, cell, COMPACT)[1]
    assert compact.losses() == pytest.approx(dense.losses(), abs=2e-2)


def test_the_layers_are_compact_and_hold_nothing_dense(corpus: Corpus) -> None:
    cell = tiny_cell(density=0.125)  # at 1/4, one layer's live weights are as many as another's all
    trainer = Trainer(cell, tiny_runtime(**COMPACT), CPU, None)
    trainer.step(corpus, 0)
    assert set(compact_layers(trainer.model)) == set(sparse_shapes(cell))
    assert trainer.info["compute"] == forms(cell, "compact")
    sizes = {rows * columns for rows, columns in sparse_shapes(cell).values()}
    moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
    held = [t for name, t in trainer.model.state_dict().items() if name.startswith("blocks")]
    sparse = [p for layer in compact_layers(trainer.model).values() for p in (layer.values, layer.values.grad)]
    assert not [t for t in (*held, *sparse) if t is not None and t.numel() in sizes]
    assert sum(t.numel() == layer.n_live for layer in compact_layers(trainer.model).values() for t in moments) >= 16
    assert memory_gb(cell, compact=True) < memory_gb(cell)


def test_a_layer_without_dead_weights_is_never_compact(corpus: Corpus) -> None:
    cell = tiny_cell(density=1.0)
    _, sink = run(corpus, cell, COMPACT)
    assert sink.begun["compute"] == forms(cell, "dense")
    assert sink.lines == run(corpus, cell)[1].lines
    # Erdos-Renyi makes the small layers dense first
    mixed = tiny_cell(density=0.8, layer_density="er")
    trainer = Trainer(mixed, tiny_runtime(**COMPACT), CPU, None)
    kinds = {type(trainer.model.get_submodule(name)) for name in sparse_shapes(mixed)}
    assert kinds == {CompactLinear, MaskedLinear}


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize(
    "overrides", [{}, {"optimizer": SGD}, {"train.precision": "bfloat16"}], ids=["adamw", "sgd", "bf16"]
)
@pytest.mark.parametrize("stop_after", [1, 7])
def test_a_stopped_compact_run_goes_on_to_the_same_bits(
    stop_after: int, overrides: dict[str, Any], corpus: Corpus
) -> None:
    cell = tiny_cell(**overrides)
    whole, whole_sink = run(corpus, cell, COMPACT)
    answers = iter([None] * stop_after + ["timeout"])
    _, first = run(corpus, cell, COMPACT, should_stop=lambda: next(answers))
    # another form is asked for: the checkpoint's stays
    done, second = run(corpus, cell, {"compute": "dense"}, resume=first.saved[stop_after])
    assert second.begun["compute"] == forms(cell, "compact")
    assert first.lines + second.lines == whole_sink.lines
    assert (done.train_loss, done.val_loss) == (whole.train_loss, whole.val_loss)


@pytest.mark.compiler
def test_a_run_begun_without_the_kernel_goes_on_without_it(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    off = (None, "switched off by a test")
    answers = iter([None] * 7 + ["timeout"])
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_library", lambda: off)
        _, whole = run(corpus, runtime=COMPACT)
        _, first = run(corpus, runtime=COMPACT, should_stop=lambda: next(answers))
    assert (first.begun["kernel"], first.begun["kernel_reason"]) == (False, off[1])
    _, second = run(corpus, runtime=COMPACT, resume=first.saved[7])
    assert (second.begun["kernel"], second.begun["kernel_reason"]) == (False, "the checkpoint's")
    assert first.lines + second.lines == whole.lines
    assert second.warned == []


@pytest.mark.compiler
def test_a_run_begun_with_the_kernel_says_where_it_goes_on_without(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None] * 7 + ["timeout"])
    _, whole = run(corpus, runtime=COMPACT)
    _, first = run(corpus, runtime=COMPACT, should_stop=lambda: next(answers))
    assert first.begun["kernel"]
    monkeypatch.setattr(kernel, "_library", lambda: (None, "no compiler"))
    _, second = run(corpus, runtime=COMPACT, resume=first.saved[7])
    assert not second.begun["kernel"]
    assert "no compiler" in second.warned[0]
    assert second.losses() == pytest.approx(whole.losses()[7:], abs=TOLERANCE["float32"])
    # a dense run has no use for it, and nothing to say
    assert not run(corpus)[1].begun["kernel"]


@pytest.mark.parametrize("overrides", [{}, {"optimizer": SGD}], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("change", [("dense", "compact"), ("compact", "dense")], ids="-to-".join)
def test_a_checkpoint_of_one_form_goes_on_in_the_other(
    change: tuple[str, str], precision: str, overrides: dict[str, Any], corpus: Corpus
) -> None:
    cell = tiny_cell(**{"hparams.lr": 2**-8, "train.steps": 20, "train.precision": precision, **overrides})
    whole, whole_sink = run(corpus, cell)
    answers = iter([None] * 10 + ["timeout"])
    _, first = run(corpus, cell, {"compute": change[0]}, should_stop=lambda: next(answers))
    second_form = forms(cell, change[1])
    done, second = run(corpus, cell, resume={**first.saved[10], "compute": second_form})
    assert second.begun["compute"] == second_form
    assert first.losses() + second.losses() == pytest.approx(whole_sink.losses(), abs=TOLERANCE[precision])
    assert done.val_loss == pytest.approx(whole.val_loss, abs=TOLERANCE[precision])


def test_one_layer_may_change_its_form_alone(corpus: Corpus) -> None:
    cell = tiny_cell(**{"train.precision": "float64"})
    _, whole = run(corpus, cell)
    answers = iter([None] * 5 + ["timeout"])
    _, first = run(corpus, cell, should_stop=lambda: next(answers))
    mixed = {**forms(cell, "dense"), "blocks.1.mlp.up": "compact"}
    _, second = run(corpus, cell, resume={**first.saved[5], "compute": mixed})
    assert first.losses() + second.losses() == pytest.approx(whole.losses(), abs=1e-9)


def saved_state(corpus: Corpus, **runtime: Any) -> Any:
    return run(corpus, runtime={**runtime, "checkpoint_every_steps": 5})[1].saved[5]


def test_a_checkpoint_from_before_there_were_forms_is_dense(corpus: Corpus) -> None:
    state = saved_state(corpus)
    del state["compute"]
    _, sink = run(corpus, runtime=COMPACT, resume=state)
    assert set(sink.begun["compute"].values()) == {"dense"}


def test_a_compact_checkpoint_with_another_pattern_is_refused(corpus: Corpus) -> None:
    state = saved_state(corpus, **COMPACT)
    with pytest.raises(CheckpointError, match="step 5 has other masks"):
        run(corpus, tiny_cell(seed=1), resume=state)
    state["model"]["blocks.0.mlp.up.cols"][0] += 1
    with pytest.raises(CheckpointError, match="masks stored in the checkpoint at step 5"):
        run(corpus, resume=state)


def test_auto_measures_records_and_keeps_its_choice(corpus: Corpus) -> None:
    cell = tiny_cell(density=1 / 16)
    _, sink = run(corpus, cell, {"compute": "auto", "checkpoint_every_steps": 5})
    chosen: Mapping[str, str] = sink.begun["compute"]
    assert set(chosen) == set(sparse_shapes(cell))
    assert set(chosen.values()) <= {"dense", "compact"}
    assert "speed" in sink.begun["compute_reason"]
    assert sink.saved[5]["compute"] == chosen


def test_compact_cannot_be_compiled_and_auto_is_dense_there() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.compute: cannot be compiled"):
        Trainer(tiny_cell(), tiny_runtime(compute="compact", compile=True), CPU, None)
