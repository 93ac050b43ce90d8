"""README, CONTRIBUTING and the pages of docs/: all of them are reached, their examples run, and every name in them exists."""

from __future__ import annotations

import doctest
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import supar_sweep
from supar_sweep.cli.main import COMMANDS, main
from supar_sweep.cli.plot import KINDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        *("README.md", "CONTRIBUTING.md"),
        *(str(path.relative_to(ROOT)) for path in sorted(DOCS.rglob("*.md"))),
    )
}
FENCE = re.compile(r"^(?:`(?P<file>[^`\n]+)`:\n\n)?```(?P<language>[^\n]*)\n(?P<body>.*?)^```", re.M | re.S)
"""A fenced block; a line before it may name the file that it shows."""

MAX_COLUMNS = 110
AS_LONG_AS_THEY_WERE = {"docs/LOG.md": "its entries are history, and are not rewritten"}
PAST = {"docs/LOG.md"}
"""Pages whose names were true on their dates."""
MINE = {"mine", *re.findall(r"^`myconf/experiment/(\w+)\.yaml`:$", PAGES["docs/experiments.md"], re.M)}
"""Options of groups that stand for the reader's own."""


def code_of(page: str) -> str:
    """Return a page's code but for Python's, one piece a line: fenced and indented blocks, and spans."""
    fenced = [match["body"] for match in FENCE.finditer(page) if not match["language"].startswith("py")]
    prose = FENCE.sub("", page)
    return "\n".join([*fenced, *re.findall(r"^ {4}.*", prose, re.M), *re.findall(r"`([^`\n]+)`", prose)])


