"""The schema of a tuning study: what is searched, how, and how the winner is confirmed. No torch, no Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from supar_sweep.config.fields import check_folder_name, check_ranges, setting
from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import LARGEST_LOG2, HParams

MAX_TRIALS = 1_000_000
"""ASSUMPTION: no study has more; its journal is read whole."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A search interval in log2: value = 2^x with low_log2 <= x <= high_log2, both ends included."""

    low_log2: float = setting("lower end")
    high_log2: float = setting("upper end")

    def __post_init__(self) -> None:
        for name in ("low_log2", "high_log2"):
            # beyond, 2^x is 0 or infinite in the arithmetic of the search
            if not abs(value := getattr(self, name)) <= LARGEST_LOG2:
                raise ConfigError(name, "out of range", value=value, allowed=f"-{LARGEST_LOG2} .. {LARGEST_LOG2}")
        if not self.low_log2 < self.high_log2:
            raise ConfigError("low_log2", f"must be below high_log2 = {self.high_log2}", value=self.low_log2)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One Optuna study of base hyperparameters on the proxy."""

    name: str = setting("folder of the study below runs_dir/studies")
    n_trials: int = setting("total budget: a rerun tops up to it", ge=1, le=MAX_TRIALS)
    sampler: str = setting("Optuna sampler", choices=("tpe", "random", "qmc", "gp", "cma"))
    seed: int = setting("of the sampler", ge=0, le=2**63 - 1)
    metric: str = setting("what is minimised", choices=("train_loss", "val_loss"))
    batch_trials: int | None = setting(
        "ask for so many trials, then tell them in order: the study repeats exactly; null = asynchronous",
        ge=1,
        le=MAX_TRIALS,
    )
    confirm_top_k: int = setting("best trials that are rerun; 0 = take the best as it stands", ge=0, le=MAX_TRIALS)
    confirm_seeds: tuple[int, ...] = setting("seeds of the reruns, none of them the trials' own")
    space: Mapping[str, Any] = setting("hyperparameter -> {low_log2, high_log2}")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_folder_name("name", self.name)
        names = [item.name for item in fields(HParams)]
        if not self.space:
            raise ConfigError("space", "is empty: nothing to search", allowed=names)
        for name in self.space:
            if name not in names:
                raise ConfigError(f"space.{name}", "is not a hyperparameter", allowed=names, nearest_to=name)
        if self.confirm_top_k and not self.confirm_seeds:
            raise ConfigError(
                "confirm_seeds",
                f"is empty, but confirm_top_k = {self.confirm_top_k} trials are to be rerun",
                value=[],
                allowed="at least one seed, or confirm_top_k = 0",
            )
        if self.confirm_seeds and not self.confirm_top_k:
            raise ConfigError(
                "confirm_top_k",
                f"reruns no trial, but there are confirm_seeds = {list(self.confirm_seeds)} for it",
                value=0,
                allowed="at least 1, or confirm_seeds = []",
            )
        if len(set(self.confirm_seeds)) < len(self.confirm_seeds) or min(self.confirm_seeds, default=0) < 0:
            raise ConfigError(
                "confirm_seeds",
                "must be different seeds",
                value=list(self.confirm_seeds),
                allowed="integers >= 0, each once",
            )
        self.intervals()

    def intervals(self) -> dict[str, Interval]:
        """Return the space as intervals, by hyperparameter, in a fixed order."""
        from supar_sweep.config.decode import decode

        return {name: decode(Interval, self.space[name], prefix=f"space.{name}") for name in sorted(self.space)}
