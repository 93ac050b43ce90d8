"""What diverges in a study: what the sampler is told of it, that it never wins, and what is said where all of it does."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution

from supar_sweep.config.schema import CellConfig
from supar_sweep.config.study import StudyConfig
from supar_sweep.errors import ConfigError, SuparError
from supar_sweep.sweep import tune as tuner
from supar_sweep.sweep.sampling import make_sampler, told_as_diverged
from supar_sweep.sweep.winner import load_winner
from tests.big_loss import OPTIMUM, TARGET
from tests.command_line import CELL, call, here
from tests.studies import LOG2_LR_OPT, Basin, proxy, run, study, trials, values

__all__ = ["here"]

OWN = "mine.train"


def own(**overrides: Any) -> CellConfig:
    return proxy(**{"train.target": OWN, **overrides})


def diverged(folder: Path) -> list[bool]:
    return [trial.user_attrs["end"] == "diverged" for trial in trials(folder)]


@pytest.mark.parametrize(("sampler", "floor"), [("tpe", 300.0), ("tpe", -300.0), ("gp", -300.0), ("cma", 300.0)])
def test_on_any_scale_of_an_own_loss_divergence_is_the_worst(tmp_path: Path, sampler: str, floor: float) -> None:
    if sampler == "cma":
        pytest.importorskip("cmaes")
    trainer = Basin(floor=floor, diverges_above_log2_lr=LOG2_LR_OPT + 2)
    config = study(sampler=sampler, n_trials=16)
    winner = run(tmp_path, trainer, config, proxy=own())
    assert abs(math.log2(winner.hparams.lr) - LOG2_LR_OPT) < 2
    assert 0 < sum(diverged(tmp_path)) < 16
    assert [value == math.inf for value in values(tmp_path)] == diverged(tmp_path)
    confirmed = [cell for cell in trainer.trained if cell.seed != 0]
    assert max(math.log2(cell.hparams.lr) for cell in confirmed) <= LOG2_LR_OPT + 2


def reference(config: StudyConfig, base: CellConfig, wall: float) -> list[tuple[dict[str, float], float]]:
    """Return parameters and told value of each trial as the first version made them: divergence is log(n_vocab)."""
    space = {
        name: FloatDistribution(2**interval.low_log2, 2**interval.high_log2, log=True)
        for name, interval in config.intervals().items()
    }
    made = optuna.create_study()
    made.enqueue_trial({name: getattr(base.hparams, name) for name in space})
    assert config.batch_trials is not None
    while len(made.trials) < config.n_trials or any(trial.state.name == "WAITING" for trial in made.trials):
        batch = []
        for _ in range(config.batch_trials):
            made.sampler = make_sampler(config.sampler, config.seed, len(made.trials))
            batch.append(made.ask(dict(space)))
        for trial in batch:
            x, y = math.log2(trial.params["lr"]), math.log2(trial.params["init_std"])
            loss = 2 + 0.05 * (x - LOG2_LR_OPT) ** 2 + 0.02 * (y + 3.6) ** 2 + 0.01 * base.seed
            made.tell(trial, math.log(base.data.n_vocab) if x > wall else loss)
    return [(trial.params, trial.value) for trial in made.trials if trial.value is not None]


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_study_of_the_built_in_gpt_repeats_the_stored_ones(tmp_path: Path, sampler: str) -> None:
    config, wall = study(sampler=sampler, n_trials=20), LOG2_LR_OPT + 1
    run(tmp_path, Basin(diverges_above_log2_lr=wall), config)
    assert math.log(proxy().data.n_vocab) in values(tmp_path)
    assert [(trial.params, trial.value) for trial in trials(tmp_path)] == reference(config, proxy(), wall)


def test_a_diverged_trial_of_the_built_in_gpt_loses_to_a_worse_loss(tmp_path: Path) -> None:
    trainer = Basin(floor=10.0, diverges_above_log2_lr=LOG2_LR_OPT)  # stopped early: every loss is above log(n_vocab)
    winner = run(tmp_path, trainer)
    assert math.log(proxy().data.n_vocab) in values(tmp_path)
    assert math.log2(winner.hparams.lr) <= LOG2_LR_OPT
    assert winner.lineage["value"] > 10
    plain = run(tmp_path, trainer, study(confirm_top_k=0, confirm_seeds=()))
    assert math.log2(plain.hparams.lr) <= LOG2_LR_OPT


@pytest.mark.parametrize("base", [proxy(), own()])
def test_where_all_diverge_there_is_no_winner_and_the_space_is_named(tmp_path: Path, base: CellConfig) -> None:
    trainer = Basin(diverges_above_log2_lr=-20)
    wanted = r"all 12 trials diverged.*study\.space\.init_std = 2\^-7 \.\. 2\^-1, study\.space\.lr = 2\^-12 \.\. 2\^-2"
    with pytest.raises(SuparError, match=wanted):
        run(tmp_path, trainer, study(n_trials=12), proxy=base)
    assert not (tmp_path / "best.yaml").exists()
    assert {cell.seed for cell in trainer.trained} == {0}


def test_until_a_loss_is_measured_the_space_is_drawn_from_at_random(tmp_path: Path) -> None:
    config, base = study(n_trials=16, space={"lr": {"low_log2": -12, "high_log2": -2}}), own()
    with pytest.raises(SuparError, match="all 16 trials diverged"):
        run(tmp_path, Basin(diverges_above_log2_lr=-20), config, proxy=base)
    drawn = []
    for asked in range(1, 16):
        made = optuna.create_study(sampler=make_sampler("random", config.seed, asked))
        drawn.append(made.ask().suggest_float("lr", 2.0**-12, 2.0**-2, log=True))
    assert [trial.params["lr"] for trial in trials(tmp_path)] == [base.hparams.lr, *drawn]
    # at the first loss the sampler goes to work
    run(tmp_path, Basin(), study(n_trials=24, space=config.space), proxy=base)
    assert sum(value is not None and value < math.inf for value in values(tmp_path)) == 24 - 16


def test_a_candidate_that_diverges_on_a_fresh_seed_does_not_win(tmp_path: Path) -> None:
    run(tmp_path, Basin())
    first, second = load_winner(tmp_path / "best.yaml").lineage["confirmed"]
    lrs = {number: trials(tmp_path)[number].params["lr"] for number in (first["trial"], second["trial"])}
    run(tmp_path, Basin(diverges_on_seeds={lrs[first["trial"]]: [2]}))
    plain = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert plain["lineage"]["trial"] == second["trial"]
    assert plain["hparams"]["lr"] == lrs[second["trial"]]
    assert plain["lineage"]["confirmed"] == [second, {**first, "values": [first["values"][0], None]}]
    before, both = (tmp_path / "best.yaml").read_bytes(), {lr: [1] for lr in lrs.values()}
    with pytest.raises(SuparError, match=r"best 2 trials \(\d+, \d+\) diverged on a fresh seed.*confirm_top_k=4"):
        run(tmp_path, Basin(diverges_on_seeds=both))
    assert (tmp_path / "best.yaml").read_bytes() == before
    third = run(tmp_path, Basin(diverges_on_seeds=both), study(confirm_top_k=4))
    assert third.hparams.lr not in lrs.values()


def test_a_stored_study_that_was_misled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for floor in (2.0, 300.0):
        folder, trainer = tmp_path / str(floor), Basin(floor=floor, diverges_above_log2_lr=LOG2_LR_OPT)
        with monkeypatch.context() as patch:  # as the first version told it
            patch.setattr(tuner, "told_as_diverged", lambda cell: math.log(cell.data.n_vocab))
            run(folder, trainer, study(n_trials=8), proxy=own())
    run(tmp_path / "2.0", trainer, proxy=own())  # there it was worse than what was measured
    with pytest.raises(ConfigError, match=re.escape("as a loss of 5.545, and measured no loss below that")):
        run(tmp_path / "300.0", trainer, proxy=own())


def test_what_the_sampler_is_told() -> None:
    assert told_as_diverged(proxy()) == math.log(proxy().data.n_vocab)
    assert told_as_diverged(own()) == math.inf


def test_a_loss_far_above_the_vocabularys_through_real_processes(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words = (
        *("tune", *CELL, f"train.target={TARGET}", "launcher.processes=1", "study.n_trials=8", "study.batch_trials=4"),
        *("study.confirm_top_k=1", "study.confirm_seeds=[1]", "hparams.lr=0.0005"),
    )
    assert call(capsys, *words, "study.space={lr:{low_log2:-12,high_log2:-3}}")[0] == 0
    folder = Path("runs/studies/proxy")
    assert abs(math.log2(load_winner(folder / "best.yaml").hparams.lr) - OPTIMUM) < 1
    assert any(diverged(folder))
    above = ("study.n_trials=2", "study.space={lr:{low_log2:-5,high_log2:0}}", "hparams.lr=0.1")
    code, out, err = call(capsys, *words, "study.name=above", *above)
    assert (code, out) == (2, "")
    assert "study above: all 2 trials diverged" in err.splitlines()[-1]
    assert not Path("runs/studies/above/best.yaml").exists()
