"""Base hyperparameters times the table's factors: role_hparams and forward_multipliers."""

import math
from itertools import product
from typing import Any, get_args

import pytest

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import HParams, Ratios
from supar_sweep.rules.parameterization import (
    PARAMETERIZATIONS,
    ROLES,
    DecayMode,
    Method,
    Role,
    multiplier,
)
from supar_sweep.rules.transfer import forward_multipliers, role_hparams

BASE = HParams(lr=0.02, init_std=0.08, alpha_in=5.0, alpha_out=2.0, weight_decay=0.1)
TARGET = Ratios(m_d=8, m_rho=1 / 4, m_L=4, n_layer=8)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_values_are_base_values_times_the_tables_factors(name: Any, optimizer: Any) -> None:
    method = Method(parameterization=name, optimizer=optimizer)
    eps = 1e-8 if optimizer == "adamw" else None
    for role, block in product(ROLES, (True, False)):
        got = role_hparams(role, method, TARGET, BASE, in_block=block, eps=eps)
        factors: Any = [
            multiplier(q, role, method, TARGET, in_block=block) for q in ("init_var", "lr", "weight_decay", "eps")
        ]
        init_var, lr, decay, eps_mult = factors
        assert got.init_std == BASE.init_std * math.sqrt(init_var)
        assert got.lr == BASE.lr * lr
        assert got.weight_decay == BASE.weight_decay * decay
        assert got.eps == (None if eps is None else eps * eps_mult)


def test_supar_hidden_layer_in_numbers() -> None:
    method = Method(parameterization="supar", depth="none")
    got = role_hparams("hidden", method, TARGET, BASE, in_block=True, eps=1e-8)
    m_d_m_rho = 8 / 4
    assert math.isclose(got.init_std, 0.08 / math.sqrt(m_d_m_rho), rel_tol=1e-15)
    assert got.lr == 0.02 / m_d_m_rho
    assert got.weight_decay == 0.1 * m_d_m_rho
    assert got.eps == 1e-8 / 8


def test_the_three_decay_modes() -> None:
    """What one step takes from a hidden weight is lr * weight_decay in torch's optimizers."""
    shrink = {}
    for mode in ("scaled", "coupled", "independent"):
        method = Method(parameterization="supar", decay_mode=mode)
        got = role_hparams("hidden", method, TARGET, BASE, in_block=True, eps=1e-8)
        shrink[mode] = got.lr * got.weight_decay
    assert math.isclose(shrink["scaled"], BASE.lr * BASE.weight_decay, rel_tol=1e-12)
    assert math.isclose(shrink["coupled"], BASE.lr / 2 * BASE.weight_decay, rel_tol=1e-12)
    assert math.isclose(shrink["independent"], BASE.weight_decay, rel_tol=1e-12)


def test_no_mode_decays_norms_and_biases() -> None:
    roles: tuple[Role, ...] = ("norm", "bias")
    for mode, role in product(get_args(DecayMode), roles):
        method = Method(parameterization="supar", decay_mode=mode)
        got = role_hparams(role, method, TARGET, BASE, in_block=True, eps=1e-8)
        assert got.weight_decay == 0
        assert got.init_std == 0


def test_adamw_without_eps_is_an_error_and_sgd_reads_none() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.eps: must be set for adamw"):
        role_hparams("hidden", Method(parameterization="mup"), TARGET, BASE, in_block=True)
    sgd = Method(parameterization="mup", optimizer="sgd")
    assert role_hparams("hidden", sgd, TARGET, BASE, in_block=True, eps=None).eps is None


def test_forward_multipliers() -> None:
    for name in ("mup", "supar", "init_only", "lr_only"):
        got = forward_multipliers(Method(parameterization=name), TARGET, BASE, d_head=64)
        assert got.embedding_output == 5.0
        assert got.logits == 2.0 / 8
        assert got.attention_scale == 1 / 64
        assert got.residual == 1.0
    sp = forward_multipliers(Method(parameterization="sp"), TARGET, BASE, d_head=64)
    assert (sp.embedding_output, sp.logits, sp.residual) == (1.0, 1.0, 1.0)
    assert sp.attention_scale == 1 / math.sqrt(64)


def test_completep_scales_the_residual_branches() -> None:
    for alpha in (0.5, 0.75, 1.0):
        method = Method(parameterization="supar", depth="completep", depth_alpha=alpha)
        got = forward_multipliers(method, TARGET, BASE, d_head=64).residual
        assert math.isclose(got, 4.0**-alpha, rel_tol=1e-14)
