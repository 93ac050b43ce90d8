"""What tests/guard/golden.json holds: what every command said of the old runs folder when it was made.

    .venv/bin/python -m tests.guard.golden FOLDER        writes it anew, working in FOLDER

Written once, by the code that made the folder; not again to make a red test green.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from supar_sweep.cli.main import main as supar_sweep
from tests.guard.make_runs import ARCHIVE, CHECK, EXTENDED, FINISHED, HALF, MAIN, OWN, TEXT

GOLDEN = Path(__file__).resolve().parent / "golden.json"
MORE_SEEDS = "experiment.axes.seed=[0,1,2]"
STATUS = {f"status {name}": ("status", f"experiment.name={name}") for name in ("main", "own", "extended", "queued")}
PLANS = {
    "plan main": ("plan", *MAIN),
    "plan own": ("plan", *OWN),
    "plan extended": ("plan", *EXTENDED),
    "plan extended, a third seed": ("plan", *EXTENDED, MORE_SEEDS),
}
PLOTS = {
    "plot main": ("plot", "experiment.name=main"),
    "plot own": ("plot", "experiment.name=own"),
    "plot extended": ("plot", "experiment.name=extended"),
    "plot study": ("plot", "figure=study", "study.name=finished"),
    "plot check": ("plot", "figure=coord_check", "check.name=small"),
}
OTHERS = {
    "transfer": ("transfer", "hparams=runs/studies/finished/best.yaml", "target.width=64", "target.density=0.25"),
    "tune finished": ("tune", *FINISHED),
    "check again": ("coord-check", *CHECK),
}
VIEWS: Mapping[str, Sequence[str]] = {**STATUS, **PLANS, **PLOTS, **OTHERS}
FILES = {
    "main": ("lr_basins.csv", "verdict.json", "summary.json"),
    "own": ("lr_basins.csv", "verdict.json", "summary.json"),
}
READ_OF_PLAN = ("points", "cells", "extended", "states", "to_start")
ROUNDING = 1e-9


def unpacked(folder: Path) -> Path:
    """Return the folder with the old runs and their text in it."""
    shutil.unpack_archive(ARCHIVE, folder, filter="data")
    shutil.copy(TEXT, folder)
    return folder


def said(folder: Path, *words: str) -> tuple[int, str, str]:
    """Return what a command typed in the folder leaves: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        code = supar_sweep(words)
    return code, out.getvalue(), err.getvalue()


def view(folder: Path, name: str) -> Any:
    """Return what the command of this name prints, as JSON."""
    code, out, err = said(folder, *VIEWS[name], "format=json")
    assert code == 0, err
    found = json.loads(out)
    return {key: found[key] for key in READ_OF_PLAN} if name in PLANS else found


def under_way(folder: Path) -> Path:
    """Return the folder of the main grid's cell that has a checkpoint and no result."""
    plan = json.loads((folder / "runs/experiments/main/plan.json").read_text())
    (found,) = {
        path.parent.parent
        for path in (folder / "runs").glob("cells/*/*/checkpoints/step-*.pt")
        if not (path.parent.parent / "result.json").exists()
        and path.parent.parent.name.rpartition("-")[2] in plan["cells"]
    }
    return found


def metrics(attempt: Path) -> list[str]:
    """Return an attempt's whole lines."""
    return (attempt / "metrics.jsonl").read_text().splitlines()


def trials(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return a study's trials from its journal, read by Optuna itself: number, state, numbers, value."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "runs/studies" / name / "journal.log")))
    study = optuna.load_study(study_name=name, storage=storage)
    return [
        {"number": each.number, "state": each.state.name, "params": each.params, "value": each.value}
        for each in study.get_trials()
    ]


def differences(was: Any, now: Any, where: str = "", rel: float = ROUNDING) -> list[str]:
    """Return where a command says something else than it did. What it says besides is none of the guard's business."""
    if isinstance(was, dict) and isinstance(now, dict):
        lost = [f"{where}.{key}: is gone" for key in was.keys() - now.keys()]
        return lost + [
            line for key in was.keys() & now.keys() for line in differences(was[key], now[key], f"{where}.{key}", rel)
        ]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return [
            line
            for i, pair in enumerate(zip(was, now, strict=True))
            for line in differences(*pair, f"{where}[{i}]", rel)
        ]
    if isinstance(was, float) and isinstance(now, int | float) and math.isclose(was, now, rel_tol=rel, abs_tol=1e-9):
        return []
    return [] if was == now else [f"{where}: was {was!r}, is {now!r}"]


def table(path: Path) -> Any:
    """Return a file of numbers: JSON as it is, CSV as rows of numbers and words."""
    if path.suffix == ".json":
        return json.loads(path.read_text())

    def number(word: str) -> Any:
        try:
            return float(word)
        except ValueError:
            return word

    return [[number(word) for word in line.split(",")] for line in path.read_text().splitlines()]


def main() -> None:
    """Write the golden file."""
    folder = Path(sys.argv[1]).resolve()
    old, again = unpacked(folder / "old"), folder / "again"
    again.mkdir()
    shutil.copy(TEXT, again)
    os.environ["PATH"] = str(folder / "empty")
    golden: dict[str, Any] = {"views": {name: view(old, name) for name in VIEWS}}
    golden["files"] = {
        f"{name}/{file}": table(old / "runs/experiments" / name / file)
        for name, files in FILES.items()
        for file in files
    }
    cell = under_way(old)
    golden["under_way"] = {"cell": cell.name, "lines": metrics(cell / "attempts/0001")}
    golden["logs"] = json.loads(said(old, "logs", cell.name, "format=json")[1])
    golden["half"] = {"before": trials(old, "half")}
    for words in (("run", *MAIN), ("tune", *HALF)):
        code, out, err = said(again, *words, "format=json")
        assert code in (0, 1), err
        golden["uninterrupted " + words[0]] = json.loads(out)
    whole = again / cell.relative_to(old)
    golden["under_way"]["summary"] = json.loads((whole / "result.json").read_text())["summary"]
    golden["half"]["after"] = trials(again, "half")
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
