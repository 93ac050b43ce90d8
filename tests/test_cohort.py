"""Cohorts: whatever a run shares its steps with, its curve is that of a run alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import LostDeviceError, RecordError
from supar_sweep.training import cohort as cohort_module
from supar_sweep.training import stack
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.member import Outcome
from supar_sweep.training.model import GPT
from supar_sweep.training.run_cell import run_cells
from supar_sweep.training.train import Run, train_together
from tests.short_runs import ListSink, run
from tests.tiny import tiny_cell, tiny_job, tiny_runtime

ROUNDING = 1e-5
"""What the curves of a cohort may differ by in float32, within two octaves of the best lr."""

MEMBERS: list[dict[str, Any]] = [
    {},
    {"seed": 1, "hparams.lr": 0.02, "density": 0.5},
    {"seed": 2, "parameterization": "mup", "hparams.init_std": 0.04, "hparams.weight_decay": 0.0, "density": 1.0},
    {"parameterization": "sp", "hparams.alpha_in": 2.0, "hparams.alpha_out": 0.5, "hparams.lr": 0.005},
]
"""What cells of a cohort may differ in: rules, seeds, densities, hyperparameters."""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test tries the sizes of its stacks itself."""
    monkeypatch.setattr(cohort_module, "_fastest", {})


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the stacks that were computed, in order."""
    sizes: list[int] = []
    compute = stack.losses

    def counted(models: Sequence[GPT], x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(models))
        return compute(models, x, y)

    monkeypatch.setattr(stack, "losses", counted)
    return sizes


def cells(shared: Mapping[str, Any] | None = None, members: Sequence[Mapping[str, Any]] = MEMBERS) -> list[CellConfig]:
    return [tiny_cell(**{**(shared or {}), **member}) for member in members]


def together(
    corpus: Corpus,
    wanted: Sequence[CellConfig],
    runtime: Mapping[str, Any] | None = None,
    *,
    sinks: Sequence[ListSink] | None = None,
    resume: Sequence[Any] | None = None,
    should_stop: Any = lambda: None,
) -> tuple[list[Outcome | Exception], list[ListSink], list[int]]:
    """Train cells as one cohort; return their ends, their sinks, and the order in which they ended."""
    sinks = list(sinks or [ListSink() for _ in wanted])
    runs = [
        Run(
            cell,
            tiny_runtime(**(runtime or {})),
            corpus,
            sink=sink,
            resume=None if resume is None else resume[index],
            together=len(wanted),
        )
        for index, (cell, sink) in enumerate(zip(wanted, sinks, strict=True))
    ]
    ends: dict[int, Outcome | Exception] = {}
    train_together(runs, should_stop=should_stop, ended=lambda run, end: ends.update({runs.index(run): end}))
    return [ends[index] for index in range(len(runs))], sinks, list(ends)


def assert_as_alone(
    corpus: Corpus, wanted: Sequence[CellConfig], runtime: Mapping[str, Any] | None = None, tolerance: float = 0.0
) -> None:
    ends, sinks, _ = together(corpus, wanted, runtime)
    for cell, end, sink in zip(wanted, ends, sinks, strict=True):
        assert isinstance(end, Outcome), end
        alone, alone_sink = run(corpus, cell, runtime)
        assert (end.end, end.steps_done) == (alone.end, alone.steps_done)
        assert len(sink.lines) == len(alone_sink.lines)
        for line, alone_line in zip(sink.lines, alone_sink.lines, strict=True):
            assert line == pytest.approx(alone_line, abs=tolerance, rel=0)
        assert end.facts["mask_hash"] == alone.facts["mask_hash"]


SWAPS = {"update_fraction": 0.2, "stop_fraction": 0.75, "drop_fraction": 0.3}
PRUNES = {"method": "gmp", "update_fraction": 0.2, "start_fraction": 0.1, "stop_fraction": 0.75}
CHANGING: list[dict[str, Any]] = [
    {},
    {"sparsity": {"method": "rigl", **SWAPS}},
    {"sparsity": {"method": "rigl", **SWAPS, "update_fraction": 0.3, "dynamic_lr_exponent": 0.5}, "seed": 1},
    {"sparsity": {"method": "set", **SWAPS}, "density": 0.5},
    {"sparsity": {**PRUNES, "hparams_density": "final"}, "parameterization": "sp"},
    {"sparsity": {**PRUNES, "hparams_density": "current"}},
]
"""Members whose masks change, each at steps of its own."""

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "biases": {"model.bias": True},
    "swiglu, alibi": {"model.activation": "swiglu", "model.position": "alibi"},
    "tied head": {"model.tied_head": True},
    "accumulation": {"train.accumulation_steps": 4},
    "er densities": {"layer_density": "er", "train.eval_every_steps": 5},
    "completep": {"depth": "completep", "depth_alpha": 1.0, "model.n_layer": 4},
    "sgd": {"optimizer": {"name": "sgd", "decay_mode": "scaled", "clip_norm": None, "momentum": 0.9}},
    "no clipping": {"optimizer.clip_norm": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float64_a_cohort_is_its_runs_alone(corpus: Corpus, stacks: list[int], variant: str) -> None:
    shared = {**VARIANTS[variant], "train.precision": "float64"}
    assert_as_alone(corpus, cells(shared), tolerance=1e-9)
    assert max(stacks) == len(MEMBERS)


@pytest.mark.parametrize("route", ["torch", "onednn"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float32_too(corpus: Corpus, stacks: list[int], variant: str, route: str) -> None:
    assert_as_alone(corpus, cells(VARIANTS[variant]), {"route": route}, tolerance=ROUNDING)
    assert max(stacks) == len(MEMBERS)


@pytest.mark.parametrize("shared", [{}, {"train.batch_seqs": 8, "train.accumulation_steps": 8}])
def test_on_one_thread_the_bits_are_the_same(corpus: Corpus, shared: dict[str, Any]) -> None:
    assert_as_alone(corpus, cells(shared))


@pytest.mark.parametrize("shared", [{}, {"train.accumulation_steps": 2}], ids=["one batch", "accumulation"])
def test_masks_change_in_company_as_they_do_alone(corpus: Corpus, stacks: list[int], shared: dict[str, Any]) -> None:
    assert_as_alone(corpus, cells(shared, CHANGING))
    assert max(stacks) == len(CHANGING)


def test_in_bfloat16_up_to_its_rounding(corpus: Corpus) -> None:
    # a matmul's result has 8 bits
    shared = {"train.precision": "bfloat16", "train.steps": 4, "schedule.warmup_steps": 1}
    assert_as_alone(corpus, cells(shared), tolerance=2**-5)


def test_multipliers_keep_their_digits_in_bfloat16() -> None:
    # 1/3 is .33398 in bfloat16: a hyperparameter off by two in a thousand
    x = torch.linspace(-2, 2, 999).to(torch.bfloat16).expand(2, 1, 999)
    factors = [1 / 3, 1.0]
    found = stack._scaled(x, factors)
    assert found.dtype == torch.bfloat16
    for row, factor in zip(found, factors, strict=True):
        assert torch.equal(row, x[0] * factor)


@pytest.mark.parametrize("compute", ["compact", "auto"])
def test_compact_and_dense_layers_share_a_stack(corpus: Corpus, stacks: list[int], compute: str) -> None:
    # density 1 has no dead weight, so its layers are dense beside the others' compact ones
    assert_as_alone(corpus, cells(), {"compute": compute}, tolerance=ROUNDING)
    assert max(stacks) == len(MEMBERS)


def test_gradients_in_a_stack_are_contiguous_and_masked(corpus: Corpus) -> None:
    runs = [Run(cell, tiny_runtime(), corpus, sink=ListSink()) for cell in cells()]
    together_ = cohort_module.Cohort(runs)
    together_.backward(runs)
    for member in runs:
        for plan in member.trainer.plans:
            grad = plan.parameter.grad
            assert grad is not None
            assert grad.stride() == plan.parameter.stride()
            mask = plan.owner._buffers.get(f"{plan.local_name}_mask")
            if mask is not None:
                assert not grad[~mask].any()


def test_a_diverging_member_leaves_and_the_others_go_on(corpus: Corpus, stacks: list[int]) -> None:
    wanted = cells(members=[{}, {"hparams.lr": 1e4, "optimizer.clip_norm": None}, {"seed": 3}])
    ends, sinks, order = together(corpus, wanted)
    hot = ends[1]
    assert isinstance(hot, Outcome)
    assert hot.end == "diverged"
    assert hot.steps_done < 12
    assert order[0] == 1
    for index in (0, 2):
        alone, alone_sink = run(corpus, wanted[index])
        assert sinks[index].losses() == pytest.approx(alone_sink.losses(), abs=ROUNDING)
        end = ends[index]
        assert isinstance(end, Outcome)
        assert end.val_loss == pytest.approx(alone.val_loss, abs=ROUNDING)


def test_members_of_other_lengths_end_by_themselves(corpus: Corpus) -> None:
    wanted = cells(members=[{"train.steps": 5}, {}, {"train.steps": 8, "seed": 1}])
    ends, sinks, _ = together(corpus, wanted)
    assert [end.steps_done for end in ends if isinstance(end, Outcome)] == [5, 12, 8]
    for cell, sink in zip(wanted, sinks, strict=True):
        assert sink.losses() == pytest.approx(run(corpus, cell)[1].losses(), abs=ROUNDING)


class FullDisk(ListSink):
    """A sink that cannot be written from step 4 on."""

    def log(self, **values: Any) -> None:
        if values["step"] == 4:
            raise RecordError("the disk is full")
        super().log(**values)


def test_what_fails_in_one_member_ends_that_one_only(corpus: Corpus) -> None:
    ends, sinks, order = together(corpus, cells(), sinks=[ListSink(), FullDisk(), ListSink(), ListSink()])
    assert isinstance(ends[1], RecordError)
    assert order[0] == 1
    for index in (0, 2, 3):
        assert sinks[index].losses() == pytest.approx(run(corpus, cells()[index])[1].losses(), abs=ROUNDING)


@pytest.mark.parametrize(("error", "limit"), [(MemoryError("no room"), 2), (RuntimeError("no such operator"), 1)])
def test_a_stack_that_fails_goes_on_in_smaller_ones(
    corpus: Corpus, stacks: list[int], monkeypatch: pytest.MonkeyPatch, error: Exception, limit: int
) -> None:
    compute = stack.losses

    def small(models: Sequence[GPT], x: Tensor, y: Tensor) -> Tensor:
        if len(models) > 2:
            raise error
        return compute(models, x, y)

    monkeypatch.setattr(stack, "losses", small)
    assert_as_alone(corpus, cells(), tolerance=ROUNDING)
    assert max(stacks, default=1) == limit
    _, sinks, _ = together(corpus, cells())
    assert str(error) in sinks[0].warned[0]


@pytest.mark.parametrize("stop_after", [1, 3, 7])
def test_a_stopped_cohort_goes_on_alone_and_in_other_company(corpus: Corpus, stop_after: int) -> None:
    wanted = cells()
    polls = iter([None] * stop_after + ["preempted"] * 99)
    ends, first, _ = together(corpus, wanted, should_stop=lambda: next(polls))
    assert {end.end for end in ends if isinstance(end, Outcome)} == {"preempted"}
    saved = [next(iter(sink.saved.values()), None) for sink in first]
    assert sum(0 if state is None else state["step"] for state in saved) >= stop_after
    # the last of them begins a company of its own with a new one; the others go on alone
    _, company, _ = together(corpus, [wanted[-1], tiny_cell(seed=9)], resume=[saved[-1], None])
    second = [run(corpus, cell, resume=state)[1] for cell, state in zip(wanted[:-1], saved, strict=False)] + company[:1]
    for cell, before, after in zip(wanted, first, second, strict=True):
        assert before.losses() + after.losses() == pytest.approx(run(corpus, cell)[1].losses(), abs=ROUNDING)


def test_a_checkpoint_from_alone_goes_on_in_a_cohort(corpus: Corpus) -> None:
    wanted = cells()
    answers = iter([None] * 5 + ["timeout"])
    _, first = run(corpus, wanted[0], should_stop=lambda: next(answers))
    ends, sinks, _ = together(corpus, wanted, resume=[first.saved[5], None, None, None])
    assert all(isinstance(end, Outcome) and end.end == "done" for end in ends)
    assert first.losses() + sinks[0].losses() == pytest.approx(run(corpus, wanted[0])[1].losses(), abs=ROUNDING)


def test_other_shapes_do_not_share_a_stack(corpus: Corpus, stacks: list[int]) -> None:
    wanted = cells(
        members=[{}, {"seed": 1}, {"model.width": 16}, {"model.width": 16, "seed": 1}, {"train.batch_seqs": 2}]
    )
    assert_as_alone(corpus, wanted, tolerance=ROUNDING)
    assert max(stacks) == 2


def test_the_fastest_size_is_tried_out_once(corpus: Corpus, stacks: list[int]) -> None:
    together(corpus, cells())
    tried = stacks[: cohort_module.TRIALS + 2 * cohort_module.TRIALS]
    assert tried[: cohort_module.TRIALS] == [4] * cohort_module.TRIALS
    assert set(tried[cohort_module.TRIALS :]) <= {2, 4}
    ((largest, fastest),) = cohort_module._fastest.values()
    assert largest == 4
    assert fastest in (1, 2, 4)
    stacks.clear()
    together(corpus, cells(members=MEMBERS[:3]))
    assert set(stacks) <= {min(fastest, 3), *range(2, min(fastest, 3))}  # the tail of a cohort is a smaller stack


def test_a_lost_gpu_ends_all_that_were_on_it_without_blame(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(models: Sequence[GPT], x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(stack, "losses", broken)
    monkeypatch.setattr(cohort_module, "is_lost", lambda device: True)
    ends, _, _ = together(corpus, cells())
    assert {type(end) for end in ends} == {LostDeviceError}
    jobs = [tiny_job(tmp_path, seed=seed) for seed in range(2)]
    told = []
    run_cells(jobs, ended=lambda this, end, message: told.append((end, message)))
    assert [end for end, _ in told] == ["cancelled"] * 2  # as good as a process that was killed: tried again
    assert "illegal memory access" in told[0][1]


def test_together_stands_in_the_record(corpus: Corpus) -> None:
    _, sinks, _ = together(corpus, cells())
    assert [sink.begun["together"] for sink in sinks] == [4] * 4
    assert run(corpus)[1].begun["together"] == 1


def test_train_s_is_shared_out(corpus: Corpus) -> None:
    begun_s = time.perf_counter()
    ends, _, _ = together(corpus, cells())
    wall_s = time.perf_counter() - begun_s
    times = [end.facts["train_s"] for end in ends if isinstance(end, Outcome)]
    assert len(times) == 4
    assert all(math.isfinite(time) and time > 0 for time in times)
    assert sum(times) <= wall_s  # each a share of the time of its stack, not all of it


@pytest.mark.gpu
def test_on_a_gpu_a_cohort_is_its_runs_alone_up_to_rounding(corpus: Corpus, stacks: list[int]) -> None:
    assert_as_alone(corpus, cells(), {"device": "cuda"}, tolerance=1e-3)
    assert max(stacks) == len(MEMBERS)
    assert torch.cuda.is_available()
