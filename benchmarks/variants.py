"""What is compared: each way to train a cell, by name. A further way is one function and one entry of VARIANTS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cells import reference_point
from benchmarks.reference import Reference, random_batch, read_tokens, sparse_layers
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.sparse.route import choose_route
from supar_sweep.training.cohort import Cohort
from supar_sweep.training.corpus import load_corpus
from supar_sweep.training.cost import MOST_TOGETHER, sparse_shapes
from supar_sweep.training.environment import LAUNCH_ENV, prepare_process
from supar_sweep.training.train import Run
from supar_sweep.training.trainer import Trainer


@dataclass(frozen=True)
class Place:
    """Where and with what a variant runs.

    Args:
        threads: torch threads.
        device: "cpu" or "cuda".
        data: folder of the reference's tokens.
        runtime: the shipped runtime settings, which ours runs with but for these.
    """

    threads: int
    device: str
    data: str
    runtime: Mapping[str, Any]


@dataclass(frozen=True)
class Running:
    """A variant at work on a cell.

    Args:
        step: takes one optimizer step of every model and returns a loss.
        state_bytes: what the sparse layers of one model keep for training; call it after a step.
        n_models: models that a step trains; 1 but for cohorts. Times and memory are per model.
        facts: for the record: route, forms.
    """

    step: Callable[[], Tensor]
    state_bytes: Callable[[], int]
    n_models: int
    facts: dict[str, Any]


def reference(cell: CellConfig, place: Place, *, same_route: bool) -> Running:
    """Return the reference, as shipped or with its linear layers on the matmul route that ours chooses here."""
    torch.set_num_threads(place.threads)
    model = cell.model
    tokens = cell.train.batch_seqs * model.context_tokens
    route = choose_route(place.device, tokens, model.width, model.d_ffn).route if same_route else "torch"
    point = reference_point(cell, data=place.data, device=place.device, route=route)
    train, _ = read_tokens(point)
    run, at = Reference(point), 0

    def step() -> Tensor:
        nonlocal at
        at += 1
        return run.step(*random_batch(point, train), at - 1)

    def state_bytes() -> int:
        return training_bytes(sparse_layers(run.model), run.optimizer)

    return Running(step, state_bytes, 1, {"route": route})


def ours(cell: CellConfig, place: Place, *, compute: str) -> Running:
    """Return the run that `supar-sweep run` would make of the cell."""
    prepare_process(place.threads)
    changed = {"threads": place.threads, "device": place.device, "compute": compute}
    settings = decode(RuntimeConfig, {**place.runtime, **changed})
    trainer, corpus, at = Trainer(cell, settings, torch.device(place.device), None), load_corpus(cell.data), 0
    layers = [trainer.model.get_submodule(name) for name in sparse_shapes(cell)]

    def step() -> Tensor:
        nonlocal at
        at += 1
        return trainer.step(corpus, at - 1)[0]

    def state_bytes() -> int:
        return training_bytes(layers, trainer.optimizer)

    return Running(step, state_bytes, 1, _facts(trainer))


def _facts(trainer: Trainer) -> dict[str, Any]:
    forms = list(trainer.forms.of_layer.values())
    return {"route": trainer.route, "compact_layers": f"{forms.count('compact')}/{len(forms)}"}


class _Nowhere:
    """A sink for runs that leave no record."""

    def begin(self, step: int, **info: Any) -> None: ...

    def log(self, **values: Any) -> None: ...

    def save(self, step: int, state: Mapping[str, Any]) -> None: ...

    def warn(self, message: str) -> None:
        raise RuntimeError(message)


def cohort(cell: CellConfig, place: Place) -> Running:
    """Return several of the cell's runs, of other seeds and lrs, that share every forward pass."""
    prepare_process(place.threads)
    settings = decode(RuntimeConfig, {**place.runtime, "threads": place.threads, "device": place.device})
    corpus = load_corpus(cell.data)
    n_models = SMALL_COHORT if cell.model.width > MANY_UP_TO_WIDTH else COHORT
    cells = [
        replace(cell, seed=cell.seed + k, hparams=replace(cell.hparams, lr=cell.hparams.lr / (k + 1)))
        for k in range(n_models)
    ]
    runs = [Run(each, settings, corpus, sink=_Nowhere()) for each in cells]
    together = Cohort(runs)
    layers = [runs[0].trainer.model.get_submodule(name) for name in sparse_shapes(cell)]

    def step() -> Tensor:
        losses = together.backward(runs)
        for run in runs:
            run.trainer.update()
            run.step += 1
        return losses[0]

    def state_bytes() -> int:
        return training_bytes(layers, runs[0].trainer.optimizer)

    return Running(step, state_bytes, n_models, _facts(runs[0].trainer))


def training_bytes(layers: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the layers' weights, gradients, masks or patterns, and moments.

    Args:
        layers: linear layers, masked in any way.
        optimizer: has taken a step.
    """
    total = 0
    for layer in layers:
        for parameter in layer.parameters():
            total += 2 * parameter.nbytes  # the gradient too
            total += sum(each.nbytes for each in optimizer.state[parameter].values() if each.numel() > 1)
        total += sum(buffer.nbytes for buffer in layer.buffers())
    return total


@dataclass(frozen=True)
class Variant:
    """One way to train a cell.

    Args:
        build: (cell, place) -> the variant at work.
        env: of its process.
        sparse_only: without meaning at density 1.
    """

    build: Callable[[CellConfig, Place], Running]
    env: dict[str, str]
    sparse_only: bool = False


COHORT, SMALL_COHORT, MANY_UP_TO_WIDTH = MOST_TOGETHER["cpu"], 2, 512
"""Runs in a stack; fewer where one step of so many takes long."""

AS_SHIPPED, SAME_ROUTE = "reference", "reference_same_route"

VARIANTS: dict[str, Variant] = {
    AS_SHIPPED: Variant(lambda cell, place: reference(cell, place, same_route=False), {}),
    SAME_ROUTE: Variant(lambda cell, place: reference(cell, place, same_route=True), {}),
    "dense": Variant(lambda cell, place: ours(cell, place, compute="dense"), LAUNCH_ENV),
    "compact": Variant(lambda cell, place: ours(cell, place, compute="compact"), LAUNCH_ENV, sparse_only=True),
    "auto": Variant(lambda cell, place: ours(cell, place, compute="auto"), LAUNCH_ENV),
    "cohort": Variant(cohort, LAUNCH_ENV),
}
OURS = tuple(name for name in VARIANTS if name not in (AS_SHIPPED, SAME_ROUTE))
