"""The house's own rules: who imports whom, what `--help` loads, file sizes, the tree in docs/architecture.md."""

import ast
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("supar_sweep", "launchers", "analysis")

# The rooms from the ground to the roof, each with its modules' prefixes (the longest prefix
# decides). A module may import from its own room and from those above it in this list.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("supar_sweep.errors",),
    ("supar_sweep.rules",),
    ("supar_sweep.config",),
    ("supar_sweep.sweep",),  # grid, identity, records
    ("supar_sweep.sparse",),
    ("supar_sweep.training",),
    (
        "supar_sweep.sweep.complete",
        "supar_sweep.sweep.handover",
        "supar_sweep.sweep.tune",
    ),  # the launcher is handed to them
    ("supar_sweep",),  # the public names, gathered
    ("launchers",),
    ("analysis",),
    ("supar_sweep.cli", "supar_sweep.__main__"),
)
NEVER: tuple[tuple[str, str], ...] = (("analysis", "launchers"), ("launchers", "analysis"))

# Rooms that plan, read records and remap hyperparameters on a login node: no torch.
TORCH_FREE = ("supar_sweep.rules", "supar_sweep.config", "supar_sweep.sweep")

HEAVY = (
    *("torch", "numpy", "scipy", "pandas", "matplotlib", "optuna", "submitit"),
    *("hydra", "omegaconf", "rich", "yaml", "multiprocessing.pool"),
)

SOFT_LINE_LIMIT = 400
LINE_LIMIT = 450
LONGER_WITH_REASON: dict[str, str] = {}  # path -> why it is one piece


@cache
def git_files() -> tuple[str, ...]:
    """Paths of the files that are, or with the next commit would be, in the repository."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout, or no git: {error}")
    return tuple(p for p in sorted(listing.stdout.split("\0")) if p and (ROOT / p).is_file())


def source_modules() -> dict[str, Path]:
    """Every module of the product: dotted name (as in a checkout) -> file."""
    modules = {}
    for folder in SOURCE_FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


MODULES = source_modules()


def imported_names(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names that `module` imports in `nodes`, relative ones made absolute."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(up if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:  # `from package import module`, or a name out of a module
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in MODULES else base


def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: not functions', not TYPE_CHECKING's."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import_time(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            for child in getattr(node, field, []):
                inner = child.body if isinstance(child, ast.ExceptHandler) else [child]
                yield from at_import_time(inner)


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def room_of(module: str) -> int:
    matches = [
        (len(prefix), level)
        for level, prefixes in enumerate(ROOMS)
        for prefix in prefixes
        if under(module, prefix) and (prefix != "supar_sweep" or module == "supar_sweep")
    ]
    assert matches, f"{module} is in no room: name it in ROOMS"
    return max(matches)[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_only_to_rooms_above(module: str) -> None:
    # `python -m` and the installed wheel name launchers and analysis under supar_sweep
    for name in imported_names(module, ast.walk(syntax(module))):
        for room in ("launchers", "analysis"):
            name = name.removeprefix("supar_sweep.") if under(name, f"supar_sweep.{room}") else name
        if name.partition(".")[0] not in SOURCE_FOLDERS:
            continue
        if name == "supar_sweep":  # the package itself (its version): it loads no room
            continue
        assert room_of(name) <= room_of(module), f"{module} imports {name}, a room below its own"
        for importer, forbidden in NEVER:
            assert not (under(module, importer) and under(name, forbidden)), f"{module} -> {name}"


def test_only_the_cli_knows_launchers_and_analysis() -> None:
    # also as strings handed to importlib: no other module spells their names in a call
    for module in MODULES:
        if not under(module, "supar_sweep") or under(module, "supar_sweep.cli"):
            continue
        for node in ast.walk(syntax(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                spelled = ast.unparse(node)
                assert "launchers" not in spelled, f"{module}: {spelled}"
                assert "analysis" not in spelled, f"{module}: {spelled}"


@pytest.mark.parametrize("module", [m for m in MODULES if any(under(m, r) for r in TORCH_FREE)])
def test_planning_modules_do_not_import_torch_at_module_level(module: str) -> None:
    names = set(imported_names(module, at_import_time(syntax(module).body)))
    assert not [n for n in names if under(n, "torch")]


def loaded_by(code: str) -> set[str]:
    """Names in sys.modules after `code` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nimport json; print('MODULES', json.dumps(sorted(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    return set(json.loads(child.stdout.rpartition("MODULES ")[2]))


def test_importing_every_planning_module_loads_no_torch() -> None:
    names = [m for m in MODULES if any(under(m, room) for room in TORCH_FREE)]
    assert names
    loaded = loaded_by("\n".join(f"import {name}" for name in names))
    assert set(names) <= loaded
    assert "torch" not in loaded


def test_help_loads_nothing_heavy() -> None:
    code = (
        "sys.argv = ['supar-sweep', '--help']\n"
        "from supar_sweep.cli.main import main\n"
        "try:\n    code = main()\nexcept SystemExit as end:\n    code = end.code\n"
        "assert code in (None, 0), code"
    )
    loaded = loaded_by(code)
    assert "supar_sweep.cli.main" in loaded
    assert not sorted(loaded & set(HEAVY))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_every_folder_with_modules_is_a_package() -> None:
    # without __init__.py it is a namespace package, which any other folder of that name can join
    folders = {file.parent for file in MODULES.values()}
    bare = sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file())
    assert not bare, f"no __init__.py in {' '.join(bare)}"


def test_source_files_fit_in_the_head() -> None:
    lengths = {
        path: len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in git_files()
        if path.endswith(".py")
    }
    too_long = {p: n for p, n in lengths.items() if n > LINE_LIMIT and p not in LONGER_WITH_REASON}
    assert not too_long, f"split, aiming at {SOFT_LINE_LIMIT} lines or fewer: {too_long}"
    stale = [p for p in LONGER_WITH_REASON if lengths.get(p, 0) <= LINE_LIMIT]
    assert not stale, f"no exception needed any more: {stale}"


def test_there_is_no_drawer_for_everything() -> None:
    drawers = {"utils.py", "helpers.py", "misc.py", "common.py"}
    assert not [p for p in git_files() if Path(p).name in drawers]


def test_code_is_ascii_but_for_the_name() -> None:
    for path in git_files():
        if path.endswith(".py"):
            text = (ROOT / path).read_text(encoding="utf-8").replace("S\u00b5Par", "")
            odd = [line for line in text.splitlines() if not line.isascii()]
            assert not odd, f"{path}: {odd[0]!r}"


# Spelled in two halves, or this file would hold what it forbids.
FORBIDDEN = {
    "a path of the machine it was written on": re.compile("/wo" + r"rk/(main|shared|\.)"),
    "a package folder of that machine": re.compile("/opt/" + "(wheels|pypi)"),
    "a scratch folder of that machine": re.compile("/tmp/" + r"(br" + "ief|bash_jobs)"),
    "notes that are not in the repository": re.compile("(FIELD|PERF)-" + r"NOTES|\.lib" + "rary/"),
    "a folder outside the repository": re.compile(r"\.\./" + "shared"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    for path in git_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        found = FORBIDDEN[what].findall(text)
        assert not found, f"{path} holds {what}"


def documented_tree() -> set[str]:
    """Paths in the tree of docs/architecture.md: the fenced block whose first line starts with `supar-sweep/`.

    One path a line, then what it is for. A line that stands deeper than a folder above it is in
    that folder; a folder ends in `/`.
    """
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^```[a-z]*\nsupar-sweep/.*\n((?:(?!```).*\n)*)```", page, re.MULTILINE)
    assert block, "docs/architecture.md has no fenced block that starts with supar-sweep/"
    paths: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in block.group(1).splitlines():
        entry = re.match(r"([\s|`+\u2500-\u257f-]*)(\S+)", line)
        if entry is None:
            continue
        depth, name = len(entry.group(1)), entry.group(2)
        while folders and folders[-1][0] >= depth:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        assert path not in paths, f"{path} stands twice in the tree of docs/architecture.md"
        paths.add(path)
        if name.endswith("/"):
            folders.append((depth, path))
    return paths


