"""The public API: docs/examples/mlp.py, run as a user runs it, and the package's lazy names."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import supar_sweep

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "mlp.py"
DENSITIES = (1.0, 1 / 4, 1 / 16)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mlp_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_supar_activations_do_not_move_with_density_and_sps_do(example: ModuleType, steps: int) -> None:
    dense, *sparse = (example.mean_activation("supar", d, steps) for d in DENSITIES)
    for value in sparse:
        assert 0.75 < value / dense < 1.33
    dense, *sparse = (example.mean_activation("sp", d, steps) for d in DENSITIES)
    for value in sparse:
        assert value / dense < 0.5


def test_mup_is_supar_at_density_1(example: ModuleType) -> None:
    assert example.mean_activation("mup", 1.0) == example.mean_activation("supar", 1.0)


def test_the_script_runs_and_prints_a_line_per_density() -> None:
    run = subprocess.run([sys.executable, str(EXAMPLE)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    names = [line.split()[0] for line in run.stdout.splitlines()]
    assert names == ["sp"] * 3 + ["supar"] * 3


def in_fresh_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, supar_sweep; dir(supar_sweep)\n"
        "supar_sweep.Method(parameterization='supar'); supar_sweep.HParams; supar_sweep.Ratios\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "supar_sweep.tag; assert 'torch' in sys.modules"
    )
    in_fresh_python(code)


@pytest.mark.parametrize("name", supar_sweep.__all__)
def test_every_public_name_is_there_listed_and_documented(name: str) -> None:
    assert name in dir(supar_sweep)
    assert getattr(supar_sweep, name).__doc__
    assert getattr(supar_sweep, name) is getattr(supar_sweep, name)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'paramterize'"):
        _ = supar_sweep.paramterize
