"""Which form each of a cell's sparse layers is computed in: set, measured, or the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from supar_sweep.config.schema import CellConfig, RuntimeConfig, check_compute
from supar_sweep.errors import ConfigError
from supar_sweep.sparse.compact import STANDS_FOR
from supar_sweep.sparse.compute import ComputeChoice, choose_compute, summary
from supar_sweep.sparse.density import live_counts
from supar_sweep.training.cost import sparse_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Forms:
    """The form of every sparse layer.

    Args:
        of_layer: layer, such as blocks.0.mlp.up -> "dense" or "compact".
        live: layer -> number of live weights.
        reason: one line for the log.
    """

    of_layer: Mapping[str, str]
    live: Mapping[str, int]
    reason: str

    @property
    def compact(self) -> dict[str, int]:
        """Layer -> live weights, of the compact layers."""
        return {name: self.live[name] for name, form in self.of_layer.items() if form == "compact"}


def choose_forms(
    cell: CellConfig,
    runtime: RuntimeConfig,
    device: torch.device,
    route: str,
    resume: Mapping[str, Any] | None,
    *,
    micro_seqs: int,
) -> Forms:
    """Return the forms in which a cell's layers are computed. A layer without a dead weight is always dense.

    Args:
        cell: what to train.
        runtime: its `compute`; where it compiles the model, every layer is dense.
        device: where.
        route: the dense layers' matmul, which compact is measured against.
        resume: a checkpoint's state, whose forms are kept, or None.
        micro_seqs: sequences of one pass of a process.

    Raises:
        ConfigError: compact is asked for where it cannot be had, or a density out of a layer's reach.
    """
    shapes = sparse_shapes(cell)
    # under the parameters' names, as an error about one should have it
    counts = live_counts(
        cell.layer_density, {f"{name}.{STANDS_FOR}": shape for name, shape in shapes.items()}, cell.density
    )
    live = {name: counts[f"{name}.{STANDS_FOR}"] for name in shapes}
    if cell.mask_schedule() is not None:
        check_compute(cell, runtime)
        return Forms(dict.fromkeys(shapes, "dense"), live, f"masks change (sparsity.method={cell.sparsity.method})")
    if runtime.compile:
        if runtime.compute == "compact" and not resume:
            raise ConfigError(
                "runtime.compute", "cannot be compiled (runtime.compile)", value="compact", allowed="auto or dense"
            )
        return Forms(dict.fromkeys(shapes, "dense"), live, "runtime.compile takes dense layers")
    if resume:
        # a checkpoint from before there were forms is dense
        kept: Mapping[str, str] = resume.get("compute") or dict.fromkeys(shapes, "dense")
        return Forms(dict(kept), live, "the checkpoint's")
    sizes = {name: fan_out * fan_in for name, (fan_out, fan_in) in shapes.items()}
    if runtime.compute != "auto":
        forms = {name: runtime.compute if live[name] < sizes[name] else "dense" for name in shapes}
        return Forms(forms, live, "set by runtime.compute")
    tokens = micro_seqs * cell.model.context_tokens

    def choose(name: str, link: str = "none") -> ComputeChoice:
        fan_out, fan_in = shapes[name]
        return choose_compute(
            device,
            fan_in=fan_in,
            fan_out=fan_out,
            density=live[name] / sizes[name],
            tokens=tokens,
            context_tokens=cell.model.context_tokens,
            route=route,
            dtype=DTYPES[cell.train.precision],
            link=link,
        )

    choices: dict[str, ComputeChoice] = {}
    for name in shapes:
        if ".mlp." not in name:
            choices[name] = choose(name)
        elif name.endswith(".up"):
            down = name.removesuffix("up") + "down"
            # the two spare each other a transposition, if both are compact
            pair = {name: choose(name, "out"), down: choose(down, "in")}
            both = all(choice.form == "compact" for choice in pair.values())
            choices |= pair if both else {name: choose(name), down: choose(down)}
    return Forms({name: choice.form for name, choice in choices.items()}, live, summary(choices))
