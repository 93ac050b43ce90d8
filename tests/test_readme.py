"""What README and docs show is what the program does: the rule table, the example, every command.

tests/test_docs.py holds the pages themselves: their order, their examples, the names in them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from supar_sweep.cli.main import COMMANDS, main
from supar_sweep.cli.rules import markdown
from supar_sweep.sweep.status import states
from supar_sweep.sweep.submission import Experiment

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))))
}
# The pages whose `sh` blocks are run here, in this order. Those of docs/experiments.md are run by test_docs.
RUN = (
    "README.md",
    "docs/commands.md",
    "docs/verdict.md",
    "docs/rules.md",
    "docs/quickstart.md",
    "docs/results/README.md",
)

# Added to the pages' lines so that what trains takes seconds; everything else runs as it stands there.
TINY = [
    "model.width=32",
    "model.d_head=8",
    "model.context_tokens=16",
    "base.width=16",
    "train.steps=4",
    "train.eval_seqs=4",
]
OF_GRID = [*TINY, "experiment.axes.density=[1,0.25]", "experiment.axes.seed=[0]", "experiment.axes.lr={log2: [-8, -6]}"]
SMALLER = {
    "quickstart": ["size=smoke"],
    "coord-check": [
        *(w for w in TINY if "train" not in w),
        "train.steps=2",
        "check.densities=[1,0.5]",
        "check.widths=[16,32]",
        "check.seeds=[0,1]",
    ],
    # the proxy is the base: it has no width of its own
    "tune": [
        *(w for w in TINY if "model.width" not in w),
        "study.n_trials=2",
        "study.confirm_top_k=1",
        "study.confirm_seeds=[1]",
    ],
    "run": OF_GRID,
    "reproduce": [
        *(*TINY, "experiment.axes.density=[1,0.25]", "experiment.axes.seed=[0]"),
        *("study.n_trials=1", "study.confirm_top_k=0", "study.confirm_seeds=[]"),
    ],
    "calibrate": OF_GRID,
}
ON_SLURM = re.compile(r"^## On a SLURM cluster\n+```text\n(.*?)^```", re.M | re.S)


def commands() -> list[list[str]]:
    """Return the supar-sweep lines of README and docs as words, in their order, each once."""
    blocks = [block for name in RUN for block in re.findall(r"^```sh\n(.*?)^```", PAGES[name], re.M | re.S)]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("supar-sweep ")]
    words = [tuple(shlex.split(line, comments=True)[1:]) for line in lines]
    return [list(each) for each in dict.fromkeys(words)]


def test_no_page_with_commands_is_left_out() -> None:
    shown = {name for name, page in PAGES.items() if "```sh\n" in page}
    assert shown == {*RUN, "docs/experiments.md"}


def test_the_rule_table_is_the_one_that_the_program_prints() -> None:
    assert markdown() in PAGES["docs/rules.md"]


def test_the_rows_of_the_readme_are_rows_of_the_rule_table() -> None:
    shown = [line for line in README.splitlines() if line.startswith("|")]
    assert len(shown) == 5
    assert [line for line in shown if line not in markdown().splitlines()] == []


def test_the_example_is_the_one_that_is_run() -> None:
    assert (ROOT / "docs" / "examples" / "mlp.py").is_file()
    assert "```{literalinclude} examples/mlp.py\n" in PAGES["docs/own-model.md"]


def test_every_command_is_shown() -> None:
    assert {words[0] for words in commands()} == set(COMMANDS)


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_and_file_it_links_to_exists(name: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[name])
    assert targets or name != "README.md"
    assert [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()] == []


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands():
        code = main([*words, *SMALLER.get(words[0], [])])
        shown = capsys.readouterr()
        if words[0] == "cancel":  # nothing runs any more, and it says so
            assert code == 2
            assert "is not running" in shown.err
        elif words[0] == "logs":  # the page's cell stands for one of the reader's
            assert code == 2
            assert "cell: is none of the" in shown.err
        elif words[0] == "export":  # so here
            assert code == 2
            assert "checkpoint: is not there" in shown.err
        else:
            assert code == 0, f"supar-sweep {shlex.join(words)}: {shown.err}"
    for made in ("studies/mine/best.yaml", "experiments/lr_basins/lr_basins.png", "experiments/lr_basins/verdict.json"):
        assert (tmp_path / "runs" / made).exists()


def test_the_page_on_slurm_names_every_option_command_and_kind_of_end() -> None:
    from launchers.state import STATES

    page = PAGES["docs/slurm.md"]
    options = yaml.safe_load((ROOT / "conf" / "launcher" / "slurm.yaml").read_text(encoding="utf-8"))
    assert [key for key in options if key != "name" and f"`{key}`" not in page] == []
    assert [
        word for word in ("calibrate", "plan", "run", "status", "logs", "cancel") if f"supar-sweep {word}" not in page
    ] == []
    table = re.search(r"^## What each end means\n(.*?)^## ", page, re.M | re.S)
    assert table
    unsaid = {
        "running",
        "pending",
        "missing",
        "stale",
        "unknown",
        "preempted",
        "node-failed",
    }  # states, of which no cell ends
    assert [state for state in STATES if state not in unsaid and state not in table[1]] == []


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_six_lines_lead_from_nothing_to_a_grid_on_slurm() -> None:
    found = ON_SLURM.search(README)
    assert found
    lines = found[1].splitlines()
    assert len(lines) == 6
    small = [*OF_GRID, "launcher.mem_gb=0.5"]
    with TemporaryDirectory(prefix="supar-six-") as folder:
        Path(folder).chmod(0o755)  # munged wants every folder above its socket to be passable
        runs = f"runs_dir={folder}/runs"
        of = {"plan": small, "run": small, "status": []}
        cases = " ".join(f'{word}) set -- "$@" {shlex.join([*words, runs])} ;;' for word, words in of.items())
        function = f'supar-sweep() {{ case "$1" in {cases} esac; {shlex.quote(sys.executable)} -m supar_sweep "$@"; }}'
        environment = {**os.environ, "TMPDIR": folder}
        try:
            script = "\n".join(["set -e", function, *lines])
            said = subprocess.run(
                ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
            )
            assert said.returncode == 0, said.stderr
        finally:
            down = [str(ROOT / "launchers" / "dev_cluster.sh"), "down"]
            subprocess.run(down, env=environment, check=True, capture_output=True, timeout=120)
        plan = Experiment(Path(folder, "runs"), "lr_basins").plan()
        ends = {state.state for state in states(Experiment(Path(folder, "runs"), "lr_basins"), plan).values()}
    assert "#SBATCH --array=0-" in said.stdout
    assert ends <= {"done", "diverged"}
