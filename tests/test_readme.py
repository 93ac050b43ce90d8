"""What the README says is what the program does: its rule table, its example, its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from supar_sweep.cli.main import COMMANDS, main
from supar_sweep.cli.rules import markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Added to the README's lines so that what trains takes seconds; everything else runs as it stands there.
TINY = [
    "model.width=32",
    "model.d_head=8",
    "model.context_tokens=16",
    "base.width=16",
    "train.steps=4",
    "train.eval_seqs=4",
]
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
    "run": [
        *TINY,
        "experiment.axes.density=[1,0.25]",
        "experiment.axes.seed=[0]",
        "experiment.axes.lr={log2: [-8, -6]}",
    ],
}


def commands() -> list[list[str]]:
    """Return the README's supar-sweep lines as words, in their order."""
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("supar-sweep ")]


def test_the_rule_table_is_the_one_that_the_program_prints() -> None:
    assert markdown() in README


def test_the_example_is_the_one_that_is_run() -> None:
    example = (ROOT / "docs" / "examples" / "mlp.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in README


def test_every_command_is_shown() -> None:
    assert {words[0] for words in commands()} == set(COMMANDS)


def test_every_picture_and_file_it_links_to_exists() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands():
        code = main([*words, *SMALLER.get(words[0], [])])
        shown = capsys.readouterr()
        if words[0] == "cancel":  # nothing runs any more, and it says so
            assert code == 2
            assert "is not running" in shown.err
        elif words[0] == "export":  # the README's cell stands for one of the reader's
            assert code == 2
            assert "checkpoint: is not there" in shown.err
        else:
            assert code == 0, f"supar-sweep {shlex.join(words)}: {shown.err}"
    for made in ("studies/mine/best.yaml", "experiments/lr_basins/lr_basins.png", "experiments/lr_basins/verdict.json"):
        assert (tmp_path / "runs" / made).exists()
