"""The numbers that transfer, and the shapes that they transfer between. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from supar_sweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters in base units: at the base shape every multiplier is 1 and these are used as they stand.

    Args:
        lr: peak learning rate, > 0.
        init_std: standard deviation of the weights' start (s), > 0.
        alpha_in: multiplier of the embedding's output, > 0 (muP and SuPar; SP has none).
        alpha_out: multiplier of the logits, > 0 (muP and SuPar; SP has none).
        weight_decay: AdamW or SGD weight decay of weights with two or more dimensions, >= 0.

    Raises:
        ConfigError: a value out of its range.
    """

    lr: float
    init_std: float
    alpha_in: float
    alpha_out: float
    weight_decay: float

    def __post_init__(self) -> None:
        for name in ("lr", "init_std", "alpha_in", "alpha_out"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(name, "must be positive", value=value, allowed="a number > 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError("weight_decay", "must not be negative", value=self.weight_decay, allowed="a number >= 0")


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """The shape at which every multiplier is 1. It is dense: base density = 1 by definition.

    Args:
        width: d_model of the base, >= 1.
        n_layer: depth of the base, >= 1.

    Raises:
        ConfigError: a value out of its range.
    """

    width: int
    n_layer: int

    def __post_init__(self) -> None:
        for name in ("width", "n_layer"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(name, "must be at least 1", value=value, allowed="an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """A target measured in units of the base.

    Args:
        m_d: width (fan_in) ratio, > 0; no default, because a forgotten one would be SP's logits and eps in silence.
        m_rho: density ratio, in (0, 1]; the base is dense, so this is the achieved density itself.
        m_L: depth ratio n_layer / base_n_layer, > 0.
        n_layer: the target's own depth (the GPT-2 depth rule is absolute, not a ratio), >= 1.

    Raises:
        ConfigError: a value out of its range.
    """

    m_d: float
    m_rho: float = 1.0
    m_L: float = 1.0
    n_layer: int = 1

    def __post_init__(self) -> None:
        for name in ("m_d", "m_L"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(name, "must be positive", value=value, allowed="a number > 0")
        if not 0 < self.m_rho <= 1:
            raise ConfigError("density", "out of range", value=self.m_rho, allowed="0 < density <= 1")
        if self.n_layer < 1:
            raise ConfigError("n_layer", "must be at least 1", value=self.n_layer)
