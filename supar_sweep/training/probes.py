"""Statistics of a coordinate check: activations, their gradients, and how far one update moves
them, site by site.

If a parameterization is right, the mean absolute activation and its change by an update do not move
with width or density (SuPar sections 3.1 and 3.2), and gradients move only by the known 1/m_d of
the logits multiplier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.config.schema import CellConfig
from supar_sweep.training.corpus import Corpus
from supar_sweep.training.data import batch
from supar_sweep.training.model import GPT, build
from supar_sweep.training.optim import make_optimizer
from supar_sweep.training.roles import ParameterPlan, check_init
from supar_sweep.training.trainer import pick_device


@dataclass
class Recording:
    """What one forward (and backward) pass left at the watched sites.

    Args:
        activations: site -> the module's output, detached.
        gradients: site -> the loss's gradient to that output; filled by backward.
    """

    activations: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def gpt_sites(model: GPT) -> dict[str, nn.Module]:
    """Return site -> module of a GPT: embedding, attention and MLP branch of each block, logits.

    Args:
        model: the model (not compiled: hooks inside compiled code do not run).
    """
    sites: dict[str, nn.Module] = {"embedding": model.embedding}
    for index, block in enumerate(model.blocks):
        sites[f"block{index}.attention"] = block.get_submodule("attention")
        sites[f"block{index}.mlp"] = block.get_submodule("mlp")
    return {**sites, "logits": model.head}


@contextmanager
def watch(sites: Mapping[str, nn.Module]) -> Iterator[Recording]:
    """Record the sites' outputs and gradients while the block runs; the hooks are gone after it.

    Args:
        sites: name -> a module whose output is one tensor.
    """
    recording = Recording()
    handles = [module.register_forward_hook(_recorder(recording, name)) for name, module in sites.items()]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def coordinate_rows(
    model: nn.Module,
    sites: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    clip_norm: float | None = None,
) -> list[dict[str, Any]]:
    """Train on the batches; return a plain row per step and site.

    Each row: step (0-based), site, activation (mean |a| before the step's update), gradient (mean
    |dloss/da|), change (mean |a after - a before| on the same input: what this one update did),
    loss.

    Args:
        model: called as model(x).
        sites: name -> module, see `gpt_sites`.
        optimizer: over the model's parameters; its learning rates are used as they stand.
        batches: (x, y), one a step.
        loss: (model(x), y) -> 0-d tensor.
        clip_norm: clip the global gradient norm; None = never.

    Source: SuPar section 3 and fig. 5 (mean absolute activations over density, a line per step).
    """
    rows: list[dict[str, Any]] = []
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        with watch(sites) as before:
            value = loss(model(x), y)
            value.backward()  # type: ignore[no-untyped-call]
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        with torch.no_grad(), watch(sites) as after:
            model(x)
        for site, activation in before.activations.items():
            change = after.activations[site] - activation
            rows.append(
                {
                    "step": step,
                    "site": site,
                    "activation": _mean_abs(activation),
                    "gradient": _mean_abs(before.gradients[site]),
                    "change": _mean_abs(change),
                    "loss": float(value.detach()),
                }
            )
    return rows


def cell_coordinates(cell: CellConfig, corpus: Corpus, device: str) -> list[dict[str, Any]]:
    """Train a cell for its steps at constant learning rates, in float32; return the rows of `coordinate_rows`.

    Args:
        cell: its GPT, optimizer, clipping, steps and batches; its schedule is not applied.
        corpus: tokens, as `cell.data` names them.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: no such device here, masks that change in training, or a model that does not start as the rules say.
    """
    cell.sparsity.check_coordinates()
    where = pick_device(device)
    torch.manual_seed(cell.seed)
    model, plans = build(cell)
    check_init(plans)
    model.to(where)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(cell.train.steps):
            x, y = batch(
                corpus,
                seed=cell.seed,
                step=step,
                batch_seqs=cell.train.batch_seqs,
                context_tokens=cell.model.context_tokens,
            )
            yield x.to(where), y.to(where)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    optimizer = make_optimizer(cell, plans, where)
    return coordinate_rows(model, gpt_sites(model), optimizer, batches(), loss, clip_norm=cell.optimizer.clip_norm)


def gradient_rows(plans: Sequence[ParameterPlan]) -> list[dict[str, Any]]:
    """Return a plain row per parameter that has a gradient: name, role, gradient (mean |g| over the
    live entries).

    Args:
        plans: from `parameterize`, after a backward pass.
    """
    return [
        {
            "name": plan.name,
            "role": plan.role,
            # dead entries' gradients are exactly 0
            "gradient": float(plan.parameter.grad.abs().sum(dtype=torch.float64)) / plan.live,
        }
        for plan in plans
        if plan.parameter.grad is not None
    ]


def _recorder(recording: Recording, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        recording.activations[name] = output.detach().clone()
        if output.requires_grad:
            output.register_hook(keep_gradient)  # type: ignore[no-untyped-call]

    def keep_gradient(gradient: Tensor) -> None:
        recording.gradients[name] = gradient

    return hook


def _mean_abs(x: Tensor) -> float:
    return float(x.abs().mean(dtype=torch.float64))
