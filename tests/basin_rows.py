"""Rows of records whose basins, and so whose optima, are known by formula."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

OPTIMA = {"sp": (-9.0, -6.5), "mup": (-7.0, -5.0), "supar": (-7.0, -7.1)}
DENSITIES = (1.0, 1 / 16)


def rows(
    optima: Mapping[str, tuple[float, float]] = OPTIMA,
    n_seeds: int = 2,
    width: int = 256,
    grid: Iterable[int] = range(-12, -1),
    noise: float = 0.002,
) -> list[dict[str, Any]]:
    """Quadratic basins whose optimum per parameterization and density is known."""
    grid = list(grid)
    rng = np.random.default_rng(0)
    return [
        {
            "parameterization": name,
            "width": width,
            "density": density,
            "n_layer": 2,
            "lr": 2.0**x,
            "init_std": 0.04 if name == "sp" else 0.08,
            "seed": seed,
            "end": "done",
            "train_loss": 2.4 + 0.02 * (x - optimum) ** 2 + 0.01 * seed + rng.normal(0, noise),
            "val_loss": 2.6 + 0.02 * (x - optimum) ** 2 + 0.01 * seed,
            "last_finite_loss": None,
            "cell_id": f"{name}-{width}-{density}-{x}-{seed}",
        }
        for name, both in optima.items()
        for density, optimum in zip(DENSITIES, both, strict=True)
        for x in grid
        for seed in range(n_seeds)
    ]
