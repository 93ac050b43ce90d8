"""Where conf/, launchers/, analysis/ are: at a checkout's root, inside the package in a wheel."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """Return the folder of the shipped Hydra groups."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def room(name: str) -> ModuleType:
    """Return a module of launchers/ or analysis/, which the wheel holds under supar_sweep.

    Args:
        name: as in a checkout, e.g. "launchers.local".
    """
    top = name.partition(".")[0]
    inside = (PACKAGE / top).is_dir()
    return importlib.import_module(f"supar_sweep.{name}" if inside else name)
