"""The coordinate check: what must not move with width and density does not, and what must, does.

Slopes are of log2(statistic) against log2(width or density), averaged over seeds.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from statistics import fmean, linear_regression
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.config.schema import CellConfig
from supar_sweep.training.model import build
from supar_sweep.training.optim import make_optimizer
from supar_sweep.training.probes import coordinate_rows, gpt_sites, gradient_rows, watch
from tests.tiny import tiny_cell

pytestmark = pytest.mark.xdist_group("probes")  # the runs below are shared through caches

N_VOCAB, SEEDS = 64, (0, 1, 2)
WIDTHS = (64, 128, 256)
DENSITIES = (1.0, 1 / 4, 1 / 8)
OPTIMIZERS = {
    "sgd": {"name": "sgd", "decay_mode": "scaled", "clip_norm": None, "momentum": 0.0},
    "adamw": {
        **{"name": "adamw", "decay_mode": "scaled", "clip_norm": None},
        **{"beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
    },
}


def batches(steps: int, seed: int = 0, n_seqs: int = 4, n_tokens: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randint(N_VOCAB, (n_seqs, n_tokens + 1), generator=generator)
        yield x[:, :-1], x[:, 1:]


def loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def cell(
    *,
    width: int = 256,
    density: float = 1.0,
    name: Any = "supar",
    seed: int = 0,
    optimizer: Any = "adamw",
    lr: float = 0.01,
) -> CellConfig:
    return tiny_cell(
        **{
            "model.width": width,
            "model.d_head": 16,
            "model.context_tokens": 32,
            "model.bias": True,
        },
        **{"base.width": 64, "parameterization": name, "density": density, "seed": seed},
        **{"optimizer": OPTIMIZERS[optimizer], "hparams.lr": lr, "hparams.weight_decay": 0.0},
    )


@cache
def checked(steps: int = 5, **shape: Any) -> tuple[dict[tuple[int, str], dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one coordinate check, and the gradient rows of its last step, by (step, site)."""
    made = cell(**shape)
    model, plans = build(made)
    optimizer = make_optimizer(made, plans, "cpu")
    rows = coordinate_rows(model, gpt_sites(model), optimizer, batches(steps), loss)
    return {(r["step"], r["site"]): r for r in rows}, gradient_rows(plans)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    return linear_regression([math.log2(x) for x in xs], [math.log2(y) for y in ys]).slope


def slopes(
    axis: str,
    values: Sequence[float],
    key: str,
    *,
    steps: int = 5,
    step: int | None = None,
    **shape: Any,
) -> dict[str, float]:
    """Site -> slope of a statistic against width or density, over the mean of the seeds."""
    at = steps - 1 if step is None else step
    runs = [[checked(steps=steps, seed=seed, **{axis: value}, **shape)[0] for seed in SEEDS] for value in values]
    sites = [site for number, site in runs[0][0] if number == at]
    return {site: slope(values, [fmean(rows[at, site][key] for rows in seeds) for seeds in runs]) for site in sites}


def hidden(by_site: dict[str, float]) -> dict[str, float]:
    return {site: value for site, value in by_site.items() if site.startswith("block")}


# ---------------------------------------------------------------- the instrument
def test_rows_are_plain_and_cover_every_site_and_step() -> None:
    rows, gradients = checked(steps=3, width=64)
    sites = ["embedding", *(f"block{i}.{part}" for i in (0, 1) for part in ("attention", "mlp"))]
    assert list(rows) == [(step, site) for step in range(3) for site in [*sites, "logits"]]
    for row in rows.values():
        assert row["activation"] > 0
        assert row["gradient"] > 0
        assert row["change"] > 0
        assert all(isinstance(value, str | int | float) for value in row.values())
    assert {row["role"] for row in gradients} == {
        "embedding", "hidden", "hidden_residual", "head", "norm", "bias"
    }  # fmt: skip


