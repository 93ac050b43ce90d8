"""Runs of a tiny cell with everything they say kept in memory, for the tests of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from supar_sweep.config.schema import CellConfig
from supar_sweep.training.corpus import Corpus
from supar_sweep.training.member import Outcome
from supar_sweep.training.train import train
from tests.tiny import tiny_cell, tiny_runtime


class ListSink:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.saved: dict[int, Any] = {}
        self.warned: list[str] = []
        self.begun: dict[str, Any] = {}

    def begin(self, step: int, **info: Any) -> None:
        self.begun = {"step": step, **info}

    def log(self, **values: Any) -> None:
        self.lines.append(values)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        # as a file would: what is saved no longer changes with the run
        self.saved[step] = {**torch_copy(state), "step": step}

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines if "loss" in line]


def torch_copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: torch_copy(item) for key, item in value.items()}
    return [torch_copy(item) for item in value] if isinstance(value, list) else value


def run(
    corpus: Corpus,
    cell: CellConfig | None = None,
    runtime: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> tuple[Outcome, ListSink]:
    sink = ListSink()
    outcome = train(cell or tiny_cell(), tiny_runtime(**(runtime or {})), corpus, sink=sink, **keywords)
    return outcome, sink
