"""Base hyperparameters + a target's ratios -> the target's hyperparameters, role by role. No torch.

The numbers come from the rule table (parameterization.py) and nowhere else: this module multiplies, it knows no exponent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import HParams, Ratios
from supar_sweep.rules.parameterization import Method, Quantity, Role, Site, multiplier


@dataclass(frozen=True, kw_only=True)
class RoleHParams:
    """What one parameter is trained with at the target.

    Args:
        init_std: standard deviation of the live entries' start; 0 for norms and biases, which start at a constant.
        lr: peak learning rate.
        weight_decay: as torch's optimizers take it (AdamW: p *= 1 - lr * weight_decay each step).
        eps: AdamW's eps; None for SGD.
    """

    init_std: float
    lr: float
    weight_decay: float
    eps: float | None


@dataclass(frozen=True, kw_only=True)
class ForwardMultipliers:
    """Factors inside the forward pass: embedding output, logits, attention logits (QK^T times this), residual branches."""

    embedding_output: float
    logits: float
    attention_scale: float
    residual: float


def role_hparams(
    role: Role,
    method: Method,
    ratios: Ratios,
    hparams: HParams,
    *,
    in_block: bool,
    eps: float | None = None,
) -> RoleHParams:
    """Return the target's hyperparameters for one parameter.

    Args:
        role: the parameter's role.
        method: the rules in force.
        ratios: the parameter's own ratios: m_d of its fan_in, m_rho of its achieved density.
        hparams: base hyperparameters.
        in_block: whether the parameter sits inside a residual block (CompleteP's columns act only there).
        eps: AdamW's eps in base units; None for SGD.

    Raises:
        ConfigError: AdamW without eps.

    Source: SuPar table 1: init_std = s * sqrt(init_var factor), lr = lr * factor; weight decay and eps: the table's rows.
    """

    def factor(quantity: Quantity) -> float | None:
        return multiplier(quantity, role, method, ratios, in_block=in_block)

    init_var, lr_mult = factor("init_var"), factor("lr")
    decay_mult, eps_mult = factor("weight_decay"), factor("eps")
    assert init_var is not None and lr_mult is not None and decay_mult is not None
    if eps_mult is not None and eps is None:
        raise ConfigError("optimizer.eps", f"must be set for {method.optimizer}")
    lr = hparams.lr * lr_mult
    weight_decay = hparams.weight_decay * decay_mult
    if method.decay_mode == "independent":
        # torch shrinks by lr * weight_decay; dividing by the group's own lr leaves weight_decay * schedule factor
        weight_decay /= lr
    return RoleHParams(
        init_std=hparams.init_std * math.sqrt(init_var),
        lr=lr,
        weight_decay=weight_decay,
        eps=None if eps_mult is None or eps is None else eps * eps_mult,
    )


def forward_multipliers(method: Method, ratios: Ratios, hparams: HParams, *, d_head: int = 1) -> ForwardMultipliers:
    """Return the forward factors of the target.

    Args:
        method: the rules in force.
        ratios: the target's ratios (m_d of d_model).
        hparams: base hyperparameters (alpha_in, alpha_out; SP reads neither).
        d_head: head dimension, >= 1; leave it out where there is no attention.

    Source: SuPar table 1: embedding alpha_in x W, logits alpha_out x W^T / m_d, attention QK^T / d_head;
    CP table 1: residual branch / m_L^alpha.
    """

    def factor(site: Site) -> float:
        value = multiplier(
            "forward",
            site,
            method,
            ratios,
            in_block=site == "residual",
            alpha_in=hparams.alpha_in,
            alpha_out=hparams.alpha_out,
            d_head=d_head,
        )
        assert value is not None
        return value

    return ForwardMultipliers(
        embedding_output=factor("embedding_output"),
        logits=factor("logits"),
        attention_scale=factor("attention_scale"),
        residual=factor("residual"),
    )
