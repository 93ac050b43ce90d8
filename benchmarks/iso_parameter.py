"""Benchmark d: what a step costs as width grows and the number of live weights stays, part by part, beside each part's bound.

The bound of a part is the longer of two times: its FLOPs at the measured peak of this CPU's matmul, and the bytes that it cannot
but read and write at the measured speed of copies of that size (of a cache, where its arrays fit in one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cells import SHAPE, settings
from benchmarks.machine import MIB, bytes_per_s, interleaved_s, peak_flops
from benchmarks.variants import training_bytes
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.compute import training_step
from supar_sweep.sparse.linear import MaskedLinear
from supar_sweep.training.corpus import load_corpus
from supar_sweep.training.cost import sparse_shapes
from supar_sweep.training.environment import prepare_process
from supar_sweep.training.trainer import Trainer

FLOAT = 4
ADAMW_PASSES = 7
"""AdamW reads weight, gradient and two moments, and writes all but the gradient."""


@dataclass(frozen=True)
class Setting:
    """What to measure.

    Args:
        shapes: (width, one_in): width * width / one_in is the same for all.
        batch_seqs, context_tokens: of a step.
        threads: torch threads.
        rounds: timed rounds of each part.
    """

    shapes: Sequence[tuple[int, int]] = ((256, 1), (512, 4), (1024, 16), (2048, 64), (4096, 256))
    batch_seqs: int = 8
    context_tokens: int = 128
    threads: int = 1
    rounds: int = 9


@dataclass(frozen=True)
class Work:
    """What a part cannot but do in a step.

    Args:
        flops: multiplies and adds counted apart.
        n_bytes: read and written, each array once in each of forward and backward that needs it.
        array_bytes: of its largest arrays in use at once: what would have to fit in a cache.
    """

    flops: float
    n_bytes: float
    array_bytes: float

    def bound_s(self, threads: int) -> float:
        """Return the shortest time on this machine."""
        size = max(2**16, min(2**28, 2 ** round(self.array_bytes).bit_length()))
        return max(self.flops / peak_flops(threads), self.n_bytes / bytes_per_s(size, threads))


def linear_work(fan_in: int, fan_out: int, n_live: int, tokens: int) -> Work:
    """Return the work of one linear layer, AdamW's step included: forward x -> y, backward (x, dy) -> dx, dw.

    Args:
        fan_in, fan_out: the layer's shape.
        n_live: its live weights.
        tokens: of a step.
    """
    activations = FLOAT * tokens * ((fan_in + fan_out) + (fan_in + fan_out + fan_in))
    weights = FLOAT * n_live * (1 + 1 + ADAMW_PASSES)
    return Work(6 * n_live * tokens, activations + weights, FLOAT * (tokens * (fan_in + fan_out) + 4 * n_live))


def attention_work(width: int, batch_seqs: int, context_tokens: int) -> Work:
    """Return the work of one block's attention: its products for half the pairs (causal), backward twice forward.

    Arrays of [tokens, width]: forward q, k, v -> o; backward q, k, v, o, do -> dq, dk, dv.
    """
    array = FLOAT * batch_seqs * context_tokens * width
    flops = 3 * (4 * batch_seqs * context_tokens**2 * width) / 2
    return Work(flops, 12 * array, 8 * array)


def elementwise_work(width: int, d_ffn: int, tokens: int) -> Work:
    """Return the work of one block's norms, GELU and residual sums. FLOPs are left out: they cost less than the bytes.

    A norm and GELU read and write once forward, and read two arrays and write one backward; a sum reads two and writes one,
    forward and (where the branches' gradients meet) backward.
    """
    array, inner = FLOAT * tokens * width, FLOAT * tokens * d_ffn
    return Work(0, 2 * 5 * array + 5 * inner + 2 * 6 * array, 3 * max(array, inner))


def attention_step(width: int, d_head: int, batch_seqs: int, context_tokens: int) -> Callable[[], None]:
    """Return a function that runs one block's attention forward and backward, from qkv to what enters the output projection."""
    qkv = torch.randn(batch_seqs, context_tokens, 3 * width, requires_grad=True)
    grad = torch.randn(batch_seqs, context_tokens, width)

    def run() -> None:
        q, k, v = qkv.view(batch_seqs, context_tokens, 3, width // d_head, d_head).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / d_head)
        torch.autograd.backward(y.transpose(1, 2).reshape(batch_seqs, context_tokens, width), grad)
        qkv.grad = None

    return run


def elementwise_step(width: int, d_ffn: int, batch_seqs: int, context_tokens: int) -> Callable[[], None]:
    """Return a function that runs one block's norms, GELU and residual sums forward and backward."""
    shape = (batch_seqs, context_tokens)
    x, attended, projected = (torch.randn(*shape, width, requires_grad=True) for _ in range(3))
    hidden = torch.randn(*shape, d_ffn, requires_grad=True)
    norms = [nn.LayerNorm(width, bias=False) for _ in range(2)]
    grads = [torch.randn(*shape, n) for n in (width, width, d_ffn, width)]

    def run() -> None:
        after = x + attended
        torch.autograd.backward([norms[0](x), norms[1](after), F.gelu(hidden), after + projected], grads)
        for leaf in (x, attended, projected, hidden, *(norm.weight for norm in norms)):
            leaf.grad = None

    return run


def linear_steps(trainer: Trainer, batch: tuple[int, int]) -> list[Callable[[], None]]:
    """Return a function for each sparse layer of the first block: forward, both gradients, AdamW's step.

    Args:
        trainer: whose layers are timed, in the form that it chose for each.
        batch: sequences, and tokens of one.
    """
    steps = []
    for name in sparse_shapes(trainer.cell):
        if name.startswith("blocks.0."):
            layer = trainer.model.get_submodule(name)
            up = trainer.model.get_submodule("blocks.0.mlp.up")
            hands_over = isinstance(up, CompactLinear) and up.feature_major
            link = {"up": "out", "down": "in"}.get(name.rpartition(".")[2], "none") if hands_over else "none"
            steps.append(training_step(layer, batch, "cpu", link))
    return steps


def measure(setting: Setting, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return a row for each shape: milliseconds a step of each part and of the whole, bounds, and state against the first's.

    Args:
        setting: what to measure.
        say: told what is measured now.
    """
    prepare_process(setting.threads)
    words = [*SHAPE, f"model.context_tokens={setting.context_tokens}", f"train.batch_seqs={setting.batch_seqs}"]
    composed = settings([*words, "train.steps=2000"])
    plain = composed.cell_plain()
    runtime = decode(RuntimeConfig, {**composed.plain["runtime"], "threads": setting.threads, "device": "cpu"})
    rows: list[dict[str, Any]] = []
    for width, one_in in setting.shapes:
        say(f"width {width}, density 1/{one_in}, {setting.threads} thread(s)")
        model = {**plain["model"], "width": width}
        row = _row(decode(CellConfig, {**plain, "density": 1 / one_in, "model": model}), runtime, setting)
        state_x = row["state_bytes"] / (rows[0] if rows else row)["state_bytes"]
        rows.append({"width": width, "one_in": one_in, "threads": setting.threads, **row, "state_x": state_x})
    return rows


def _row(cell: CellConfig, runtime: RuntimeConfig, setting: Setting) -> dict[str, Any]:
    trainer, corpus, at = Trainer(cell, runtime, torch.device("cpu"), None), load_corpus(cell.data), 0

    def whole() -> None:
        nonlocal at
        float(trainer.step(corpus, at)[0])
        at += 1

    whole()  # makes the moments
    layers = {name: trainer.model.get_submodule(name) for name in sparse_shapes(cell)}
    state_bytes = training_bytes(layers.values(), trainer.optimizer)
    width, d_ffn, batch = cell.model.width, cell.model.d_ffn, (setting.batch_seqs, setting.context_tokens)
    tokens, n_layer = batch[0] * batch[1], cell.model.n_layer
    linears = linear_steps(trainer, batch)
    parts: dict[str, Callable[[], object]] = {
        "linear": lambda: [step() for step in linears],
        "attention": attention_step(width, cell.model.d_head, *batch),
        "elementwise": elementwise_step(width, d_ffn, *batch),
    }
    work = {
        "linear": [linear_work(fan_in, fan_out, n, tokens) for fan_in, fan_out, n in _block_shapes(layers)],
        "attention": [attention_work(width, *batch)],
        "elementwise": [elementwise_work(width, d_ffn, tokens)],
    }
    # the whole step last in each round: its weights are those of the linear layers
    median_s = interleaved_s({**parts, "step": whole}, setting.rounds)
    row: dict[str, Any] = {"step_ms": 1e3 * median_s["step"], "live": sum(n for *_, n in _block_shapes(layers))}
    for name, works in work.items():
        bound_s = sum(each.bound_s(setting.threads) for each in works)
        row[f"{name}_ms"] = 1e3 * n_layer * median_s[name]
        row[f"{name}_bound_ms"] = 1e3 * n_layer * bound_s
        row[f"{name}_of_bound"] = median_s[name] / bound_s
    row["rest_ms"] = row["step_ms"] - sum(row[f"{name}_ms"] for name in work)
    n_compact = sum(isinstance(layer, CompactLinear) for layer in layers.values())
    return {**row, "state_bytes": state_bytes, "state_mib": state_bytes / MIB, "compact": f"{n_compact}/{len(layers)}"}


def _block_shapes(layers: dict[str, nn.Module]) -> list[tuple[int, int, int]]:
    """Return (fan_in, fan_out, live weights) of the first block's layers."""
    found = []
    for name, layer in layers.items():
        if name.startswith("blocks.0."):
            sparse = cast("MaskedLinear | CompactLinear", layer)
            n_live = round(sparse.density * sparse.fan_in * sparse.fan_out)
            found.append((sparse.fan_in, sparse.fan_out, n_live))
    return found
