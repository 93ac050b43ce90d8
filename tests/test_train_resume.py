"""A run that was stopped goes on as if it never was; checkpoints of something else are refused."""

from __future__ import annotations

from typing import Any

import pytest

from supar_sweep.errors import CheckpointError
from supar_sweep.training import train as train_module
from supar_sweep.training.corpus import Corpus, load_corpus
from tests.short_runs import run
from tests.tiny import tiny_cell


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


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


def test_a_stop_with_losses_unread_loses_none(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, whole_sink = run(corpus)
    monkeypatch.setattr(train_module, "CPU_READ_STEPS", 5)  # as a GPU's: seven steps leave two unread
    answers = iter([None] * 7 + ["timeout"])
    _, first = run(corpus, should_stop=lambda: next(answers))
    done, second = run(corpus, resume=first.saved[7])
    assert first.lines + second.lines == whole_sink.lines
    assert (done.train_loss, done.val_loss) == (whole.train_loss, whole.val_loss)


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


def test_a_kept_checkpoint_is_of_the_last_step(corpus: Corpus) -> None:
    assert list(run(corpus, runtime={"keep_checkpoints": True})[1].saved) == [tiny_cell().train.steps]
    assert list(run(corpus)[1].saved) == []
