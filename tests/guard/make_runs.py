"""The recipe of tests/guard/runs.tar.gz: a runs folder as the first version left it, with something in it of every kind.

    .venv/bin/python -m tests.guard.make_runs FOLDER
    .venv/bin/python -m tests.guard.make_runs FOLDER --queued     # on a machine with SLURM's packages

It was run once. Do not run it again to make a red test green: what it packed is what users have on their disks. The text is
the Apache License; every model is 16 wide. The tests type the same words again on a copy of the folder.

    experiments/main       two rules x two densities x five learning rates x two seeds. The largest rate diverges. The whole
                           process group was killed (SIGKILL) in the middle of the last cell: a checkpoint, no result.
    experiments/own        trained by tests/guard/own.py (train.target): a formula
    experiments/extended   its best learning rate lay beyond the grid, and extend=true added some
    experiments/queued     submitted to a drained SLURM: an array whose elements are still pending
    studies/finished       a study with its best.yaml
    studies/half           a study whose coordinator was killed (SIGKILL) after some of its trials
    coord_checks/small     a coordinate check
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.clusters import cluster
from tests.guard.own import TARGET

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEXT, ARCHIVE = HERE / "text.txt", HERE / "runs.tar.gz"

BASE = (
    *("data=text", "data.paths=[text.txt]", "model.d_head=8", "model.context_tokens=16", "model.tied_head=true"),
    *("base.width=8", "base.n_layer=1"),
)
SHAPE = (*BASE, "model.width=16", "model.n_layer=1")
TRAIN = ("train.steps=24", "train.batch_seqs=4", "train.eval_seqs=4", "train.eval_every_steps=8")
RUNTIME = (
    *("runtime.device=cpu", "runtime.threads=1", "runtime.route=torch", "runtime.compute=dense"),
    *("runtime.cohort=1", "runtime.checkpoint_every_s=null", "runtime.checkpoint_every_steps=8"),
)
LOCAL = (*SHAPE, *TRAIN, *RUNTIME, "launcher.processes=1")
PROXY = (*BASE, *TRAIN, *RUNTIME, "launcher.processes=1")
MAIN = (
    *(*LOCAL, "experiment.name=main", "experiment.axes.parameterization=[mup,supar]"),
    *("experiment.axes.density=[1,0.25]", "experiment.axes.lr=[64,0.0625,0.015625,0.0009765625,0.00390625]"),
    "experiment.axes.seed=[0,1]",
)
OWN = (
    *(*SHAPE, "train.steps=4", *RUNTIME, "launcher.processes=1", f"train.target={TARGET}", "experiment.name=own"),
    *(
        "experiment.axes.density=[1,0.25]",
        "experiment.axes.lr={log2: [-10, -4], step: 1}",
        "experiment.axes.seed=[0,1]",
    ),
)
EXTENDED = (
    *(*LOCAL, "experiment.name=extended", "experiment.axes.density=[1]", "experiment.axes.seed=[0,1]"),
    "experiment.axes.lr={log2: [-12, -9], step: 1}",
)
EXTEND = ("extend=true", "budget.max_flops_mult=null", "budget.max_cells=4")
QUEUED = (
    *(*SHAPE, *TRAIN, *RUNTIME, "experiment.name=queued", "experiment.axes.density=[1,0.5]"),
    *("experiment.axes.seed=[5,6]", "launcher=dev_cluster", "launcher.wait=false"),
)
STUDY = (
    *(*PROXY, "study.batch_trials=2", "study.confirm_top_k=1", "study.confirm_seeds=[1]"),
    "study.space={lr: {low_log2: -10, high_log2: -4}, init_std: {low_log2: -6, high_log2: -1}}",
)
FINISHED = (*STUDY, "study.name=finished", "study.n_trials=4")
HALF = (*STUDY, "study.name=half", "study.n_trials=6", "study.seed=1")
CHECK = (
    *(
        *SHAPE,
        "data.val_fraction=0.2",
        "train.steps=3",
        "train.batch_seqs=2",
        "runtime.device=cpu",
        "runtime.threads=1",
    ),
    *("check.name=small", "check.parameterizations=[supar]", "check.densities=[1,0.5]", "check.widths=[]"),
    "check.seeds=[0,1]",
)


def supar(folder: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command in the folder, in a process group of its own."""
    command = [sys.executable, "-m", "supar_sweep", *words]
    told = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, cwd=folder, env=told, start_new_session=True)


def call(folder: Path, *words: str, **environment: str) -> None:
    """Run a command to its end."""
    assert supar(folder, *words, **environment).wait() == 0, words


