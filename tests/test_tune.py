"""The tuner against an analytic basin (exact, fast), and against killed and competing coordinators (real processes)."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from optuna.storages.journal import JournalFileOpenLock

from supar_sweep.config.schema import CellConfig
from supar_sweep.config.study import StudyConfig
from supar_sweep.errors import BusyError, ConfigError, SuparError
from supar_sweep.sweep.journal import mend_journal
from supar_sweep.sweep.sampling import make_sampler
from supar_sweep.sweep.trainer import CellEnd
from supar_sweep.sweep.winner import load_winner
from tests.studies import FINGERPRINT, LOG2_LR_OPT, Basin, proxy, run, study, values


def test_finds_the_basin_and_tries_the_defaults_first(tmp_path: Path) -> None:
    trainer = Basin()
    winner = run(tmp_path, trainer, study(n_trials=48))
    assert trainer.trained[0].hparams == proxy().hparams
    assert abs(math.log2(winner.hparams.lr) - LOG2_LR_OPT) < 1
    searched = [cell for cell in trainer.trained if cell.seed == 0]
    confirmed = [cell for cell in trainer.trained if cell.seed != 0]
    assert len(searched) == 48
    assert sorted(cell.seed for cell in confirmed) == [1, 1, 2, 2]


def test_not_searched_hyperparameters_stand(tmp_path: Path) -> None:
    winner = run(tmp_path, Basin())
    assert winner.hparams.alpha_in == proxy().hparams.alpha_in
    assert winner.hparams.weight_decay == proxy().hparams.weight_decay


def test_a_rerun_tops_up_to_the_total_budget(tmp_path: Path) -> None:
    run(tmp_path, Basin(), study(n_trials=8))
    again = Basin()
    run(tmp_path, again, study(n_trials=12))
    assert len([cell for cell in again.trained if cell.seed == 0]) == 12 - 8
    third = Basin()
    run(tmp_path, third, study(n_trials=12))
    assert [cell for cell in third.trained if cell.seed == 0] == []


def test_a_study_in_batches_repeats_exactly_and_top_up_equals_one_go(tmp_path: Path) -> None:
    run(tmp_path / "a", Basin())
    run(tmp_path / "b", Basin(slots=1))
    run(tmp_path / "c", Basin(), study(n_trials=8))
    run(tmp_path / "c", Basin())
    assert values(tmp_path / "a") == values(tmp_path / "b") == values(tmp_path / "c")
    assert len(set(values(tmp_path / "a"))) == 24  # the resumed study did not repeat its random start


def test_asynchronous_keeps_every_slot_busy_and_no_more(tmp_path: Path) -> None:
    peak = 0

    class Watching(Basin):
        def ends(self, timeout_s: float) -> Sequence[CellEnd]:
            nonlocal peak
            peak = max(peak, len(self._ends))
            return super().ends(timeout_s)

    run(tmp_path, Watching(slots=3), study(batch_trials=None, confirm_top_k=0, confirm_seeds=()))
    assert peak == 3


def test_diverged_is_told_as_log_vocabulary(tmp_path: Path) -> None:
    run(tmp_path, Basin(diverges_above_log2_lr=-7.0))
    told = values(tmp_path)
    assert math.log(proxy().data.n_vocab) in told
    assert None not in told


def test_failed_trials_are_not_told_and_stop_the_study(tmp_path: Path) -> None:
    with pytest.raises(SuparError, match="4 trials in a row failed; the last error: boom"):
        run(tmp_path, Basin(fails_above_log2_lr=-20.0))


def test_the_last_error_is_told_while_other_trials_are_under_way(tmp_path: Path) -> None:
    with pytest.raises(SuparError, match="3 trials in a row failed; the last error: boom"):
        run(tmp_path, Basin(fails_above_log2_lr=-20.0), study(batch_trials=None))


def test_a_record_without_the_metric_is_a_failure_that_says_so(tmp_path: Path) -> None:
    class Unmeasured(Basin):
        def ends(self, timeout_s: float) -> Sequence[CellEnd]:
            summary = {"train_loss": 1.0, "val_loss": None}
            return [replace(each, result={"summary": summary}) for each in super().ends(timeout_s)]

    with pytest.raises(SuparError, match="its record has no val_loss"):
        run(tmp_path, Unmeasured(), study(metric="val_loss"))


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "gp", "cma"])
def test_every_sampler_runs_and_resumes(tmp_path: Path, sampler: str) -> None:
    if sampler == "cma":
        pytest.importorskip("cmaes")
    run(tmp_path, Basin(), study(sampler=sampler, n_trials=6))
    run(tmp_path, Basin(), study(sampler=sampler, n_trials=10))
    assert len(set(values(tmp_path))) == 10


def test_samplers_are_reseeded_by_position() -> None:
    first, second = (make_sampler("random", 0, asked) for asked in (0, 1))
    again = make_sampler("random", 0, 1)
    draw = [sampler._rng.rng.uniform() for sampler in (first, second, again)]  # type: ignore[attr-defined]
    assert draw[0] != draw[1]
    assert draw[1] == draw[2]


@pytest.mark.parametrize(
    ("config", "base", "fingerprint"),
    [
        (study(space={"lr": {"low_log2": -12, "high_log2": -3}}), proxy(), FINGERPRINT),
        (study(metric="val_loss"), proxy(), FINGERPRINT),
        (study(), proxy(**{"train.steps": 19}), FINGERPRINT),
        (study(), proxy(), "0" * 16),
    ],
)
def test_another_space_metric_proxy_or_data_under_the_same_name_is_an_error(
    tmp_path: Path, config: StudyConfig, base: CellConfig, fingerprint: str
) -> None:
    run(tmp_path, Basin(), study(n_trials=4))
    with pytest.raises(ConfigError, match=r"study\.name: a study of this name has another"):
        run(tmp_path, Basin(), config, proxy=base, fingerprint=fingerprint)


def test_bad_studies_are_refused_before_anything_starts(tmp_path: Path) -> None:
    trainer = Basin()
    with pytest.raises(ConfigError, match=r"hparams\.lr: is tried first.*2\^-12 \.\. 2\^-2"):
        run(tmp_path, trainer, proxy=proxy(**{"hparams.lr": 0.9}))
    with pytest.raises(ConfigError, match="the proxy is dense"):
        run(tmp_path, trainer, proxy=proxy(density=0.5))
    with pytest.raises(ConfigError, match="seeds that the trials did not use"):
        run(tmp_path, trainer, study(confirm_seeds=(0, 1)))
    with pytest.raises(ConfigError, match=r"space\.init_sdt.*did you mean 'init_std'"):
        study(space={"init_sdt": {"low_log2": -2, "high_log2": 0}})
    with pytest.raises(ConfigError, match="must be below"):
        study(space={"lr": {"low_log2": -2, "high_log2": -3}})
    assert trainer.trained == []


def test_best_yaml_carries_its_lineage_and_reads_back(tmp_path: Path) -> None:
    winner = run(tmp_path, Basin())
    read = load_winner(tmp_path / "best.yaml")
    assert read.hparams == winner.hparams
    assert read.base == winner.base == proxy().base is not None
    assert read.lineage["study"] == "proxy"
    assert read.lineage["data"]["fingerprint"] == FINGERPRINT
    assert read.lineage["proxy"]["train"]["steps"] == proxy().train.steps
    assert read.lineage["version"] == "test"
    best = read.lineage["confirmed"][0]
    assert best["trial"] == read.lineage["trial"]
    assert sum(best["values"]) <= sum(read.lineage["confirmed"][1]["values"])


def test_a_bad_best_yaml_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text("hparams: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match=r"hparams\.init_std: is missing"):
        load_winner(path)
    values = yaml.safe_dump({"hparams": run(tmp_path, Basin()).hparams.__dict__})
    for more, message in (
        ("bas: {width: 64, n_layer: 2}", r"bas: unknown key in .*did you mean 'base'"),
        ("base: {width: 64}", r"base\.n_layer: is missing"),
        ("base: 64", r"base: must be a mapping"),
        ("base: {width: 64, n_layer: 2}\nlineage: {proxy: {base: {width: 32, n_layer: 2}}}", "contradicts"),
    ):
        path.write_text(f"{values}{more}\n")
        with pytest.raises(ConfigError, match=message):
            load_winner(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="no mapping"):
        load_winner(path)


def _coordinate(folder: Path) -> None:
    run(folder, Basin(slow_s=0.05))


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_coordinator_is_taken_over(tmp_path: Path, torn: bool) -> None:
    run(tmp_path / "whole", Basin())
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=_coordinate, args=(folder,))
    process.start()
    journal = folder / "journal.log"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 40:
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if torn:
        with journal.open("ab") as file:
            file.write(b'{"op_code": 5, "wor')
    run(folder, Basin())
    # the trials it had asked for are told, none is lost or asked twice, and the study is the one of an undisturbed run
    assert values(folder) == values(tmp_path / "whole")


def test_the_lock_of_a_killed_writer_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, Basin())
    before = set(tmp_path.iterdir())
    JournalFileOpenLock(str(tmp_path / "journal.log")).acquire()
    assert set(tmp_path.iterdir()) > before
    mend_journal(tmp_path / "journal.log", "proxy")
    assert set(tmp_path.iterdir()) == before


def test_two_coordinators_of_one_study(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_coordinate, args=(tmp_path,))
    process.start()
    while not (tmp_path / "journal.log").exists():
        time.sleep(0.01)
    with pytest.raises(BusyError, match="study proxy is held by another process"):
        run(tmp_path, Basin())
    process.join()
    assert process.exitcode == 0


def test_the_search_moves_on_when_a_default_lies_outside_the_best(tmp_path: Path) -> None:
    base = proxy()
    base = replace(base, hparams=replace(base.hparams, lr=2.0**-12))
    winner = run(tmp_path, Basin(), proxy=base)
    assert winner.hparams.lr > base.hparams.lr


@pytest.mark.parametrize("batch", [2, None])
def test_trials_that_share_a_cell_are_all_told_and_confirmed_once(tmp_path: Path, batch: int | None) -> None:
    # a space so narrow that all of its learning rates are one cell (a sampler at a corner of its space does the same)
    space = {"lr": {"low_log2": -8, "high_log2": -8 + 1e-14}}
    base = proxy(**{"hparams.lr": 2.0**-8})
    winner = run(tmp_path, Basin(), study(n_trials=5, batch_trials=batch, space=space), proxy=base)
    assert len(set(values(tmp_path))) == 1
    assert len(values(tmp_path)) == 5
    assert len(winner.lineage["confirmed"]) == 1
