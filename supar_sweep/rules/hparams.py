"""The numbers that transfer, and the shapes that they transfer between. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from supar_sweep.errors import ConfigError

LARGEST_LOG2 = 100
"""Hyperparameters lie within 2^-100 .. 2^100: times the factors of a shape they must stay in float32, 2^-126 .. 2^128."""
SMALLEST, LARGEST = 2.0**-LARGEST_LOG2, 2.0**LARGEST_LOG2


@dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters in base units: at the base shape every multiplier is 1 and these are used as they stand.

    Args:
        lr: peak learning rate, 2^-100 .. 2^100.
        init_std: standard deviation of the weights' start (s), 2^-100 .. 2^100.
        alpha_in: multiplier of the embedding's output, 2^-100 .. 2^100 (muP and SuPar; SP has none).
        alpha_out: multiplier of the logits, 2^-100 .. 2^100 (muP and SuPar; SP has none).
        weight_decay: AdamW or SGD weight decay of weights with two or more dimensions, 0 .. 2^100.

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
            if not SMALLEST <= value <= LARGEST:
                raise ConfigError(
                    name, "out of range", value=value, allowed=f"{SMALLEST:.2g} .. {LARGEST:.2g} (2^-100 .. 2^100)"
                )
        if not (math.isfinite(self.weight_decay) and 0 <= self.weight_decay <= LARGEST):
            problem = "must not be negative" if self.weight_decay < 0 else "out of range"
            raise ConfigError("weight_decay", problem, value=self.weight_decay, allowed=f"0 .. {LARGEST:.2g}")


MAX_WIDTH, MAX_N_LAYER = 1_000_000, 10_000
"""ASSUMPTION: no decoder comes near (the largest published ones have widths of some 20,000, the deepest about 1,000 layers); a
larger number is a slip, and every layer has its own row in what a cell costs."""


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """The shape at which every multiplier is 1. It is dense: base density = 1 by definition.

    Args:
        width: d_model of the base, 1 .. MAX_WIDTH.
        n_layer: depth of the base, 1 .. MAX_N_LAYER.

    Raises:
        ConfigError: a value out of its range.
    """

    width: int
    n_layer: int

    def __post_init__(self) -> None:
        for name, most in (("width", MAX_WIDTH), ("n_layer", MAX_N_LAYER)):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(name, "must be at least 1", value=value, allowed="an integer >= 1")
            if value > most:
                raise ConfigError(name, "out of range", value=value, allowed=f"1 .. {most}")


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