def killed_when(ready: Callable[[], bool], folder: Path, *words: str) -> bool:
    """Run a command, and kill it with its workers as soon as something holds; return whether it was in time."""
    process = supar(folder, *words)
    while process.poll() is None:
        if ready():
            os.killpg(process.pid, signal.SIGSTOP)
            in_time = ready()
            for session in Path("/proc").glob("[0-9]*/stat"):  # the workers have groups of their own
                if session.exists() and f"{process.pid}" in session.read_text().rpartition(")")[2].split()[1:4]:
                    os.kill(int(session.parent.name), signal.SIGKILL)
            process.wait()
            return in_time
        time.sleep(0.0005)
    return False


def under_way(runs: Path) -> bool:
    """Return whether a cell has a checkpoint and no result."""
    checkpoints = runs.glob("cells/*/*/checkpoints/step-*.pt")
    return any(not (path.parent.parent / "result.json").exists() for path in checkpoints)


def results(runs: Path) -> list[Path]:
    """Return the published results."""
    return list(runs.glob("cells/*/*/result.json"))


def make_main(folder: Path) -> None:
    """Train the main grid but for its last cell, which is killed after its checkpoint of step 8 or 16."""
    n_cells = 30
    while True:
        shutil.rmtree(folder / "runs", ignore_errors=True)

        def ready() -> bool:
            return len(results(folder / "runs")) == n_cells - 1 and under_way(folder / "runs")

        if killed_when(ready, folder, "run", *MAIN) and len(results(folder / "runs")) == n_cells - 1:
            return


def make_half(folder: Path) -> None:
    """Search until three of six trials have been trained, and kill the coordinator with its worker."""
    journal = folder / "runs" / "studies" / "half" / "journal.log"
    before = len(results(folder / "runs"))
    assert killed_when(lambda: journal.exists() and len(results(folder / "runs")) >= before + 3, folder, "tune", *HALF)


def make_queued(folder: Path) -> None:
    """Submit to a cluster that starts nothing, and look away."""
    with cluster(nodes=1, cpus=2, mem_mb=2000, accounting=False) as slurm:
        slurm.ask("scontrol", "update", "nodename=n1", "state=drain", "reason=guard")
        call(folder, "run", *QUEUED, **slurm.environment)
        states = slurm.ask("squeue", "-h", "-r", "-o", "%T").split()
        assert states == ["PENDING"] * 4, states
        slurm.ask("scancel", "--user", str(os.getuid()))
    shutil.rmtree(folder / "runs" / "code")  # a copy of the package: a megabyte that no test reads


def forget_machine(folder: Path) -> None:
    """Put other names in the place of this machine's, in every file of text."""
    names = {str(folder): "/old", str(ROOT): "/checkout", sys.prefix: "/venv", sys.base_prefix: "/python"}
    names[socket.gethostname()] = "machine"
    for path in filter(Path.is_file, (folder / "runs").rglob("*")):
        if path.suffix in (".png", ".pdf"):
            path.unlink()  # drawn again from what lies beside them
            continue
        content = path.read_bytes()
        if path.suffix == ".pt":
            assert not any(name.encode() in content for name in (str(folder), str(ROOT)))
            continue
        text = content.decode()
        for name, other in names.items():
            text = text.replace(f'"{name}"', f'"{other}"') if "/" not in name else text.replace(name, other)
        path.write_text(text)


def pack(folder: Path) -> None:
    """Pack the folder."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(ARCHIVE, "w:gz") as archive:
        for path in sorted((folder / "runs").rglob("*")):
            archive.add(path, str(path.relative_to(folder)), recursive=False, filter=plain)


def make(folder: Path) -> None:
    """Make all that needs no cluster, in the order in which it is listed above."""
    folder.mkdir()
    shutil.copy(TEXT, folder)
    make_main(folder)
    call(folder, "run", *OWN)
    call(folder, "run", *EXTENDED, *EXTEND)
    added = json.loads((folder / "runs/experiments/extended/plan.json").read_text())["extended"]
    assert added, "nothing was added: choose another grid"
    call(folder, "tune", *FINISHED)
    make_half(folder)
    call(folder, "coord-check", *CHECK)


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to work; must not exist")
    parser.add_argument(
        "--queued", action="store_true", help="only what needs a cluster, then pack a folder made before"
    )
    told = parser.parse_args()
    folder = told.folder.resolve()
    if not told.queued:
        make(folder)
        return
    make_queued(folder)
    forget_machine(folder)
    pack(folder)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
