"""What `calibrate` measures, keeps, and what `plan` makes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from supar_sweep.cli import calibrate as command
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import RecordError
from supar_sweep.sweep import calibration
from supar_sweep.sweep.calibration import newest, shape_key, store
from supar_sweep.sweep.jobs import Event
from supar_sweep.training.environment import device_name
from supar_sweep.training.run_cell import run_cell
from tests.command_line import CELL, call, here, refused
from tests.tiny import folder_of, result_of, tiny_cell, tiny_job, tiny_runtime

__all__ = ["here"]

GRID = (
    *CELL,
    *("model.width=16", "experiment.name=g", "launcher.processes=1", "runtime.threads=1", "runtime.cohort=2"),
    *("experiment.axes.density=[1,0.5]", "experiment.axes.seed=[0,1,2]"),
)
ROW = {"step_s": 0.5, "setup_s": 2.0, "eval_seq_s": 0.25}


def test_the_key_holds_what_a_step_takes_time_for_and_nothing_else() -> None:
    cell, runtime = tiny_cell(), tiny_runtime()
    same = [
        tiny_cell(seed=5, parameterization="sp", **{"hparams.lr": 1.0}),
        tiny_cell(**{"train.steps": 99, "train.eval_seqs": 3}),
    ]
    other = [
        tiny_cell(**{"model.width": 64}),
        tiny_cell(density=0.5),
        tiny_cell(**{"train.batch_seqs": 8}),
        tiny_cell(**{"train.precision": "float64"}),
    ]
    assert {shape_key(each, runtime) for each in same} == {shape_key(cell, runtime)}
    runtimes = [tiny_runtime(threads=2), tiny_runtime(cohort=3), tiny_runtime(compute="compact")]
    keys = {shape_key(each, runtime) for each in other} | {shape_key(cell, each) for each in runtimes}
    assert len(keys - {shape_key(cell, runtime)}) == len(other) + len(runtimes)


@pytest.mark.parametrize(("every", "n_evals"), [(None, 1), (4, 3), (5, 3), (100, 1)])
def test_a_run_takes_its_set_up_its_steps_and_its_evaluations(runs_dir: Path, every: int | None, n_evals: int) -> None:
    cell = tiny_cell(**{"train.steps": 12, "train.eval_every_steps": every})
    store(runs_dir, "local", "a CPU (cpu)", "cpu", {shape_key(cell, tiny_runtime()): ROW})
    known = newest(runs_dir, "local", "cpu")
    assert known is not None
    expected = ROW["setup_s"] + 12 * ROW["step_s"] + n_evals * cell.train.eval_seqs * ROW["eval_seq_s"]
    assert known.run_s(cell, tiny_runtime()) == expected
    assert known.run_s(tiny_cell(**{"model.width": 64}), tiny_runtime()) is None


def test_a_device_has_a_file_and_keeps_what_was_measured_before(runs_dir: Path) -> None:
    path = store(runs_dir, "local", "AMD EPYC (cpu)", "cpu", {"a": {**ROW, "step_s": 9.0}, "b": ROW})
    assert path.name == "local-amd-epyc-cpu.json"
    assert store(runs_dir, "local", "AMD EPYC (cpu)", "cpu", {"a": ROW}) == path
    found = newest(runs_dir, "local", "cpu")
    assert found is not None
    assert {key: row["step_s"] for key, row in found.shapes.items()} == {"a": 0.5, "b": 0.5}
    store(runs_dir, "local", "another (cpu)", "cpu", {"a": ROW})
    store(runs_dir, "slurm", "NVIDIA H200 (cuda)", "cuda", {"a": ROW})
    for launcher, kind, device, expected in (
        ("local", "cpu", None, "another (cpu)"),
        ("local", "cpu", "AMD EPYC (cpu)", "AMD EPYC (cpu)"),
        ("slurm", "cuda", None, "NVIDIA H200 (cuda)"),
    ):
        of = newest(runs_dir, launcher, kind, device)
        assert of is not None
        assert of.device == expected
    assert newest(runs_dir, "slurm", "cpu") is None
    (runs_dir / "calibration" / "other.json").write_text('{"a": 1}')
    with pytest.raises(RecordError, match=r"other.json is no calibration"):
        newest(runs_dir, "local", "cpu")


def test_a_measurement_is_a_cell_that_says_what_a_step_takes(tmp_path: Path) -> None:
    target = "supar_sweep.training.calibrate.train"
    job = tiny_job(tmp_path, runtime={"cohort": 3}, **{"train.target": target, "hparams.lr": 1e6, "train.steps": 4})
    assert run_cell(job) == "done"
    result = result_of(job)
    assert (result["together"], result["device"], result["threads"]) == (3, "cpu", 1)
    assert 1 <= result["stacked"] <= 3
    assert all(0 < result[name] < 60 for name in ("step_s", "setup_s", "eval_seq_s"))
    # at least so long, whatever the cell's own number of steps and rate
    timed = [line for line in folder_of(job).metrics() if "loss" in line]
    assert len(timed) > 4
    assert all(math.isfinite(line["loss"]) for line in timed)


def test_it_stops_when_it_is_told(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **{"train.target": "supar_sweep.training.calibrate.train"})
    assert run_cell(job, should_stop=lambda: "cancelled") == "cancelled"


def test_what_was_measured_becomes_hours_of_the_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(call(capsys, "plan", *GRID, "format=json")[1])
    assert before["calibration"] is None
    assert {row["hours_left"] for row in before["shapes"]} == {None}
    assert "`calibrate` with the same words measures them" in call(capsys, "plan", *GRID)[1]

    code, out, err = call(capsys, "calibrate", *GRID, "format=json")
    assert code == 0, err
    rows: list[dict[str, Any]] = json.loads(out)
    assert [(row["density"], row["cells"], row["together"], row["processes"]) for row in rows] == [
        (1, 3, 2, 1),
        (0.5, 3, 2, 1),
    ]
    assert {path.name for path in Path("runs").iterdir()} <= {"calibration", "logs"}  # no cell is left
    (path,) = Path("runs/calibration").iterdir()
    kept = json.loads(path.read_text())
    assert kept["device"] == f"{device_name('cpu')} (cpu)"
    assert len(kept["shapes"]) == 2

    found = json.loads(call(capsys, "plan", *GRID, "format=json")[1])
    cell = decode(CellConfig, tiny_cell_of(capsys))
    of_density = {row["density"]: row for row in kept["shapes"].values()}
    for shape in found["shapes"]:
        row = of_density[shape["density"]]
        run_s = row["setup_s"] + cell.train.steps * row["step_s"] + cell.train.eval_seqs * row["eval_seq_s"]
        assert shape["hours_left"] == pytest.approx(3 * run_s / 3600)
    hours = sum(shape["hours_left"] for shape in found["shapes"])
    assert (found["calibration"], found["device_hours_unit"], found["unmeasured"]) == (kept["device"], "core-hours", 0)
    assert found["device_hours_left"] == pytest.approx(hours)
    assert found["wall_s"] == pytest.approx(3600 * hours)  # of one process
    wider = json.loads(call(capsys, "plan", *GRID, "model.context_tokens=8", "format=json")[1])
    assert wider["calibration"] is None


def test_no_call_follows_what_another_has_in_a_queue(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def measured(launcher: object, jobs: Sequence[Mapping[str, Any]], live: object) -> dict[str, Event]:
        asked.append({job["cell_id"] for job in jobs})
        return {}

    monkeypatch.setattr(command, "_measured", measured)
    for _ in range(2):
        call(capsys, "calibrate", *GRID)
    first, second = asked
    assert len(first) == len(second) == 2
    assert first.isdisjoint(second)


def test_only_what_one_process_trains_is_timed_and_has_hours(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here))  # no SLURM
    monkeypatch.setattr(calibration, "shape_key", lambda cell, runtime: str(cell.model.width))
    store(Path("runs"), "slurm", "a CPU (cpu)", "cpu", {"16": ROW, "32": ROW})
    grid = (*CELL, "experiment.name=g", "experiment.axes.width=[16,32]", "launcher=dev_cluster")

    def planned(*words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(call(capsys, "plan", *grid, *words, "format=json")[1])
        return found

    small, large = planned()["shapes"]
    assert small["hours_left"] == large["hours_left"] > 0
    between_gb = (small["memory_gb"] + large["memory_gb"]) / 2
    found = planned(f"launcher.larger=[{{above_gb: {between_gb}, nodes: 2}}]")
    assert [row["hours_left"] for row in found["shapes"]] == [small["hours_left"], None]
    assert found["unmeasured"] == 1

    for word, key in (("larger=[{above_gb: 0, nodes: 2}]", "larger"), ("tasks_per_node=2", "tasks_per_node")):
        said = refused(capsys, "calibrate", *grid, f"launcher.{word}")
        assert f"launcher.{key}: has 2 processes train each cell together" in said


def tiny_cell_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The cell's settings as the command line composes them."""
    import yaml

    from supar_sweep.cli.settings import CELL_KEYS

    plain = yaml.safe_load(call(capsys, "plan", "--cfg", "job", "--resolve", *GRID)[1])
    return {key: value for key, value in plain.items() if key in CELL_KEYS}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("runtime.keep_checkpoints=true", "runtime.keep_checkpoints: has no effect on calibrate"),
        ("train.target=json.dumps", "train.target: has no steps that calibrate could time (got 'json.dumps')"),
    ],
)
def test_what_has_no_effect_is_refused(here: Path, capsys: pytest.CaptureFixture[str], word: str, says: str) -> None:
    assert says in refused(capsys, "calibrate", *GRID, word)


def test_a_shape_that_cannot_be_trained_is_told_and_the_others_are_kept(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # on the CPU a route that a precision does not have
    grid = (
        *GRID,
        "runtime.route=onednn",
        "experiment.zipped=[{train.precision: [float64, float32], optimizer.eps: [1e-8, 1e-9]}]",
    )
    code, out, err = call(capsys, "calibrate", *grid, "format=json")
    assert code == 1
    assert {row["precision"] for row in json.loads(out)} == {"float32"}
    assert "failed: runtime.route: has no effect with train.precision=float64" in err
