"""A linear layer that stores its live weights only: values, gradients and moments are [nnz].

The pattern is kept as CSR (row starts, columns) and as the order that sorts it by column. With activations feature-major
[features, tokens], row i of y^T is a sum of rows of x^T picked by the columns of row i: that is torch's embedding_bag. The
gradient to x is the same by the transposed pattern; the gradient to a value is a dot product of two rows. No step makes an
array of the layer's size. Tokens are taken in tiles of about 200, whose features fit in a core's cache: twice as fast as all
at once from width 1024 up.

On a CPU a compiled kernel does the same where it can be built (kernel.py); torch's operators are what always works.

Positions come from `live_positions`, so values lie in row-major order: those of the dense layer's weight[mask].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.kernel import empty_activations, is_by_feature, kernel_product, kernel_takes
from supar_sweep.sparse.linear import named_masks
from supar_sweep.sparse.masks import LivePositions

STANDS_FOR = "weight"
"""The dense parameter whose live entries `values` holds: noise, masks and records go by its name."""

TILE_TOKENS, MIN_TILE_TOKENS, MAX_TILE_TOKENS = 256, 64, 512
"""Tokens computed at once on a CPU: a sequence where its length lies between the last two, else the first."""

_MAX_INT16 = 2**15 - 1


class CompactLinear(nn.Module):
    """y = x W^T + b for a sparse W [fan_out, fan_in] of which only the live entries exist.

    The parameter is `values` [nnz], row-major over the pattern; both start at zero, and `set_pattern` says where the values
    stand. The pattern is int32 (its columns int16 up to fan_in 32768): with AdamW in float32 a live weight takes 22 to 24
    bytes, a dense one 16 and its mask 1. Runs on CPU and CUDA in float32, bfloat16 and float64; inside autocast it computes
    in autocast's type, as F.linear does. Its gradients cannot be differentiated again.

    Args:
        fan_in: inputs, >= 1.
        fan_out: outputs, >= 1.
        n_live: live weights, in [1, fan_in * fan_out].
        bias: whether to add a bias [fan_out].
        feature_major: where the input is [sequences, tokens, fan_in] with 64 to 512 tokens, leave the output as a transposed view
            of [sequences, fan_out, tokens] memory: for a layer whose output goes elementwise into another compact layer,
            which then transposes nothing.
        device, dtype: of the parameters.

    Raises:
        ConfigError: n_live is out of range.
    """

    kernel: bool = True
    """Whether the compiled kernel is used where it can be; `set_kernel` sets it."""

    cols: Tensor
    row_starts: Tensor
    order_t: Tensor
    col_starts: Tensor

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        n_live: int,
        bias: bool = True,
        *,
        feature_major: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= n_live <= min(fan_in * fan_out, 2**31 - 1):
            raise ConfigError("n_live", "out of range", value=n_live, allowed="1 .. fan_in * fan_out, below 2^31")
        self.fan_in, self.fan_out, self.n_live = fan_in, fan_out, n_live
        self.feature_major = feature_major
        self.values = nn.Parameter(torch.zeros(n_live, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(fan_out, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        index = torch.int16 if fan_in - 1 <= _MAX_INT16 else torch.int32
        self.register_buffer("cols", torch.zeros(n_live, dtype=index, device=device))
        self.register_buffer("row_starts", torch.zeros(fan_out + 1, dtype=torch.int32, device=device))
        # the transposed pattern follows from the two above, so a checkpoint need not hold it
        self.register_buffer("order_t", torch.zeros(n_live, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("col_starts", torch.zeros(fan_in + 1, dtype=torch.int32, device=device), persistent=False)
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @property
    def density(self) -> float:
        """The achieved density of the weight, in (0, 1]."""
        return self.n_live / (self.fan_in * self.fan_out)

    def set_pattern(self, live: LivePositions) -> None:
        """Set which weights are live; the values are left as they are, in row-major order.

        Args:
            live: n_live positions of shape (fan_out, fan_in), sorted row-major.

        Raises:
            ConfigError: the positions are of another shape or number, or not sorted.
        """
        shape, flat = (self.fan_out, self.fan_in), live.rows.astype(np.int64) * self.fan_in + live.cols
        if live.shape != shape or flat.size != self.n_live or not bool((np.diff(flat) > 0).all()):
            raise ConfigError(
                "pattern",
                "does not fit its compact layer",
                value=f"{flat.size} positions of {live.shape}",
                allowed=f"{self.n_live} sorted positions of {shape}",
            )
        self.cols.copy_(torch.from_numpy(live.cols.astype(np.int32)))
        self.row_starts.copy_(torch.from_numpy(live.row_starts()))
        self._transpose()

    def live(self) -> LivePositions:
        """Return the positions of the values."""
        rows = _rows(self.row_starts, self.n_live)
        return LivePositions(
            rows.cpu().numpy().astype(np.int32),
            self.cols.cpu().numpy().astype(np.int32),
            (self.fan_out, self.fan_in),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., fan_out].

        Args:
            x: [..., fan_in].
        """
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, values = x.to(dtype), values.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if self.kernel and kernel_takes(x, values, bias):
            by_feature = self.feature_major and x.dim() == 3 and _is_good_size(x.shape[1])
            return kernel_product(x, values, bias, (self.cols, self.row_starts, self.col_starts), by_feature)
        pattern = (self.cols, self.row_starts, self.order_t, self.col_starts)
        return cast(Tensor, _CompactProduct.apply(x, values, bias, pattern, self.feature_major))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return what print(layer) shows between its brackets."""
        return f"{self.fan_in}, {self.fan_out}, n_live={self.n_live}, bias={self.bias is not None}"

    def _transpose(self) -> None:
        """Write the transposed pattern from the pattern."""
        cols = self.cols.int()
        # stable: rows ascend within a column
        self.order_t.copy_(torch.sort(cols, stable=True).indices)
        counts = torch.bincount(cols, minlength=self.fan_in)
        self.col_starts[1:] = counts.cumsum(0)


def named_live(module: nn.Module) -> dict[str, Tensor | LivePositions]:
    """Return weight name (dotted, from `module`) -> its mask or, for a compact layer, its live positions.

    Both forms of one model give the same names and, in `mask_hash`, the same hash.
    """
    found: dict[str, Tensor | LivePositions] = dict(named_masks(module))
    for name, layer in compact_layers(module).items():
        found[f"{name}.{STANDS_FOR}".removeprefix(".")] = layer.live()
    return found


def compact_layers(module: nn.Module) -> dict[str, CompactLinear]:
    """Return dotted name -> compact layer of every one in `module`."""
    return {name: child for name, child in module.named_modules() if isinstance(child, CompactLinear)}


def set_kernel(module: nn.Module, used: bool) -> int:
    """Set whether the compact layers in `module` use the compiled kernel where they can; return how many there are.

    Args:
        module: any module.
        used: False leaves all to torch, bit for bit as where there is no kernel.
    """
    layers = compact_layers(module).values()
    for layer in layers:
        layer.kernel = used
    return len(layers)


Pattern = tuple[Tensor, Tensor, Tensor, Tensor]


class _CompactProduct(torch.autograd.Function):
    """The product and its gradients; each tile is finished, from its transposition to its result's, while it is in the cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, feature_major: bool
    ) -> Tensor:
        cols, row_starts, _, _ = pattern
        indices = cols.int()
        sizes = _tile_sizes(x)
        y, y_parts = _empty_parts(x, row_starts.numel() - 1, sizes, feature_major)
        x_tiles = []
        for x_FT, part_TO in zip(_tiles(x, sizes), y_parts, strict=True):
            y_OT = _bags(x_FT, indices, row_starts, values)
            if bias is not None:
                y_OT += bias[:, None]
            part_TO.copy_(y_OT.t())
            x_tiles.append(x_FT)
        ctx.save_for_backward(values, *pattern, *x_tiles)
        ctx.x_was_tiled = _is_tiled(x, sizes)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        values, cols, row_starts, order_t, col_starts, *x_tiles = ctx.saved_tensors
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        sizes = [tile.shape[1] for tile in x_tiles]
        # made anew in each pass: n_live integers beside n_live * tokens products
        rows = _rows(row_starts, values.numel())
        dots = _Dots(rows, cols.int(), row_starts, col_starts.numel() - 1, values)
        rows_t, values_t = rows[order_t], values[order_t]
        grad_x, x_parts = _empty_parts(grad, col_starts.numel() - 1, sizes, ctx.x_was_tiled)
        for grad_OT, x_FT, part_TF in zip(_tiles(grad, sizes), x_tiles, x_parts, strict=True):
            if needs_values:
                dots.add(grad_OT, x_FT)
            if needs_x:
                part_TF.copy_(_bags(grad_OT, rows_t, col_starts, values_t).t())
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
        return grad_x if needs_x else None, dots.total() if needs_values else None, grad_bias, None, None


