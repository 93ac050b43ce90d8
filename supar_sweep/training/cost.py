"""What a cell costs, from its settings alone: parameters, FLOPs, memory. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from supar_sweep.config.schema import CellConfig
from supar_sweep.sparse.density import live_counts

BYTES = {"float32": 4, "bfloat16": 4, "float64": 8}
"""Of a weight: bfloat16 is autocast's, so weights, gradients and moments stay float32."""

COMPACT_FLOPS_MULT = 3.0
"""Time of a FLOP on a live weight of a compact layer over that of a dense matmul, with the compiled kernel: 2.5 at density 1/4,
3 at 1/16, 3.7 at 1/64 (docs/benchmarks.md); about twice that without it. It orders cells and weighs the ETA, no more.
"""

WORTH_STACKING_FLOPS = {"cpu": 2e9, "cuda": 1e12}
"""A step above this is no faster for sharing its forward pass. Measured on a CPU: 1.16x at .35e9 FLOPs, 1.04x at 1.3e9,
1.00x at 5e9. ASSUMPTION on a GPU, where none was at hand.
"""

FLOPS_A_THREAD = 2e9
"""A further thread is worth having for every so many FLOPs of a step."""

MOST_TOGETHER = {"cpu": 8, "cuda": 32}
"""Nearly all of the gain is there with 4 to 8 on a CPU. ASSUMPTION on a GPU."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Args:
        total: all, dead ones included.
        live: those that train.
        sparse_total: of the layers that carry masks, all.
        sparse_live: of these, the live ones.
    """

    total: int
    live: int
    sparse_total: int
    sparse_live: int


def sparse_shapes(cell: CellConfig) -> dict[str, tuple[int, int]]:
    """Return layer -> (fan_out, fan_in) of the GPT's layers that carry masks.

    Args:
        cell: the cell.
    """
    model = cell.model
    inner = 2 * model.d_ffn if model.activation == "swiglu" else model.d_ffn
    block = {
        "attention.qkv": (3 * model.width, model.width),
        "attention.out": (model.width, model.width),
        "mlp.up": (inner, model.width),
        "mlp.down": (model.width, model.d_ffn),
    }
    return {f"blocks.{index}.{name}": shape for index in range(model.n_layer) for name, shape in block.items()}


def count_parameters(cell: CellConfig) -> ParameterCount:
    """Return the parameters of the cell's GPT.

    Args:
        cell: the cell.

    Raises:
        ConfigError: a density that leaves a layer without a live weight.
    """
    model = cell.model
    shapes = sparse_shapes(cell)
    sparse_total = sum(rows * columns for rows, columns in shapes.values())
    sparse_live = sum(live_counts(cell.layer_density, shapes, cell.density).values())
    tables = 1 if model.tied_head else 2
    dense = tables * cell.data.n_vocab * model.width
    if model.position == "learned":
        dense += model.context_tokens * model.width
    dense += (2 * model.n_layer + 1) * model.width * (2 if model.bias else 1)
    if model.bias:
        dense += sum(rows for rows, _ in shapes.values())
    return ParameterCount(dense + sparse_total, dense + sparse_live, sparse_total, sparse_live)


def flops_per_token(cell: CellConfig, *, dense_compute: bool = False, steps_done: int | None = None) -> int:
    """Return the training FLOPs a token: forward and backward, multiply and add counted apart.

        6 * (weights in matmuls) + 12 * n_layer * width * context_tokens

    Weights in matmuls are the live hidden ones and the head's; the tables are looked up, not
    multiplied. Norms, activations and the optimizer are left out, and attention is counted in
    full, not halved for its causal mask, as is customary. Where masks are pruned in training, the live weights are
    the mean over the steps; RigL's gradients of dead weights, at its updates only, are left out.

    Args:
        cell: the cell.
        dense_compute: count dead weights too, as a dense matmul computes them.
        steps_done: the mean is over so many steps, >= 1; default: the whole run.

    Raises:
        ConfigError: a density that leaves a layer without a live weight.

    Source: Chowdhery et al. 2022, PaLM (arXiv:2204.02311), appendix B: 6 N + 12 L H Q T.
    """
    model, count = cell.model, count_parameters(cell)
    hidden = count.sparse_total if dense_compute else count.sparse_live
    schedule = cell.mask_schedule()
    if schedule is not None and not dense_compute:
        hidden += round((count.sparse_total - hidden) * schedule.mean_excess(max(1, steps_done or cell.train.steps)))
    matmul = hidden + cell.data.n_vocab * model.width
    return 6 * matmul + 12 * model.n_layer * model.width * model.context_tokens


def flops_per_step(cell: CellConfig, *, dense_compute: bool = False) -> int:
    """Return the training FLOPs an optimizer step: `flops_per_token` times batch_seqs *
    context_tokens.

    Args:
        cell, dense_compute: as for `flops_per_token`, which also says what is raised.
    """
    tokens = cell.train.batch_seqs * cell.model.context_tokens
    return tokens * flops_per_token(cell, dense_compute=dense_compute)


