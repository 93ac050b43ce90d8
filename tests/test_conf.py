"""conf/: every root and every option composes, resolves and decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from supar_sweep.cli.compose import compose
from supar_sweep.cli.launch import LAUNCHERS
from supar_sweep.cli.main import COMMANDS
from supar_sweep.cli.rooms import conf_dir
from supar_sweep.cli.settings import CELL_KEYS, SECTIONS, Settings

CONF = conf_dir()
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "local"))
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in (CONF / group).glob("*.yaml")]
# the command that reads a group or an option; default: run
ROOT_OF = {"study": "tune", "size": "quickstart", "experiment=fig5": "coord-check"}

# what an option leaves to the user
SCALED = [option for option in OPTIONS if "-${scale}" in (CONF / f"{option.replace('=', '/')}.yaml").read_text()]
MANDATORY = {
    **{option: ["scale=cpu"] for option in SCALED},
    "scale=paper": ["data.train_path=train.bin", "data.val_path=val.bin"],
    "data=text": ["data.paths=[corpus.txt]"],
    "data=tokens": ["data.train_path=train.bin", "data.val_path=val.bin"],
    "data=hf": ["data.dataset=somebody/text"],
    # masks change where there are dead weights
    **{f"sparsity={method}": ["density=0.5"] for method in ("set", "rigl", "gmp")},
}


def settings(command: str, *overrides: str) -> Settings:
    return Settings.read(command, compose(command, overrides), overrides)


def test_every_command_has_a_root_and_every_root_a_command() -> None:
    roots = {path.stem for path in CONF.glob("*.yaml") if not path.stem.startswith("_")}
    assert roots == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_root_decodes(command: str) -> None:
    found = settings(command)
    if "model" in found.plain:  # export reads its cell from the checkpoint's folder
        found.cell()
    assert set(found.plain) <= {*CELL_KEYS, *SECTIONS}
    if "runtime" in found.plain:
        found.runtime()
    if "experiment" in found.plain:
        assert found.points()
    if "study" in found.plain:
        assert found.study().space


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_decodes(option: str) -> None:
    group = option.partition("=")[0]
    command = ROOT_OF.get(option) or ROOT_OF.get(group, "run")
    found = settings(command, option, *MANDATORY.get(option, []))
    found.cell()
    if "experiment" in found.plain and command != "coord-check":
        assert found.points()
    if group == "launcher":
        assert found.plain["launcher"]["name"] in LAUNCHERS
    if group == "runtime":
        found.runtime()


def test_an_experiment_wins_over_defaults_and_the_command_line_over_both() -> None:
    assert settings("run", "experiment=quickstart").experiment == "quickstart"
    found = settings("run", "experiment=quickstart", "model.width=128", "train.steps=50")
    assert {point.cell.model.width for point in found.points()} == {128}
    assert {point.cell.train.steps for point in found.points()} == {50}


@pytest.mark.parametrize("steps", [1, 9, 10, 1169, 11752])
def test_warm_up_and_summary_follow_the_number_of_steps(steps: int) -> None:
    cell = settings("run", f"train.steps={steps}").cell()
    assert cell.schedule.warmup_steps == steps // 10
    assert cell.train.summary_last_steps == max(1, steps // 10)


def test_the_paper_hparams_come_with_the_paper_base() -> None:
    cell = settings("transfer", "hparams=paper").cell()
    assert cell.base is not None
    assert (cell.base.width, cell.base.n_layer) == (256, 24)
    found = cell.hparams
    assert (found.lr, found.init_std) == (1.62e-2, 0.08665602)
    assert (found.alpha_in, found.alpha_out) == (9.1705, 1.0951835)


def test_the_proxy_is_the_dense_base() -> None:
    for hparams in ("default", "paper"):
        cell = settings("tune", f"hparams={hparams}", "model.d_head=32").cell()
        assert cell.density == 1
        assert cell.base is not None
        assert (cell.model.width, cell.model.n_layer) == (cell.base.width, cell.base.n_layer)
        ratios = cell.ratios()
        assert ratios.m_d == ratios.m_rho == ratios.m_L == 1


def test_the_proxys_defaults_lie_in_the_study_space_and_its_seed_is_not_a_confirming_one() -> None:
    found = settings("tune")
    study, cell = found.study(), found.cell()
    for name, interval in study.intervals().items():
        value = getattr(cell.hparams, name)
        assert 2**interval.low_log2 <= value <= 2**interval.high_log2
    assert cell.seed not in study.confirm_seeds


def best_yaml(path: Path, **lineage: Any) -> Path:
    values = {"lr": 0.03, "init_std": 0.07, "alpha_in": 2.0, "alpha_out": 3.0, "weight_decay": 0.0}
    path.write_text(yaml.safe_dump({"hparams": values, "lineage": lineage}))
    return path


def test_a_file_of_hparams_brings_its_base_and_typed_values_win(tmp_path: Path) -> None:
    from supar_sweep.config.decode import encode

    proxy = {**encode(settings("tune").cell()), "base": {"width": 32, "n_layer": 2}}
    path = best_yaml(tmp_path / "best.yaml", proxy=proxy)
    found = settings("run", f"hparams_file={path}", "hparams.lr=0.5")
    assert found.cell().hparams.lr == 0.5
    assert found.cell().hparams.alpha_out == 3.0
    assert encode(found.cell().base) == {"width": 32, "n_layer": 2}
    (copied := tmp_path / "copied.yaml").write_text((CONF / "hparams" / "paper.yaml").read_text())
    paper = settings("transfer", f"hparams_file={copied}").cell()
    assert paper == settings("transfer", "hparams=paper").cell()
    assert encode(paper.base) == {"width": 256, "n_layer": 24}
    typed = settings("run", f"hparams_file={path}", "base.width=128")
    assert encode(typed.cell().base) == {"width": 128, "n_layer": 2}
