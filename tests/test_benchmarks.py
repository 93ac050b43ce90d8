"""The benchmarks: the reference trains what ours trains, the tables' arithmetic, and one tiny run of everything."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import iso_parameter, step_time, whole_grids
from benchmarks.__main__ import FULL, judged
from benchmarks.bars import BARS, verdicts
from benchmarks.cells import SHAPE, reference_point, settings, write_tokens
from benchmarks.reference import (
    Masked,
    Point,
    Reference,
    from_command_line,
    random_batch,
    read_tokens,
    sparse_layers,
    to_command_line,
    windows,
)
from benchmarks.turns import Effort, Turns
from benchmarks.variants import AS_SHIPPED, OURS, SAME_ROUTE, VARIANTS, Place
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.sparse.linear import named_masks
from supar_sweep.sparse.route import choose_route
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.cost import compact_layer_bytes, sparse_shapes
from supar_sweep.training.data import batch
from supar_sweep.training.trainer import Trainer
from tests.short_runs import run
from tests.tiny import tiny_cell, tiny_runtime

ROOT = Path(__file__).resolve().parent.parent
MODERATE = {"hparams.lr": 2**-8, "train.steps": 20}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


def take_over(reference: Reference, trainer: Trainer) -> None:
    """Copy the start and the masks of our run (dense form) into the reference."""
    names = {"tokens": "embedding.tokens", "positions": "embedding.positions", "norm": "norm", "head": "head"}
    blocks = {
        **{"norm_1": "attention_norm", "norm_2": "mlp_norm", "qkv": "attention.qkv"},
        **{"attention_out": "attention.out", "up": "mlp.up", "down": "mlp.down"},
    }
    for index in range(trainer.cell.model.n_layer):
        names |= {f"blocks.{index}.{theirs}": f"blocks.{index}.{ours}" for theirs, ours in blocks.items()}
    masks = named_masks(trainer.model)
    parameters = dict(reference.model.named_parameters(remove_duplicate=False))
    for theirs, ours in names.items():
        for name, value in trainer.model.get_submodule(ours).named_parameters(recurse=False):
            own = f"{theirs}.parametrizations.{name}.original"
            parameters.pop(own if own in parameters else f"{theirs}.{name}").data.copy_(value.data)
            if f"{ours}.{name}" in masks:
                layer = reference.model.get_submodule(theirs)
                masked = layer.get_submodule(f"parametrizations.{name}.0")
                assert isinstance(masked, Masked)
                masked.get_buffer("mask").copy_(masks[f"{ours}.{name}"])
    assert not parameters, f"not copied: {sorted(parameters)}"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"parameterization": "mup", "density": 1 / 16},
        {"parameterization": "sp", "hparams.lr": 2**-9},
        {
            "density": 1.0,
            "model.bias": True,
            "model.tied_head": True,
            "hparams.alpha_in": 2.0,
            "hparams.alpha_out": 0.5,
        },
    ],
    ids=["supar", "mup", "sp", "dense"],
)
def test_the_reference_has_our_loss_curve(overrides: Mapping[str, Any], corpus: Corpus) -> None:
    cell = tiny_cell(**{**MODERATE, **overrides})
    outcome, ours = run(corpus, cell)
    reference = Reference(reference_point(cell))
    take_over(reference, Trainer(cell, tiny_runtime(), CPU, None))
    context = cell.model.context_tokens
    losses = [
        float(
            reference.step(
                *batch(corpus, seed=cell.seed, step=step, batch_seqs=cell.train.batch_seqs, context_tokens=context),
                step,
            )
        )
        for step in range(cell.train.steps)
    ]
    assert losses == pytest.approx(ours.losses(), abs=1e-5)
    assert ours.losses()[-1] < ours.losses()[0] - 0.1  # something was learned
    assert reference.evaluate(corpus.val) == pytest.approx(outcome.val_loss, abs=1e-5)


def test_the_reference_costs_what_public_code_costs() -> None:
    cell = tiny_cell()
    reference = Reference(reference_point(cell))
    shapes = list(sparse_shapes(cell).values())
    layers = sparse_layers(reference.model)
    assert len(layers) == len(shapes)
    stepped = {id(p) for group in reference.optimizer.param_groups for p in group["params"]}
    for layer, shape in zip(layers, shapes, strict=True):
        (original,) = layer.parameters()
        (mask,) = layer.buffers()
        assert tuple(original.shape) == tuple(mask.shape) == shape
        assert id(original) in stepped
        assert torch.equal(layer.weight, original * mask)
        assert float(mask.mean()) == pytest.approx(cell.density, abs=6 * math.sqrt(cell.density / mask.numel()))
    assert not reference.optimizer.param_groups[0]["fused"]


def test_the_reference_in_bfloat16_is_near(corpus: Corpus) -> None:
    point = reference_point(tiny_cell(**{**MODERATE, "train.precision": "bfloat16"}))
    x, y = windows(corpus.train, [0, 100, 200, 300], 16)
    low, exact = (Reference(each).step(x, y, 0).item() for each in (point, replace(point, precision="float32")))
    assert 0 < abs(low - exact) < 0.02


def test_the_reference_on_our_route_has_the_same_losses(corpus: Corpus) -> None:
    if choose_route("cpu").error is None:
        pytest.skip("this torch has no oneDNN precision setting")
    assert choose_route("cpu").error < 1e-5 or pytest.skip("oneDNN is not fp32 here")  # type: ignore[operator]
    losses = {}
    for route in ("torch", "onednn"):
        reference = Reference(reference_point(tiny_cell(**MODERATE), route=route))
        products = {layer.product for layer in reference.model.modules() if hasattr(layer, "product")}
        assert len(products) == 1
        assert (nn.functional.linear in products) == (route == "torch")
        x, y = windows(corpus.train, [0, 100, 200, 300], 16)
        losses[route] = [float(reference.step(x, y, step)) for step in range(5)]
    assert losses["onednn"] == pytest.approx(losses["torch"], abs=1e-5)


def test_the_reference_is_a_script(corpus: Corpus, tmp_path: Path) -> None:
    point = reference_point(tiny_cell(**{"train.steps": 4}), data=write_tokens(tiny_cell(), tmp_path))
    assert from_command_line(to_command_line(point)) == point
    train, val = read_tokens(point)
    assert np.array_equal(train, corpus.train)
    assert np.array_equal(val, corpus.val)
    command = [sys.executable, "benchmarks/reference.py", *to_command_line(point)]
    answer = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120).stdout)
    assert {key: answer[key] for key in ("width", "density", "lr", "seed")} == {
        **{"width": point.width, "density": point.density},
        **{"lr": point.lr, "seed": point.seed},
    }
    again = Reference(point)
    for step in range(point.steps):
        again.step(*random_batch(point, train), step)
    assert answer["val_loss"] == pytest.approx(again.evaluate(val), abs=1e-4)
    assert answer["process_s"] > answer["train_s"] > 0


def test_the_same_grid_for_both() -> None:
    grid = whole_grids.Setting()
    cells = [point.cell for point in settings(grid.words(64)).points()]
    assert len(cells) == 3 * 4 * 8 * 2
    chosen = whole_grids.spread(len(cells), 12, 16)
    assert len(set(chosen)) == 12
    sample = [cells[index] for index in chosen]
    # every parameterization at every density, and the inner axes walked through
    assert len({(cell.parameterization, cell.density) for cell in sample}) == 3 * 4
    assert len({cell.hparams.lr for cell in sample}) == 8
    assert len({cell.seed for cell in sample}) == 2
    point = reference_point(sample[-1])
    assert (point.steps, point.batch_seqs, point.context_tokens, point.width) == (100, 8, 64, 64)
    assert (point.lr, point.density) == (sample[-1].hparams.lr, sample[-1].density)
    assert {point.lr for point in map(reference_point, cells)} == {2.0**k for k in range(-11, -3)}
    assert grid.shared(1 / 4).n_lrs == 8 / 4


def test_both_have_the_shape_of_the_command_line() -> None:
    cell = settings([*SHAPE, "model.width=128"]).cell()
    # what the script has by default is what the benchmarks train
    lr, steps = cell.hparams.lr, cell.train.steps
    assert reference_point(cell) == Point(width=128, density=cell.density, lr=lr, steps=steps, seed=cell.seed)


def test_ratios() -> None:
    ms = {AS_SHIPPED: 12.0, SAME_ROUTE: 6.0, "dense": 5.0, "compact": 3.0, "auto": 2.0}
    key = {"device": "cpu", "threads": 1, "width": 64, "one_in": 4}
    rows = [
        {**key, "variant": name, "step_ms": each, "peak_bytes": 7 * each, "state_bytes": 2**20 * each**2}
        for name, each in ms.items()
    ]
    (line,) = step_time.ratios(rows)
    for name in ("dense", "compact", "auto"):
        assert line[f"{name}_x"] == 12 / ms[name]
        assert line[f"{name}_x_same_route"] == 6 / ms[name]
    assert line["peak_x"] == 12 / 2
    assert (line["state_x"], line["state_reference_mib"]) == ((12 / 2) ** 2, 12**2)
    (dense_only,) = step_time.ratios([row for row in rows if row["variant"] != "compact"])
    assert "compact_x" not in dense_only
    assert set(OURS) | {AS_SHIPPED, SAME_ROUTE} == set(VARIANTS)


def test_grid_ratios() -> None:
    row = whole_grids.compare(192, 12, sequential_s=30, packed_s=20, routed_s=15, ours_s=64)
    assert row["sequential_s"] == 30 * 192 / 12
    assert row["sequential_x"] == 30 * 192 / 12 / 64
    assert (row["faster"], row["x"]) == ("packed", 20 * 192 / 12 / 64)
    assert row["x_same_route"] == 15 * 192 / 12 / 64
    assert whole_grids.compare(192, 12, 10, 20, 15, 64)["x"] == 10 * 192 / 12 / 64


def test_losses_are_compared_where_there_are_two() -> None:
    found = whole_grids.same_losses([1.0, None, 3.0, 4.0], [1.5, 2.0, None, 4.5])
    assert found == {"reference_val_loss": (1 + 4) / 2, "ours_val_loss": (1.5 + 4.5) / 2, "losses_of": 2}
    assert whole_grids.same_losses([None], [1.0]) == {"losses_of": 0}


def test_bars() -> None:
    rows = [
        {"threads": 1, "width": width, "one_in": one_in, "dense_x": 2 + width, "auto_x": 3.5, "state_x": 19.0}
        for width, one_in in ((256, 1), (1024, 16), (2048, 64))
    ]
    rows.append({**rows[0], "threads": 2, "dense_x": 0.0})
    of = {bar["claim"]: bar for bar in verdicts({"a": rows})}
    assert len(of) == 4
    assert [bar["value"] for bar in of.values()] == [2 + 256, 3.5, 3.5, 19.0]
    assert [bar["met"] for bar in of.values()] == [True, True, False, False]
    assert [bar["met"] for bar in verdicts({"d": [{"width": 4096, "one_in": 256, "state_x": 1.5}]})] == [True]
    assert [bar["met"] for bar in verdicts({"d": [{"width": 4096, "one_in": 256, "state_x": 1.6}]})] == [False]
    assert [bar["value"] for bar in verdicts({"b": []})] == [None, None]  # not measured, not met either
    assert {bar.part for bar in BARS} == {"a", "b", "d"}


def test_only_full_measurements_are_judged() -> None:
    table = [{"width": 64, "x": 7.0}]
    full = {"settings": asdict(FULL.b), "table": table}
    assert [(bar["value"], bar["met"]) for bar in judged({"b": full})] == [(None, None), (7.0, True)]
    assert judged({"b": json.loads(json.dumps(full))}) == judged({"b": full})
    assert judged({"b": {**full, "settings": asdict(FULL.b.shared(1 / 2))}}) == []
    assert judged({"c": {"note": "no GPU here"}}) == []


def test_bounds() -> None:
    work = iso_parameter.linear_work(fan_in=3, fan_out=5, n_live=4, tokens=7)
    assert work.flops == 3 * 2 * 4 * 7
    forward, backward = 7 * (3 + 5), 7 * (5 + 3 + 3)
    assert work.n_bytes == 4 * (forward + backward + 4 * 9)
    attention = iso_parameter.attention_work(width=6, batch_seqs=2, context_tokens=5)
    assert attention.flops == 3 * (2 * 2 * 2 * 5 * 5 * 6) / 2
    assert attention.n_bytes == 4 * 12 * (2 * 5 * 6)
    # constant live weights: the same products, whatever the width
    assert iso_parameter.linear_work(64, 64, 64, 9).flops == iso_parameter.linear_work(128, 128, 64, 9).flops
    assert all(width**2 / one_in == 256**2 for width, one_in in iso_parameter.Setting().shapes)


@pytest.mark.slow
def test_everything_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))
    parts = results["parts"]
    assert set(parts) == set("abcd")
    for part in parts.values():
        assert part["machine"]["versions"]["torch"]
        assert part["machine"]["cores"] >= 1
        assert part["wall_s"] > 0
    rows = {row["variant"]: row for row in parts["a"]["rows"]}
    assert set(rows) == set(VARIANTS)
    width, n_live = 64, 64 * 64 // 4
    # a dense layer of the reference: weight, gradient, mask, two moments; of ours a byte a mask entry
    n_dense = 2 * 12 * width**2
    assert rows[AS_SHIPPED]["state_bytes"] == 5 * 4 * n_dense
    assert rows["dense"]["state_bytes"] == (4 * 4 + 1) * n_dense
    per_block = [(3, 1), (1, 1), (4, 1), (1, 4)]
    assert rows["compact"]["state_bytes"] == 2 * sum(
        compact_layer_bytes(width * out, width * into, n_live * out * into) for out, into in per_block
    )
    assert parts["a"]["table"] == step_time.ratios(parts["a"]["rows"])
    (grid,) = parts["b"]["table"]
    assert (grid["points"], grid["processes"], grid["ours_cells"]) == (2, 1, 2)
    assert grid["x"] == min(grid["sequential_s"], grid["packed_s"]) / grid["ours_s"]
    # of one point, from other draws of start and batches
    assert grid["losses_of"] == 1
    assert abs(grid["reference_val_loss"] - grid["ours_val_loss"]) < 0.5
    first, second = parts["d"]["table"]
    assert first["live"] == second["live"] == 12 * 64**2
    assert (first["state_x"], second["state_x"]) == (1, second["state_bytes"] / first["state_bytes"])
    for part in ("linear", "attention", "elementwise"):
        assert first[f"{part}_of_bound"] == pytest.approx(first[f"{part}_ms"] / first[f"{part}_bound_ms"])
    assert results["bars"] == []
    for line in (
        "a. A step",
        "b. A whole grid",
        "d. A step",
        "Bars",
        "no GPU here" if "note" in parts["c"] else "cuda",
    ):
        assert line in done.stdout


def test_variants_take_turns(tmp_path: Path) -> None:
    composed = settings([*SHAPE, "model.width=64", "model.context_tokens=16", "density=0.25"])
    plain = composed.cell_plain()
    data = write_tokens(decode(CellConfig, plain), tmp_path)
    with Turns(["dense"], plain) as turns:
        facts = turns.build(Place(1, "cpu", data, composed.plain["runtime"]))
        assert facts["dense"]["n_models"] == 1
        step_s, n_rounds = turns.measure(Effort(budget_s=0, min_rounds=2, max_rounds=5))
        assert (set(step_s), n_rounds) == ({"dense"}, 2)
        assert turns.memory()["dense"]["peak_bytes"] > turns.memory()["dense"]["state_bytes"]
