"""The command line: words, help, errors in one line, completion, tables. Mostly in process."""

from __future__ import annotations

import gc
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from supar_sweep.cli.launch import trains_on_gpu
from supar_sweep.cli.main import COLLECT_EVERY, COMMANDS, main, usage
from supar_sweep.cli.progress import Live, duration
from supar_sweep.cli.rules import markdown
from supar_sweep.cli.settings import Settings
from supar_sweep.errors import SuparError
from supar_sweep.rules.parameterization import ROLES, SITES, TABLE
from tests.tiny import tiny_plain

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "supar_sweep"]

# a grid of seconds
SMALL = (
    *("model.width=32", "model.d_head=8", "model.context_tokens=16", "base.width=16"),
    *("train.steps=3", "train.batch_seqs=2", "train.eval_seqs=2", "experiment.name=small"),
)
AXES = ("experiment.axes.density=[1,0.5]", "experiment.axes.lr={log2: [-8, -7]}")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = call(capsys, *words, "format=json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    assert out == usage()
    for word, command in COMMANDS.items():
        assert word in out
        assert command.does in out


def test_help_of_a_command_shows_its_groups_and_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = call(capsys, "run", "--help")
    assert code == 0
    assert COMMANDS["run"].does in out
    assert "hparams: cpu, default, paper" in out
    assert "width: 256" in out


def test_cfg_prints_the_composed_settings(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "run", "--cfg", "job", "hparams=paper", "model.width=128")
    assert code == 0
    config = yaml.safe_load(out)
    assert config["model"]["width"] == 128
    assert config["base"]["width"] == 256


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["runn"], "no command 'runn'; did you mean 'run'?"),
        (["run", "-m"], "axes"),
        (["run", "model.widht=3"], "did you mean 'model.width'?"),
        (["run", "width=64"], "did you mean 'model.width'?"),
        (["run", "modle=paper"], "did you mean 'model'?"),
        (["run", "+modle=paper"], "did you mean 'model'?"),
        (["run", "model=papr"], "did you mean 'paper'?; allowed: gpt, paper"),
        (["run", "experiment=nope"], "experiment: has no such option (got 'nope')"),
        (["run", "data=text"], "data.paths: must be set"),
        (["run", "model.width=1,2"], "experiment.axes.model.width=[...]"),
        (["run", "model.width=["], "cannot read 'model.width=['"),
        (["plan", "model.width=wide"], "model.width: must be an integer (got 'wide')"),
        (["plan", "model.width=100"], "model.width: must be a multiple of d_head = 32"),
        (["plan", "density=0"], "density: out of range (got 0.0); allowed: > 0 and <= 1"),
        (["plan", "density=1.5"], "density: out of range (got 1.5); allowed: > 0 and <= 1"),
        (["plan", "density=nan"], "density: must be a number"),
        (["plan", "experiment.axes.widht=[1]"], "did you mean 'width'?"),
        (["plan", "experiment.nme=x"], "did you mean 'experiment.name'?"),
        (["plan", "runtime.threads=0"], "runtime.threads: out of range"),
        (["run", "launcher.processes=0"], "launcher.processes: out of range"),
        (["run", "+launcher.queue=a"], "launcher.queue: unknown key"),
        (["plan", "format=xml"], "format: no such format of plan (got 'xml')"),
        (["plan", "format=yaml"], "allowed: table, json, csv"),
        (["run", "hparams=no/such.yaml"], "cannot read no/such.yaml"),
        (["transfer", "target.width=100"], "target.width: must be a multiple"),
        (["transfer", "target.density=2"], "target.density: out of range"),
        (["rules", "show=all"], "show: unknown choice"),
        (["run", "-cd", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("supar-sweep: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing began


def test_invalid_cells_are_all_reported(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("experiment.axes.width=[64,100]", "experiment.axes.density=[0.5,0]")
    code, _, err = call(capsys, "run", *words)
    assert code == 2
    assert "3 of 4 cells are invalid; nothing was started" in err
    assert "model.width: must be a multiple" in err
    assert "density: out of range" in err


def test_the_rule_table_is_printed_in_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json_of(capsys, "rules")
    assert [(row["quantity"], row["where"], row["supar"]) for row in rows] == [
        (rule.quantity, rule.where, rule.supar) for rule in TABLE
    ]
    code, out, _ = call(capsys, "rules", "format=markdown")
    assert code == 0
    assert out == markdown()
    shown = [line.split(" | ")[1] for line in out.splitlines()[2:]]
    assert sum(len(roles.split(", ")) for roles in shown) == len(TABLE)  # grouped, none left out


def test_rules_with_a_model_show_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    cell = ("model.width=64", "model.d_head=16", "model.n_layer=1", "density=0.25", "base.width=16")
    rows = json_of(capsys, "rules", *cell)
    hidden = [row for row in rows if row["role"] == "hidden"]
    assert hidden
    for row in hidden:
        assert row["density"] == 0.25
        # lr / (m_d m_rho), init_std / sqrt(m_d m_rho), with m_d = 64/16
        assert row["lr"] == pytest.approx(2**-7 / (4 * 0.25))
        assert row["init_std"] == pytest.approx(0.08 / (4 * 0.25) ** 0.5)
        assert row["measured_std"] == pytest.approx(row["init_std"], rel=0.1)
    assert {row["role"] for row in rows} <= set(ROLES)
    assert json_of(capsys, "rules", *cell, "show=table")[0]["quantity"] == "init_var"


@pytest.mark.parametrize(("width", "density"), [(256, 1), (4096, 1), (4096, 1 / 64), (2048, 1), (2048, 1 / 128)])
def test_transfer_of_the_paper_hparams(capsys: pytest.CaptureFixture[str], width: int, density: float) -> None:
    words = ("hparams=paper", f"target.width={width}", f"target.density={density}", "depth=none")
    found = json_of(capsys, "transfer", *words)
    assert set(found) == {"base", "target", "roles", "multipliers"}
    assert set(found["target"]) == {"width", "density", "n_layer", "m_d", "m_rho", "m_L"}
    assert set(found["roles"]) == set(ROLES)
    assert set(found["multipliers"]) == set(SITES)
    m = width / 256 * density
    for role in ("hidden", "hidden_residual"):
        assert set(found["roles"][role]) == {"init_std", "lr", "weight_decay", "eps"}
        assert found["roles"][role]["lr"] == pytest.approx(1.62e-2 / m, rel=1e-15)
        assert found["roles"][role]["init_std"] == pytest.approx(0.08665602 / m**0.5, rel=1e-15)
    assert found["multipliers"]["logits"] == pytest.approx(1.0951835 / (width / 256), rel=1e-15)
    code, out, _ = call(capsys, "transfer", *words, "format=yaml")
    assert code == 0
    assert yaml.safe_load(out) == found


def test_transfer_lists_layers_where_densities_differ(capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "transfer", "layer_density=er", "target.density=0.25")
    lr, target = found["base"]["lr"], found["target"]
    densities = {layer["density"] for layer in found["layers"].values()}
    assert len(densities) > 1
    for layer in found["layers"].values():
        assert layer["lr"] == pytest.approx(lr / (target["m_d"] * layer["density"]))


@pytest.mark.parametrize("layer_density", ["uniform", "er"])
@pytest.mark.parametrize(
    "more", [(), ("depth=completep", "depth_alpha=0.5", "parameterization=sp"), ("optimizer=sgd",)]
)
def test_transfer_says_what_the_model_is_trained_with(
    capsys: pytest.CaptureFixture[str], layer_density: str, more: tuple[str, ...]
) -> None:
    shape = (*SMALL[:4], "model.n_layer=3", "model.activation=swiglu", "model.tied_head=false", *more)
    words = (*shape, "density=0.125", f"layer_density={layer_density}", "hparams.weight_decay=0.1")
    found = json_of(capsys, "transfer", *words)
    seen = set()
    for row in json_of(capsys, "rules", *words, "show=parameters"):
        layer = found.get("layers", {}).get(row["name"].removesuffix(".weight"))
        wanted = layer or found["roles"][row["role"]]
        if row["name"].startswith("norm."):
            continue  # the final norm is in no block: its role's row is that of the blocks' norms
        seen.add(row["role"])
        assert (layer is not None) == (layer_density == "er" and row["role"].startswith("hidden"))
        assert layer is None or (layer["role"], layer["density"]) == (row["role"], row["density"])
        assert {name: row[name] for name in ("init_std", "lr", "weight_decay", "eps")} == {
            name: wanted[name] for name in ("init_std", "lr", "weight_decay", "eps")
        }
    assert seen == set(ROLES)


def test_transfer_tables_carry_formula_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = call(capsys, "transfer", "hparams=paper")
    assert "m_d^-1 m_rho^-1" in out
    assert "SuPar table 1, hidden LR" in out
    assert "hold fixed" in err
    assert "live weights a neuron" not in err
    _, _, err = call(capsys, "transfer", "target.width=128", "target.density=0.0625")
    assert "8 live weights a neuron" in err  # 128 / 16


def test_transfer_warns_where_proxy_and_target_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    proxy = tiny_plain()
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump({"hparams": proxy["hparams"], "lineage": {"proxy": proxy}}))
    _, out, err = call(capsys, "transfer", f"hparams={path}", "format=json")
    found = json.loads(out)  # what is said besides does not disturb it
    assert found["base"]["width"] == proxy["base"]["width"]
    before = proxy["train"]["steps"] * proxy["train"]["batch_seqs"] * 16
    assert f"tokens: {before} at the proxy, {100 * 8 * 64} at the target" in err
    for name in ("batch_tokens", "warmup_share", "d_head", "context_tokens"):
        assert f"warning: {name}: " in err
    assert "position" not in err  # the same at both
    assert "is no base" not in err
    path.write_text(
        yaml.safe_dump({"hparams": proxy["hparams"], "lineage": {"proxy": {**proxy, "parameterization": "sp"}}})
    )
    assert "tuned with sp, which is no base for supar" in call(capsys, "transfer", f"hparams={path}")[2]


def test_transfer_warns_where_the_papers_proxy_and_target_differ(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, _, err = call(capsys, "transfer", "hparams=paper")
    assert f"tokens: 800000000 at the proxy, {100 * 8 * 64} at the target" in err
    assert "not known of the proxy: schedule" in err
    length = ("train.steps=1526", "train.batch_seqs=256")  # 800.06M tokens
    _, _, err = call(capsys, "transfer", "hparams=paper", "model=paper", *length)
    assert "at the proxy" not in err
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"hparams": tiny_plain()["hparams"]}))
    _, _, err = call(capsys, "transfer", f"hparams={path}")
    assert "says nothing of its proxy" in err
    assert "names no base, so its numbers are taken to be in units of {'width': 64, 'n_layer': 2}" in err
    path.write_text(yaml.safe_dump({"hparams": tiny_plain()["hparams"], "tuned_at": {"token": 5}}))
    code, _, err = call(capsys, "transfer", f"hparams={path}")
    assert code == 2
    assert "tuned_at.token: unknown key; did you mean 'tokens'" in err


def test_the_shells_completion_answers(capfd: pytest.CaptureFixture[str]) -> None:
    for line, expected in (
        ("supar-sweep ", "quickstart"),
        ("supar-sweep st", "status"),
        ("supar-sweep run model=", "model=paper"),
        ("supar-sweep transfer target.", "target.width="),
    ):
        os.environ["COMP_LINE"] = line
        assert main(["-sc", "query=bash"]) == 0
        assert expected in capfd.readouterr().out.split(), line
    del os.environ["COMP_LINE"]
    assert main(["-sc", "install=bash"]) == 0
    assert "complete -o nospace -o default -F hydra_bash_completion" in capfd.readouterr().out


def test_a_users_own_folder_of_groups(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mine = "defaults: [gpt, _self_]\nwidth: 96\n"
    (tmp_path / "model" / "mine.yaml").write_text(mine)
    words = ("run", "-cd", str(tmp_path), "model=mine", "--cfg", "job", "--package", "model")
    code, out, _ = call(capsys, *words)
    assert code == 0
    assert yaml.safe_load(out)["width"] == 96


def test_a_grid_from_plan_to_status(
    capsys: pytest.CaptureFixture[str], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_dir.parent.mkdir(exist_ok=True)
    monkeypatch.chdir(runs_dir.parent)
    grid = (*SMALL, *AXES, f"runs_dir={runs_dir}")
    planned = json_of(capsys, "plan", *grid)
    assert (planned["points"], planned["cells"]) == (4, 4)
    assert planned["states"] == {"missing": 4}
    assert planned["flops_left"] == planned["flops"] > 0
    assert not runs_dir.exists()  # plan writes nothing

    first = json_of(capsys, "run", *grid)
    assert (first["done"], first["skipped"], first["complete"]) == (4, 0, True)
    again = json_of(capsys, "run", *grid)
    assert (again["done"], again["skipped"]) == (4, 4)
    assert json_of(capsys, "plan", *grid)["flops_left"] == 0

    here = ("experiment.name=small", f"runs_dir={runs_dir}")
    found = json_of(capsys, "status", *here)
    assert found["total"]["done"] == found["total"]["n"] == 4
    assert [(row["density"], row["lr"]) for row in found["groups"]] == [
        (density, lr) for density in (1, 0.5) for lr in (2**-8, 2**-7)
    ]
    assert len(json_of(capsys, "status", *here, "by=[density]")["groups"]) == 2
    code, out, err = call(capsys, "status", *here, "model.width=64")
    assert code == 0
    assert "4 cells: 4 done" in out
    assert "no effect here: model.width" in err
    code, _, err = call(capsys, "status", *here, "by=dnsity")
    assert code == 2
    assert "did you mean 'density'?" in err
    code, _, err = call(capsys, "status", f"runs_dir={runs_dir}", "experiment.name=smal")
    assert code == 2
    assert "did you mean 'small'?" in err
    # no folders of Hydra's beside the records
    assert [path.name for path in runs_dir.parent.iterdir()] == [runs_dir.name]

    code, out, err = call(capsys, "plot", *here, "format=json")
    assert code == 0, err
    assert {row["density"] for row in json.loads(out)} == {1.0, 0.5}
    folder = runs_dir / "experiments" / "small"
    assert (folder / "lr_basins.png").read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads((folder / "verdict.json").read_text())) == 2

    code, _, err = call(capsys, "cancel", *here)
    assert code == 2
    assert "is not running" in err


def test_failed_cells_exit_1_with_the_error_on_stderr(capsys: pytest.CaptureFixture[str], runs_dir: Path) -> None:
    # a function that its module does not have: only the worker imports it
    words = (*SMALL, f"runs_dir={runs_dir}", "train.target=json.no_such_function")
    code, out, err = call(capsys, "run", *words, "format=json")
    assert code == 1
    assert json.loads(out)["complete"] is False
    assert "no_such_function" in err


def test_cancel_stops_a_run_cleanly(capsys: pytest.CaptureFixture[str], runs_dir: Path) -> None:
    grid = (*SMALL, f"runs_dir={runs_dir}", "experiment.axes.seed=[0,1]")
    child = subprocess.Popen(
        [*COMMAND, "run", *grid, "train.steps=100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    here = (f"runs_dir={runs_dir}", "experiment.name=small")
    deadline_s = time.monotonic() + 120
    while True:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline_s
        if list(runs_dir.glob("cells/*/*/attempts/*/metrics.jsonl")):
            break
        time.sleep(0.1)
    assert call(capsys, "cancel", *here)[0] == 0
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    total = json_of(capsys, "status", *here)["total"]
    assert total["running"] == total["pending"] == 0
    assert total["cancelled"] >= 1


def test_the_process_exits_with_the_code_and_a_closed_pipe_is_no_error() -> None:
    wrong = subprocess.run([*COMMAND, "runn"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    cut = subprocess.run(
        f"{shlex.join(COMMAND)} rules | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert cut.stderr == ""
    assert cut.stdout.splitlines()[-1] == "0"


def test_progress_off_a_terminal_is_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Live("grid") as progress:
        for done in range(101):
            progress.update({"n": 100, "done": done, "pending": 100 - done}, eta_s=100.0 - done)
        progress.message("a line that stays")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("grid: 0/100")
    assert "1 min 40 s left" in lines[0]
    assert "a line that stays" in lines
    assert lines[-1].startswith("grid: 100/100")
    assert len(lines) < 10


def test_garbage_is_collected_seldom_while_a_grid_is_read_and_as_before_afterwards(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def fails(settings: Settings) -> int:
        seen.append(gc.get_threshold()[0])
        raise SuparError("as it may")

    monkeypatch.setattr("supar_sweep.cli.status.status", fails)
    before = gc.get_threshold()
    assert main(["status", f"runs_dir={runs_dir}"]) == 2
    assert seen == [COLLECT_EVERY]
    assert gc.get_threshold() == before


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_machine_with_a_driver_trains_on_its_gpu(tmp_path: Path) -> None:
    driver = tmp_path / "nvidiactl"
    assert not trains_on_gpu("auto", driver)
    driver.touch()
    assert trains_on_gpu("auto", driver)
    assert trains_on_gpu("cuda", tmp_path / "missing")
    assert not trains_on_gpu("cpu", driver)