def relative_cost(cell: CellConfig, *, compact: bool) -> float:
    """Return what a whole run costs beside other cells: its training FLOPs, live ones weighed by what they cost in compact form.

    Args:
        cell: the cell.
        compact: layers may be computed in compact form where that is faster.

    Raises:
        ConfigError: a density that leaves a layer without a live weight.
    """
    dense = flops_per_step(cell, dense_compute=True)
    if not compact or cell.mask_schedule() is not None:
        return float(cell.train.steps * dense)
    hidden = 6 * cell.train.batch_seqs * cell.model.context_tokens * count_parameters(cell).sparse_total
    live = flops_per_step(cell) - (dense - hidden)
    return float(cell.train.steps * (dense - hidden + min(hidden, COMPACT_FLOPS_MULT * live)))


def most_together(cell: CellConfig, *, device: str, free_gb: float) -> int:
    """Return how many cells of this shape are worth training together in one process, >= 1; the process finds out how many of
    them share a forward pass.

    Args:
        cell: one of them.
        device: "cpu" or "cuda".
        free_gb: memory that the process may use.

    Raises:
        ConfigError: a density that leaves a layer without a live weight.
    """
    if flops_per_step(cell, dense_compute=True) > WORTH_STACKING_FLOPS[device]:
        return 1
    # on a GPU weights are stacked too. ASSUMPTION: half as much again
    each_gb = memory_gb(cell) * (1.5 if device == "cuda" else 1.0)
    return max(1, int(min(MOST_TOGETHER[device], free_gb / each_gb)))


def threads_for(cell: CellConfig, free_cores: int) -> int:
    """Return how many threads to train one cell with where so many cores have nothing else to do, >= 1.

    Args:
        cell: the cell.
        free_cores: cores for this cell.
    """
    return max(1, min(free_cores, int(flops_per_step(cell) / FLOPS_A_THREAD)))


def memory_gb(cell: CellConfig, *, compact: bool = False) -> float:
    """Return an estimate of the peak memory of training, in units of 1e9 bytes, without the
    libraries' own.

    Weights, gradients and the optimizer's moments (AdamW 2, SGD 1 or, without momentum, 0), a byte
    a mask entry (compact: these for live weights only, and their pattern), and
    what the forward pass of one micro-batch keeps for the backward.

    ASSUMPTION: a block keeps about 8 * width + 3 * (MLP inner width) numbers a token, and the loss
    3 * vocabulary; measured values lie within a factor of 2 above a few MB.

    Args:
        cell: the cell.
        compact: every sparse layer stores its live weights only (none does at density 1).

    Raises:
        ConfigError: a density that leaves a layer without a live weight.
    """
    model, count = cell.model, count_parameters(cell)
    size = BYTES[cell.train.precision]
    moments = 2 if cell.optimizer.name == "adamw" else int(bool(cell.optimizer.momentum))
    state = size * count.total * (2 + moments)
    masks = count.sparse_total if cell.density < 1 else 0
    if cell.mask_schedule() is not None:
        if cell.optimizer.name == "adamw" and cell.sparsity.method != "gmp":
            masks += size * count.sparse_total  # each weight's own step count
    elif compact and cell.density < 1:
        shapes = sparse_shapes(cell)
        live = live_counts(cell.layer_density, shapes, cell.density)
        state = size * (count.total - count.sparse_total) * (2 + moments)
        masks = sum(
            compact_layer_bytes(fan_out, fan_in, live[name], moments=moments, value_bytes=size)
            for name, (fan_out, fan_in) in shapes.items()
        )
    inner = 2 * model.d_ffn if model.activation == "swiglu" else model.d_ffn
    per_token = model.n_layer * (8 * model.width + 3 * inner) + 3 * cell.data.n_vocab
    micro_tokens = cell.train.batch_seqs // cell.train.accumulation_steps * model.context_tokens
    return (state + masks + size * per_token * micro_tokens) / 1e9


def compact_layer_bytes(fan_out: int, fan_in: int, n_live: int, *, moments: int = 2, value_bytes: int = 4) -> int:
    """Return the bytes that a compact layer keeps between steps, with its gradient.

        n_live * (value_bytes * (2 + moments) + column + 4) + 4 * (fan_out + 1 + fan_in + 1)

    A column takes 2 bytes up to fan_in 32768, else 4; the pattern's other 4 are its order by columns.

    Args:
        fan_out, fan_in: the layer's shape.
        n_live: its live weights.
        moments: numbers that the optimizer keeps for a weight: AdamW 2, SGD with momentum 1.
        value_bytes: of one weight.
    """
    column = 2 if fan_in <= 2**15 else 4
    return n_live * (value_bytes * (2 + moments) + column + 4) + 4 * (fan_out + fan_in + 2)