def _bags(table: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return [bags, tokens]: bag i = sum over k in [starts[i], starts[i + 1]) of weights[k] * table[indices[k]]."""
    out: Tensor = torch.embedding_bag(table, indices, starts, False, 0, False, weights, True)[0]
    return out


class _Dots:
    """Sums over tiles of grad[row] . x[col] for each live (row, col): the gradient [nnz] to the values.

    Args:
        rows, cols: [nnz] int32.
        row_starts: [fan_out + 1] int32.
        fan_in: of the layer.
        values: [nnz], whose gradient it is.
    """

    def __init__(self, rows: Tensor, cols: Tensor, row_starts: Tensor, fan_in: int, values: Tensor) -> None:
        self._pattern = (cols, row_starts, rows)
        self._dtype = values.dtype
        self._sampled: Tensor | None = None
        if _sampled_product_works(values.device.type, values.dtype):
            shape = (row_starts.numel() - 1, fan_in)
            self._sampled = torch.sparse_csr_tensor(row_starts, cols, torch.zeros_like(values), shape)
        else:
            # bfloat16: sums over tiles would lose digits in their own type
            self._sums = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))

    def add(self, grad_OT: Tensor, x_FT: Tensor) -> None:
        """Add one tile."""
        if self._sampled is not None:
            torch.sparse.sampled_addmm(self._sampled, grad_OT, x_FT.t(), out=self._sampled)
        else:
            self._sums += torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_OT, x_FT, *self._pattern, 0, -1
            )

    def total(self) -> Tensor:
        """Return the sums [nnz]."""
        return self._sums.to(self._dtype) if self._sampled is None else self._sampled.values()


@lru_cache(maxsize=16)
def _sampled_product_works(device: str, dtype: torch.dtype) -> bool:
    """Return whether torch's sampled product runs here: 1.6 times as fast as embedding_bag's backward, but not in every
    build and type.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CSR tensors announce, once a process, that they are in beta
            starts, cols = (torch.tensor(part, dtype=torch.int32, device=device) for part in ([0, 1, 2], [1, 0]))
            a, b = (torch.arange(4.0, device=device, dtype=dtype).view(2, 2) + shift for shift in (0, 4))
            out = torch.sparse_csr_tensor(starts, cols, torch.ones(2, device=device, dtype=dtype), (2, 2))
            torch.sparse.sampled_addmm(out, a, b, out=out)
            return bool(torch.equal(out.values(), 1 + (a @ b)[[0, 1], [1, 0]]))
    except (RuntimeError, NotImplementedError):
        return False


def _rows(row_starts: Tensor, n_live: int) -> Tensor:
    return torch.repeat_interleave(row_starts.diff(), output_size=n_live)


def _tile_sizes(x: Tensor) -> list[int]:
    """Return the tokens of each tile of x [..., features]: sequences if these have a good size, so that neighbouring layers cut
    alike.
    """
    n_tokens = math.prod(x.shape[:-1])
    if x.device.type != "cpu":
        size = max(1, n_tokens)  # no cache to fit in, and launches for each tile
    elif x.dim() == 3 and _is_good_size(x.shape[1]):
        size = x.shape[1]
    else:
        size = TILE_TOKENS
    return [min(size, n_tokens - start) for start in range(0, n_tokens, size)]


def _is_good_size(tokens: int) -> bool:
    return MIN_TILE_TOKENS <= tokens <= MAX_TILE_TOKENS


def _is_tiled(x: Tensor, sizes: list[int]) -> bool:
    """Return whether x [..., features] lies in memory as tiles [features, tokens] of these sizes, each a sequence."""
    return is_by_feature(x) and _are_sequences(x, sizes)


def _are_sequences(x: Tensor, sizes: list[int]) -> bool:
    return x.dim() == 3 and sizes == [x.shape[1]] * x.shape[0]


def _tiles(x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Yield x [..., features] in tiles [features, tokens], each contiguous; without a copy where it lies in memory like that."""
    if _is_tiled(x, sizes):
        yield from x.transpose(1, 2).unbind(0)
        return
    x_TF, start = x.reshape(-1, x.shape[-1]), 0
    for size in sizes:
        yield x_TF[start : start + size].t().contiguous()
        start += size


def _empty_parts(like: Tensor, n_features: int, sizes: list[int], tiled: bool) -> tuple[Tensor, list[Tensor]]:
    """Return an empty [..., n_features] with the leading dimensions of `like`, and its tiles' parts [tokens, n_features].

    Args:
        like: gives leading dimensions, type and device.
        n_features: last dimension.
        sizes: tokens of each tile.
        tiled: lay it out in memory as tiles [n_features, tokens] if these are sequences, else contiguously.
    """
    tiled = tiled and _are_sequences(like, sizes)
    out = empty_activations(like, n_features, tiled)
    if tiled:
        return out, list(out.unbind(0))
    return out, list(torch.split(out.view(-1, n_features), sizes)) if sizes else []


def _after_load(module: nn.Module, incompatible_keys: object) -> None:
    cast(CompactLinear, module)._transpose()
