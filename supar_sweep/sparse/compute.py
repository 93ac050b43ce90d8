"""Which form a sparse layer is computed in: dense with a mask, or its live weights only, by measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.linear import MaskedLinear, attach_mask
from supar_sweep.sparse.masks import dense_mask, live_positions
from supar_sweep.sparse.route import speedup_of

FORMS = ("dense", "compact")

MIN_COMPACT_SPEEDUP = 1.15
"""Below this the compact form is not worth being different, nor being called member by member in a cohort."""

MAX_MEASURED_DENSITY = 0.5
"""Above it no compact form was ever near the dense matmul's speed, so nothing is measured."""

_CAPS = {"cpu": (1024, 512)}
_GPU_CAPS = (2048, 4096)
"""Largest fan and tokens that are measured. ASSUMPTION on a GPU, which smaller ones would not fill: none was at hand."""


@dataclass(frozen=True)
class ComputeChoice:
    """Which form a layer is computed in, and why.

    Args:
        form: "dense" or "compact".
        speedup: time of a training step of the layer, dense over compact; None if not measured.
        reason: one line for the log.
    """

    form: str
    speedup: float | None
    reason: str


def choose_compute(
    device: torch.device | str,
    *,
    fan_in: int,
    fan_out: int,
    density: float,
    tokens: int,
    context_tokens: int,
    route: str = "torch",
    dtype: torch.dtype = torch.float32,
    link: str = "none",
) -> ComputeChoice:
    """Return the form of one layer on this machine, measured in about a tenth of a second and cached for the process.

    Forward, both gradients and AdamW's step are timed in both forms, in turn. Layers above 1024 x 1024 and 512 tokens (on a CPU)
    are measured at those, at their own density: the ratio moves little from there on, and in compact's favour. Whatever
    fails here leaves the dense form.

    The choice rests on a timing, so a run that must continue exactly stores it and sets it again.

    Args:
        device: where the model runs.
        fan_in, fan_out: of the layer, >= 1.
        density: its achieved density, in (0, 1]; at 1 there is nothing to leave out.
        tokens: rows of the activations of one step (micro-batch * context), >= 1.
        context_tokens: of one sequence, a divisor of tokens.
        route: of the dense matmul it competes with, see `choose_route` in route.py.
        dtype: the type that the layer computes in.
        link: "out" or "in" for a layer that would hand its output to, or take its input from, another compact layer without
            transposing it; "none" for one between dense neighbours.
    """
    if density >= 1:
        return ComputeChoice("dense", None, "every weight is live")
    if density > MAX_MEASURED_DENSITY:
        return ComputeChoice("dense", None, f"density above {MAX_MEASURED_DENSITY}")
    kind = torch.device(device).type
    max_fan, max_tokens = _CAPS.get(kind, _GPU_CAPS)
    fans = (min(fan_in, max_fan), min(fan_out, max_fan))
    # two digits: layers of one model differ by a rounding of their live counts
    rounded = float(f"{density:.2g}")
    context = min(context_tokens, max_tokens)
    batch = (max(1, min(tokens, max_tokens) // context), context)
    return _measured(kind, *fans, rounded, batch, route, dtype, link, torch.get_num_threads())


def decide_compute(speedup: float) -> ComputeChoice:
    """Return the choice that follows from a measurement.

    Args:
        speedup: time of a training step of the layer, dense over compact.
    """
    if speedup > MIN_COMPACT_SPEEDUP:
        return ComputeChoice("compact", speedup, f"{speedup:.2f}x the dense form's speed")
    return ComputeChoice("dense", speedup, f"compact is not faster here: {speedup:.2f}x the dense form's speed")


def summary(choices: Mapping[str, ComputeChoice]) -> str:
    """Return one line: how many layers are compact, and what was measured, or why nothing was.

    Args:
        choices: layer -> choice.
    """
    n_compact = sum(choice.form == "compact" for choice in choices.values())
    speedups = [choice.speedup for choice in choices.values() if choice.speedup is not None]
    reasons = sorted({choice.reason for choice in choices.values() if choice.speedup is None})
    if speedups:
        reasons.insert(0, f"measured {min(speedups):.2f}x to {max(speedups):.2f}x the dense form's speed")
    return f"{n_compact} of {len(choices)} layers compact: {'; '.join(reasons)}"


@lru_cache(maxsize=256)
def _measured(
    kind: str,
    fan_in: int,
    fan_out: int,
    density: float,
    batch: tuple[int, int],
    route: str,
    dtype: torch.dtype,
    link: str,
    threads: int,
) -> ComputeChoice:
    try:
        n_live = max(1, math.floor(density * fan_in * fan_out))
        dense = MaskedLinear(fan_in, fan_out, bias=False, route=route, device=kind, dtype=dtype)
        compact = CompactLinear(
            fan_in, fan_out, n_live, bias=False, feature_major=link == "out", device=kind, dtype=dtype
        )
        compact.set_pattern(live_positions(1, (fan_out, fan_in), n_live))
        for parameter in (dense.weight, compact.values):
            nn.init.constant_(parameter, 1 / math.sqrt(fan_in))
        attach_mask(dense, "weight", dense_mask(1, (fan_out, fan_in), n_live))
        steps = [training_step(dense, batch, kind), training_step(compact, batch, kind, link)]
        return decide_compute(speedup_of(steps, kind))
    except (RuntimeError, NotImplementedError, MemoryError) as problem:
        # an operator that this device lacks, memory that is not there: the dense form always works
        reason = str(problem).partition("\n")[0]
        return ComputeChoice("dense", None, f"the compact form failed here: {reason}")


def training_step(layer: nn.Module, batch: tuple[int, int], device: str, link: str = "none") -> Callable[[], None]:
    """Return a function that runs forward, both gradients and AdamW's step of one layer without a bias.

    Args:
        layer: a MaskedLinear or CompactLinear on `device`.
        batch: sequences, and tokens of one.
        device: "cpu" or "cuda".
        link: see `choose_compute`.
    """
    (parameter,) = layer.parameters()
    fan_in, fan_out = int(layer.fan_in), int(layer.fan_out)  # type: ignore[arg-type]
    # its own generator: the caller's random state stays untouched
    noise = np.random.default_rng(0)
    x, grad = (
        torch.from_numpy(noise.standard_normal((*batch, n), dtype=np.float32)).to(device, parameter.dtype)
        for n in (fan_in, fan_out)
    )
    # what a linked neighbour hands over lies in memory feature by feature
    x = x.mT.contiguous().mT if link == "in" else x
    grad = grad.mT.contiguous().mT if link == "out" else grad
    x.requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=1e-6, fused=True)

    def run() -> None:
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            torch.autograd.backward(layer(x), grad)
        optimizer.step()
        parameter.grad = x.grad = None

    return run
