"""What is trained: the settings of `supar-sweep run`, and the same point for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reference import Point
from supar_sweep.cli.compose import compose, hydra_words
from supar_sweep.cli.settings import Settings
from supar_sweep.config.schema import CellConfig
from supar_sweep.training.corpus import load_corpus

SHAPE = (
    *("model=gpt", "model.n_layer=2", "model.d_head=32", "model.bias=false", "model.tied_head=true"),
    *("data=stdlib", "optimizer=adamw", "hparams.weight_decay=0.1"),
)
"""The authors' GPT, small."""


def settings(words: Sequence[str]) -> Settings:
    """Return the settings of `supar-sweep run <words>`."""
    overrides = [word for word in hydra_words("run", "benchmark", words) if not word.startswith("hydra")]
    return Settings.read("run", compose("run", overrides), tuple(words))


def reference_point(cell: CellConfig, *, data: str = "", device: str = "cpu", route: str = "torch") -> Point:
    """Return the reference's point of the same problem.

    Args:
        cell: the cell; its schedule is linear and its optimizer AdamW.
        data: folder of the tokens, see `write_tokens`.
        device, route: of the reference.
    """
    assert cell.optimizer.name == "adamw"
    assert cell.schedule.name == "linear"
    assert cell.base is not None
    names = {item.name for item in fields(Point)}
    known: dict[str, Any] = {}
    for group in (cell, cell.hparams, cell.model, cell.optimizer, cell.schedule, cell.train):
        known |= {item.name: getattr(group, item.name) for item in fields(group) if item.name in names}
    known |= {"base_width": cell.base.width, "base_n_layer": cell.base.n_layer, "n_vocab": cell.data.n_vocab}
    return Point(**{**known, "data": data, "device": device, "route": route})


def write_tokens(cell: CellConfig, folder: Path) -> str:
    """Write the cell's corpus as the reference reads it (train.bin and val.bin, uint16); return the folder."""
    corpus = load_corpus(cell.data)
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        tokens.astype(np.uint16).tofile(folder / f"{name}.bin")
    return str(folder)