def test_the_documented_tree_names_what_is_there() -> None:
    in_repository: set[str] = set()
    wanted: set[str] = set()
    for path in git_files():
        parts = path.split("/")
        folders = {"/".join(parts[:n]) + "/" for n in range(1, len(parts))}
        in_repository |= {path} | folders
        wanted.add(parts[0] + "/" if len(parts) > 1 else path)
        if parts[0] in SOURCE_FOLDERS:
            wanted |= folders
            if path.endswith(".py") and parts[-1] != "__init__.py":
                wanted.add(path)
    tree = documented_tree()
    unnamed, gone = sorted(wanted - tree), sorted(tree - in_repository)
    assert not unnamed, f"not in the tree of docs/architecture.md: {' '.join(unnamed)}"
    assert not gone, f"in the tree of docs/architecture.md, but not in the repository: {' '.join(gone)}"


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(r for e in extras if e != "dev" for r in extras[e])]
    declared = {re.split(r"[^A-Za-z0-9_.-]", r)[0].lower() for r in requirements}
    distributions = importlib.metadata.packages_distributions()
    undeclared: dict[str, str] = {}
    for module in MODULES:
        for name in imported_names(module, ast.walk(syntax(module))):
            top = name.partition(".")[0]
            if top in SOURCE_FOLDERS or top in sys.stdlib_module_names:
                continue
            sources = {d.lower() for d in distributions.get(top, [top])}
            if not sources & declared:
                undeclared[top] = module
    assert not undeclared, f"pyproject.toml lacks (package: imported by): {undeclared}"


@pytest.mark.parametrize(
    ("required", "outcome"),
    [("", "1 skipped"), ("browser", "1 skipped"), ("slurm, browser", "1 error")],
)
def test_what_the_machine_lacks_skips_unless_required(tmp_path: Path, required: str, outcome: str) -> None:
    answer = run_a_slurm_test(tmp_path, required)
    assert outcome in answer
    assert "no SLURM: sinfo is not on PATH" in answer


def test_an_unknown_requirement_is_an_error(tmp_path: Path) -> None:
    answer = run_a_slurm_test(tmp_path, "slrum")
    assert "unknown slrum; known: slurm, browser, gpu, root" in answer


def run_a_slurm_test(folder: Path, required: str) -> str:
    """What pytest says about one test marked `slurm`, with this conftest and an empty PATH."""
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    marked = "import pytest\n\n@pytest.mark.slurm\ndef test_it() -> None:\n    pass\n"
    (folder / "test_it.py").write_text(marked, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "--strict-markers", "-p", "no:cacheprovider"],
        cwd=folder,
        env={"PATH": "", "SUPAR_REQUIRE": required},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    ).stdout