def test_every_page_is_in_the_table_of_contents_once() -> None:
    entries = [
        line
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", PAGES["docs/index.md"], re.M | re.S)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    pages = [str(path.relative_to(DOCS).with_suffix("")) for path in sorted(DOCS.rglob("*.md")) if path.stem != "index"]
    assert sorted(entries) == pages


def test_the_readme_links_to_every_page() -> None:
    pages = [name for name in PAGES if name not in ("README.md", "docs/results/dynamic_lr_exponent/README.md")]
    assert [name for name in pages if f"({name})" not in PAGES["README.md"]] == []


@pytest.mark.parametrize("name", PAGES)
def test_prose_is_at_most_110_columns_wide(name: str) -> None:
    prose = re.sub(r"\]\([^)]*\)", "]()", FENCE.sub("", PAGES[name]))  # the target of a link cannot be broken
    long = [line for line in prose.splitlines() if len(line) > MAX_COLUMNS and not line.startswith(("|", "    "))]
    assert bool(long) == (name in AS_LONG_AS_THEY_WERE), long[:3]


@pytest.mark.parametrize("name", [name for name in PAGES if "```python\n" in PAGES[name]])
def test_its_python_runs(name: str) -> None:
    names: dict[str, Any] = {}
    for match in FENCE.finditer(PAGES[name]):
        if match["language"] == "python":
            exec(compile(match["body"], name, "exec"), names)


@pytest.mark.parametrize("name", [name for name in PAGES if "```pycon\n" in PAGES[name]])
def test_its_sessions_print_what_they_show(name: str) -> None:
    session = "\n".join(match["body"] for match in FENCE.finditer(PAGES[name]) if match["language"] == "pycon")
    examples = doctest.DocTestParser().get_doctest(session, {}, name, name, 0)
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0


@pytest.mark.parametrize("name", ["docs/experiments.md", "docs/quickstart.md"])
def test_its_grids_have_the_cells_that_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    n_planned = 0
    for match in FENCE.finditer(PAGES[name]):
        if match["file"]:
            Path(match["file"]).parent.mkdir(parents=True, exist_ok=True)
            Path(match["file"]).write_text(match["body"], encoding="utf-8")
        if match["language"] != "sh":
            continue
        for line in match["body"].splitlines():
            typed, _, said = line.rpartition(" # ")
            words = shlex.split(typed)[1:]
            assert words[0] == "plan"
            assert main(words) == 0, capsys.readouterr().err
            assert f": {said.strip()} (" in capsys.readouterr().out.splitlines()[0]
            n_planned += 1
    assert n_planned >= 1


def test_every_construct_of_a_grid_has_an_example() -> None:
    shown = "\n".join(match["body"] for match in FENCE.finditer(PAGES["docs/experiments.md"]))
    constructs = ("axes:", "zipped:", "by:", "{log2:", "{mult_log2:", "${row:", "${share:")
    assert [construct for construct in constructs if construct not in shown] == []


def options() -> dict[str, set[str]]:
    """Return group -> its options, of conf/."""
    groups = [folder for folder in (ROOT / "conf").iterdir() if folder.is_dir() and folder.name != "local"]
    return {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in groups}


def settings() -> set[str]:
    """Return every dotted setting that stands in conf/, with all its beginnings."""

    def below(node: Any, prefix: str) -> set[str]:
        if not isinstance(node, dict):
            return {prefix}
        inner = (below(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
        return {prefix}.union(*inner)

    known = set()
    for path in (ROOT / "conf").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        top = path.parent == ROOT / "conf" or "# @package _global_" in text
        known |= below(yaml.safe_load(text), "" if top else path.parent.name)
    return known


@pytest.mark.parametrize("name", [name for name in PAGES if name not in PAST])
def test_it_names_nothing_that_does_not_exist(name: str) -> None:
    code = code_of(PAGES[name])
    known = settings()
    sections = {key.partition(".")[0] for key in known if "." in key}
    wrong = [
        f"supar-sweep {word}" for word in re.findall(r"^supar-sweep +([a-z][\w-]*)", code, re.M) if word not in COMMANDS
    ]
    wrong += [f"figure={word}" for word in re.findall(r"\bfigure[=:] ?(\w+)", code) if word not in KINDS]
    for group, allowed in options().items():
        for value in re.findall(rf"(?<![\w.]){group}=([\w|]+)(?![\w/.|])", code):
            wrong += [f"{group}={word}" for word in value.split("|") if word not in allowed | MINE]
    for section, key in re.findall(r"(?<![\w./])([a-z_]+)\.([a-z_]\w*)(?!\w|\()", code):
        free = section == "experiment" or (section, key) == ("launcher", "sbatch")
        if section in sections and key not in ("py", "yaml", "md") and not free and f"{section}.{key}" not in known:
            wrong.append(f"{section}.{key}")
    for path in re.findall(r"\b(?:ss|supar_sweep)((?:\.[A-Za-z_]\w*)+)", PAGES[name]):
        wrong += [f"supar_sweep{path}"] if not resolves(path.strip(".").split(".")) else []
    wrong += [
        path
        for path in re.findall(r"(?<![\w/.])((?:conf(?!/local)|tests|analysis|docs|supar_sweep)/[\w/]+\.\w+)", code)
        if not (ROOT / path).exists()
    ]
    assert wrong == []


def resolves(path: list[str]) -> bool:
    """Return whether a dotted name below supar_sweep is one of its public names, or something in one of its modules."""
    if path[0] in supar_sweep.__all__:
        return True
    found: Any = supar_sweep
    for depth, part in enumerate(path, start=1):
        try:
            found = getattr(found, part, None) or import_module(".".join(["supar_sweep", *path[:depth]]))
        except ImportError:
            return False
    return True


def test_the_page_of_commands_has_every_figure() -> None:
    page = PAGES["docs/commands.md"]
    assert [kind for kind in KINDS if f"| `{kind}` |" not in page] == []


def test_the_rule_of_a_verdict_is_the_one_that_is_applied() -> None:
    from analysis.verdict import RULE

    quoted = " ".join(
        line.removeprefix("> ") for line in PAGES["docs/verdict.md"].splitlines() if line.startswith("> ")
    )
    assert quoted == RULE


def test_the_page_on_python_documents_every_public_name() -> None:
    assert re.search(
        r"^\.\. automodule:: supar_sweep\n( +:members:\n)( +:imported-members:\n)", PAGES["docs/python.md"], re.M
    )


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