def test_statistics_are_what_their_names_say() -> None:
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 1.0]]))
    x = torch.tensor([[1.0, 1.0, 1.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    (row,) = coordinate_rows(
        layer,
        {"out": layer},
        optimizer,
        [(x, x)],
        lambda out, _: (out * torch.tensor([3, 1])).sum(),
    )
    assert row["activation"] == (abs(1 - 2) + abs(0.5 + 1)) / 2
    assert row["gradient"] == (3 + 1) / 2
    # W -= lr * g x^T, so the output moves by lr * g * |x|^2
    assert math.isclose(row["change"], 0.5 * (3 + 1) / 2 * 3, rel_tol=1e-6)
    assert row["loss"] == 3 * (1 - 2) + (0.5 + 1)


def test_hooks_are_gone_after_watching_even_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), watch({"out": layer}):
        layer(torch.ones(1, 3))
    assert not layer._forward_hooks
    with torch.no_grad(), watch({"out": layer}) as recording:
        layer(torch.ones(1, 2))
    assert recording.activations["out"].shape == (1, 2)
    assert not recording.gradients


def test_watching_changes_no_training() -> None:
    made = cell(width=64)
    weights = []
    for watched in (True, False):
        model, plans = build(made)
        optimizer = make_optimizer(made, plans, "cpu")
        if watched:
            coordinate_rows(model, gpt_sites(model), optimizer, batches(2), loss)
        else:
            for x, y in batches(2):
                optimizer.zero_grad()
                loss(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- AdamW: width
@pytest.mark.parametrize("step", [0, 4])
def test_mup_activations_are_flat_in_width(step: int) -> None:
    found = slopes("width", WIDTHS, "activation", step=step, name="mup")
    for site, value in hidden(found).items():
        assert abs(value) < 0.2, (site, value)
    assert abs(found["embedding"]) < 0.05


def test_mup_updates_are_flat_in_width_and_sp_ones_grow() -> None:
    for site, value in hidden(slopes("width", WIDTHS, "change", name="mup")).items():
        assert abs(value) < 0.25, (site, value)
    for site, value in hidden(slopes("width", WIDTHS, "change", name="sp")).items():
        assert value > 0.5, (site, value)


def test_mup_gradients_fall_as_one_over_width() -> None:
    # the logits multiplier 1/m_d; this is what eps / m_d rests on
    found = slopes("width", WIDTHS, "gradient", step=0, name="mup")
    for site, value in found.items():
        wanted = 0.0 if site == "logits" else -1.0
        assert abs(value - wanted) < 0.15, (site, value)


def parameter_gradient_slopes(axis: str, values: Sequence[float], **shape: Any) -> dict[str, float]:
    by_role: dict[str, dict[float, list[float]]] = {}
    for value in values:
        for seed in SEEDS:
            for row in checked(steps=1, seed=seed, **{axis: value}, **shape)[1]:
                by_role.setdefault(row["role"], {}).setdefault(value, []).append(row["gradient"])
    return {role: slope(values, [fmean(points[value]) for value in values]) for role, points in by_role.items()}


def test_every_roles_gradients_fall_with_width_alike_and_not_with_density() -> None:
    for role, value in parameter_gradient_slopes("width", WIDTHS).items():
        assert abs(value + 1) < 0.25, (role, value)
    for role, value in parameter_gradient_slopes("density", DENSITIES).items():
        assert abs(value) < 0.1, (role, value)


# ---------------------------------------------------------------- AdamW: density
@pytest.mark.parametrize("step", range(5))
def test_supar_activations_are_flat_in_density_and_others_fall(step: int) -> None:
    flat = slopes("density", DENSITIES, "activation", step=step)
    for site, value in flat.items():
        assert abs(value) < 0.12, (site, value)
    for name in ("sp", "mup"):
        moving = hidden(slopes("density", DENSITIES, "activation", step=step, name=name))
        for site, value in moving.items():
            assert value > 0.4, (name, site, value)


@pytest.mark.parametrize("step", [0, 4])
def test_supar_updates_are_flat_in_density_and_sps_fall(step: int) -> None:
    for site, value in hidden(slopes("density", DENSITIES, "change", step=step)).items():
        assert abs(value) < 0.15, (site, value)
    for site, value in hidden(slopes("density", DENSITIES, "change", step=step, name="sp")).items():
        assert value > 0.5, (site, value)


# ---------------------------------------------------------------- SGD: the rule table, role by role
FED_BY = {
    "embedding": ["embedding"],
    "hidden": ["block0.attention", "block0.mlp", "block1.attention", "block1.mlp"],
    "hidden_residual": ["block0.attention", "block0.mlp", "block1.attention", "block1.mlp"],
    "head": ["logits"],
    "norm": ["block0.attention", "block0.mlp", "block1.attention", "block1.mlp"],
    "bias": ["block0.attention", "block0.mlp", "block1.attention", "block1.mlp"],
}


@cache
def sgd_change(role: str, ruled: bool, **shape: Any) -> dict[str, float]:
    """Site -> mean change of the sites that `role` feeds when one SGD step moves its weights alone.

    ruled=False takes the rule's factor on the learning rate away again.
    """
    totals: dict[str, list[float]] = {}
    for seed in SEEDS:
        made = cell(seed=seed, optimizer="sgd", **shape)
        model, plans = build(made)
        optimizer = torch.optim.SGD(
            [
                {"params": [p.parameter], "lr": p.hparams.lr if ruled else made.hparams.lr}
                for p in plans
                if p.role == role
            ]
        )
        for row in coordinate_rows(model, gpt_sites(model), optimizer, batches(1), loss):
            if row["site"] in FED_BY[role]:
                totals.setdefault(row["site"], []).append(row["change"])
    return {site: fmean(values) for site, values in totals.items()}


def sgd_slopes(role: str, axis: str, values: Sequence[float], *, ruled: bool = True) -> list[float]:
    found = [sgd_change(role, ruled, **{axis: value}) for value in values]
    return [slope(values, [change[site] for change in found]) for site in FED_BY[role]]


@pytest.mark.parametrize("role", FED_BY)
def test_sgd_updates_are_flat_in_width(role: str) -> None:
    # over all the sites that a role feeds: single ones scatter more
    assert abs(fmean(sgd_slopes(role, "width", WIDTHS))) < 0.15


@pytest.mark.parametrize("role", FED_BY)
def test_sgd_updates_are_flat_in_density(role: str) -> None:
    assert abs(fmean(sgd_slopes(role, "density", DENSITIES))) < 0.1


@pytest.mark.parametrize("role", ["embedding", "head", "norm", "bias"])
def test_sgd_updates_vanish_with_width_without_the_factor_m_d(role: str) -> None:
    assert fmean(sgd_slopes(role, "width", WIDTHS, ruled=False)) < -0.75


@pytest.mark.parametrize("role", ["hidden", "hidden_residual"])
def test_sgd_updates_vanish_with_density_without_the_factor_m_rho(role: str) -> None:
    assert fmean(sgd_slopes(role, "density", DENSITIES, ruled=False)) > 0.75


def test_the_sgd_rules_hold_together_and_plain_sgd_does_not() -> None:
    for axis, values in (("width", WIDTHS), ("density", DENSITIES)):
        flat = hidden(slopes(axis, values, "change", steps=2, step=0, optimizer="sgd"))
        for site, value in flat.items():
            assert abs(value) < 0.25, (axis, site, value)
        sp = hidden(slopes(axis, values, "change", steps=2, step=0, optimizer="sgd", name="sp"))
        assert max(abs(value) for value in sp.values()) > 0.5, axis
