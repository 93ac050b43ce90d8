"""Optuna's samplers as the tuner uses them. Optuna is imported when asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from supar_sweep.config.schema import CellConfig
from supar_sweep.config.study import StudyConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.trials import diverged, measured

if TYPE_CHECKING:
    import optuna


def told_as_diverged(proxy: CellConfig) -> float:
    """Return the loss that stands for a diverged trial when the sampler is told of it.

    For the built-in GPT it is log(n_vocab), the loss of a model that knows nothing. The losses of an own training function
    (train.target) have a scale of their own, on which no number is surely worse than all that are still to come. So it is
    infinity: the same for every trial, whatever was told before, and worse than every finite loss. TPE and CMA-ES read the
    order of losses only, and the Gaussian process takes the worst finite loss in its place.
    """
    return math.log(proxy.data.n_vocab) if proxy.train.target is None else math.inf


def next_sampler(
    study: StudyConfig, trials: Sequence[optuna.trial.FrozenTrial], told: float
) -> optuna.samplers.BaseSampler:
    """Return the sampler for the next trial: the study's, but random as long as every trial that was told diverged at infinity.

    There is no order among such trials, and a model of them would mislead. A low-discrepancy sequence has no model.

    Args:
        study: names the sampler, and its seed.
        trials: all of the study so far.
        told: what stands for a diverged trial.
    """
    ended = [trial for trial in trials if trial.value is not None]
    blind = math.isinf(told) and bool(ended) and not any(map(measured, ended))
    return make_sampler("random" if blind and study.sampler != "qmc" else study.sampler, study.seed, len(trials))


def refuse_misled(name: str, trials: Sequence[optuna.trial.FrozenTrial], told: float) -> None:
    """Raise ConfigError for a study whose divergences an earlier version told to the sampler as the best losses of all.

    Args:
        name: the study's.
        trials: all of the study so far.
        told: what stands for a diverged trial now.
    """
    divergences = [trial.value for trial in trials if diverged(trial) and trial.value is not None]
    losses = [trial.value for trial in trials if measured(trial) and trial.value is not None]
    if min(divergences, default=math.inf) < min(told, *losses, math.inf):
        raise ConfigError(
            "study.name",
            f"an earlier version told this study's diverged trials to the sampler as a loss of {min(divergences):.4g}, and "
            "measured no loss below that: it searched where training diverges",
            value=name,
            allowed="a new name; cells that are done are not trained again",
        )


def make_sampler(name: str, seed: int, n_asked: int) -> optuna.samplers.BaseSampler:
    """Return a sampler reseeded from (seed, trials asked so far): a resumed study never repeats its random start.

    Args:
        name: tpe, random, qmc, gp or cma.
        seed: of the study.
        n_asked: trials in the study before this one.

    Raises:
        ConfigError: cma without the cmaes package.
    """
    import optuna.samplers as samplers

    digest = hashlib.sha256(f"{seed}/{n_asked}".encode()).digest()
    fresh = int.from_bytes(digest[:4], "little")
    if name == "random":
        return samplers.RandomSampler(seed=fresh)
    if name == "qmc":
        # a low-discrepancy sequence is one sequence: its position is kept in the study, its scrambling must not change
        return samplers.QMCSampler(
            scramble=True, seed=seed, warn_asynchronous_seeding=False, warn_independent_sampling=False
        )
    if name == "gp":
        return samplers.GPSampler(seed=fresh)
    if name == "cma":
        from importlib.util import find_spec

        if find_spec("cmaes") is None:
            raise ConfigError("study.sampler", "needs the package cmaes: pip install 'supar-sweep[cma]'", value=name)
        return samplers.CmaEsSampler(seed=fresh, warn_independent_sampling=False)
    return samplers.TPESampler(seed=fresh)
