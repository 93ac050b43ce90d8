"""The compiled product of a compact layer on a CPU: used where it can be built, never needed.

It gives what `_CompactProduct` (compact.py) gives, to rounding, three to four times as fast. Bits do not depend on the number of
threads. No OpenMP, which torch brings in a copy of its own: threads are started for a call, and none for small ones.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.kernel_build import BuildError, built_kernel

SWITCH = "SUPAR_KERNEL"
"""Environment variable: "off" leaves all to torch, "auto" (as if unset) uses the kernel where it can be built."""

DTYPES = (torch.float32, torch.float64)

MAX_ERROR = {torch.float32: 1e-5, torch.float64: 1e-13}
"""Relative, against a dense product in float64: a kernel off by more is not used."""

_THREADED_PRODUCTS = 2**22
"""Live weights * tokens from which on more threads than one are worth starting: 20 us each against .1 ms of work."""


@dataclass(frozen=True)
class KernelChoice:
    """Whether compact layers run the compiled kernel, and why.

    Args:
        used: whether they do.
        reason: one line for the log.
    """

    used: bool
    reason: str


@dataclass(frozen=True)
class _Library:
    forward: dict[torch.dtype, Callable[..., None]]
    backward: dict[torch.dtype, Callable[..., None]]
    tile_bytes: int


def choose_kernel(device: torch.device | str, dtype: torch.dtype = torch.float32) -> KernelChoice:
    """Return whether compact layers on `device` that compute in `dtype` run the kernel; the first call may build it.

    A run that must continue exactly stores the answer and sets it again (`set_kernel` in compact.py).

    Args:
        device: where the model runs.
        dtype: the type that the layers compute in.

    Raises:
        ConfigError: the environment variable SUPAR_KERNEL is neither "auto" nor "off".
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return KernelChoice(False, f"device is {kind}, not the CPU")
    if dtype not in DTYPES:
        return KernelChoice(False, f"{str(dtype).removeprefix('torch.')} is torch's own business")
    library, reason = _library()
    return KernelChoice(library is not None, reason)


def kernel_takes(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Return whether `kernel_product` can compute this product here.

    Args:
        x: [..., fan_in].
        values: [nnz].
        bias: [fan_out] or None.
    """
    parts = (x, values) if bias is None else (x, values, bias)
    if x.dtype not in DTYPES or any(part.device.type != "cpu" or part.dtype != x.dtype for part in parts):
        return False
    return x.numel() > 0 and not torch.compiler.is_compiling() and _library()[0] is not None


def kernel_product(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: tuple[Tensor, Tensor, Tensor], by_feature: bool
) -> Tensor:
    """Return y [..., fan_out] = x W^T + b; `kernel_takes` has said yes.

    Args:
        x: [..., fan_in]; read as it lies if it is contiguous or a transposed view of [sequences, fan_in, tokens].
        values: [nnz], row-major.
        bias: [fan_out] or None.
        pattern: columns [nnz] int16 or int32, row starts [fan_out + 1] and column starts [fan_in + 1] int32; all contiguous.
        by_feature: x is [sequences, tokens, fan_in], and y is to be a transposed view of [sequences, fan_out, tokens].
    """
    return cast(Tensor, _KernelProduct.apply(x, values, bias, pattern, by_feature))  # type: ignore[no-untyped-call]


class _KernelProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: tuple[Tensor, Tensor, Tensor],
        by_feature: bool,
    ) -> Tensor:
        library = _loaded()
        cols, row_starts, col_starts = pattern
        # names of their own: what the kernel reads must live until it returns
        x, values = _readable(x), values.contiguous()
        bias = None if bias is None else bias.contiguous()
        fan_in, fan_out = x.shape[-1], row_starts.numel() - 1
        batch = _batch(x, by_feature or is_by_feature(x))
        threads = _threads(x, values)
        y = empty_activations(x, fan_out, by_feature)
        scratch = x.new_empty(threads * fan_in * library.tile_bytes // x.element_size())
        library.forward[x.dtype](
            *(x.data_ptr(), is_by_feature(x), y.data_ptr(), by_feature, *batch, fan_in, fan_out),
            *(cols.data_ptr(), cols.element_size(), row_starts.data_ptr(), values.data_ptr()),
            *(_address(bias), threads, scratch.data_ptr()),
        )
        ctx.save_for_backward(x, values, cols, row_starts, col_starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        library = _loaded()
        x, values, cols, row_starts, col_starts = ctx.saved_tensors
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        grad = _readable(grad)
        fan_in, fan_out = x.shape[-1], grad.shape[-1]
        batch = _batch(x, is_by_feature(x) or is_by_feature(grad))
        threads, tile_tokens = _threads(x, values), library.tile_bytes // x.element_size()
        grad_x = empty_activations(x, fan_in, is_by_feature(x)) if needs_x else None
        grad_values = torch.empty_like(values) if needs_values else None
        grad_bias = values.new_empty(fan_out) if needs_bias else None
        n_tiles = batch[0] * -(-batch[1] // tile_tokens) if threads > 1 else 1
        floats = [values.new_empty(size) for size in (n_tiles * fan_out * tile_tokens, values.numel(), values.numel())]
        integers = [row_starts.new_empty(size) for size in (values.numel(), fan_in)]
        library.backward[x.dtype](
            *(grad.data_ptr(), is_by_feature(grad), x.data_ptr(), is_by_feature(x), _address(grad_x)),
            *(*batch, fan_in, fan_out, cols.data_ptr(), cols.element_size()),
            *(row_starts.data_ptr(), col_starts.data_ptr(), values.data_ptr()),
            *(_address(grad_values), _address(grad_bias), threads),
            *(part.data_ptr() for part in (*floats, *integers)),
        )
        return grad_x, grad_values, grad_bias, None, None


def is_by_feature(x: Tensor) -> bool:
    """Return whether x lies in memory as [sequences, features, tokens].

    Args:
        x: [..., features]; where it is not [sequences, tokens, features], it does not.
    """
    return x.dim() == 3 and not x.is_contiguous() and x.mT.is_contiguous()


def _readable(x: Tensor) -> Tensor:
    return x if is_by_feature(x) else x.contiguous()


def _batch(x: Tensor, as_sequences: bool) -> tuple[int, int]:
    """Return sequences and tokens: where nothing is cut at a sequence's end, all tokens are one."""
    return (x.shape[0], x.shape[1]) if as_sequences else (1, math.prod(x.shape[:-1]))


def empty_activations(like: Tensor, n_features: int, by_feature: bool) -> Tensor:
    """Return an empty [..., n_features], contiguous or a transposed view of [sequences, n_features, tokens].

    Args:
        like: gives leading dimensions, type and device.
        n_features: last dimension.
        by_feature: the second of the two; `like` has three dimensions.
    """
    if by_feature:
        return like.new_empty(like.shape[0], n_features, like.shape[1]).mT
    return like.new_empty(*like.shape[:-1], n_features)


def _threads(x: Tensor, values: Tensor) -> int:
    n_tokens = x.numel() // x.shape[-1]
    return torch.get_num_threads() if values.numel() * n_tokens >= _THREADED_PRODUCTS else 1


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _loaded() -> _Library:
    library, reason = _library()
    assert library is not None, reason
    return library


@lru_cache(maxsize=1)
def _library() -> tuple[_Library | None, str]:
    """Return the kernel, built if need be and checked, or None; and one line on it."""
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "off"):
        raise ConfigError(
            SWITCH, "unknown environment setting", value=switch, allowed=("auto", "off"), nearest_to=switch
        )
    if switch == "off":
        return None, f"switched off by {SWITCH}=off"
    try:
        file, compiler = built_kernel()
        library = _bind(ctypes.CDLL(str(file)))
    except (BuildError, OSError, AttributeError) as problem:
        reason = str(problem).partition("\n")[0]
        return None, f"no compiled kernel: {reason}"
    for dtype, allowed in MAX_ERROR.items():
        error = _error(library, dtype)
        if not error < allowed:
            return None, f"the compiled kernel is wrong here: relative error {error:.1e} in {dtype}"
    return library, f"compiled by {compiler}"


def _bind(found: ctypes.CDLL) -> _Library:
    """Return the library's functions with their signatures.

    Raises:
        AttributeError: it lacks one.
    """
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    shapes: dict[str, list[Any]] = {
        "forward": [pointer, number, pointer, number, *[number] * 4, pointer, number, *[pointer] * 3, number, pointer],
        "backward": [
            *(pointer, number, pointer, number, pointer, *[number] * 4, pointer, number),
            *([pointer] * 5),
            *(number, *[pointer] * 5),
        ],
    }
    functions: dict[str, dict[torch.dtype, Callable[..., None]]] = {"forward": {}, "backward": {}}
    for way, arguments in shapes.items():
        for dtype in DTYPES:
            function = found[f"supar_{way}_{str(dtype).removeprefix('torch.')}"]
            function.argtypes, function.restype = arguments, None
            functions[way][dtype] = function
    found.supar_tile_bytes.restype = number
    return _Library(functions["forward"], functions["backward"], int(found.supar_tile_bytes()))


def _error(library: _Library, dtype: torch.dtype) -> float:
    """Return the largest relative error of a small layer's output and gradients against a dense product in float64."""
    # tokens and features off the vector width, rows with every number of live weights
    n_tokens, fan_in, fan_out = 83, 37, 19
    row, col = (torch.arange(size, dtype=torch.int32) for size in (fan_out, fan_in))
    live = (row[:, None] * 7 + col * 5) % 11 < row[:, None] % 9
    size = torch.Size((n_tokens, fan_in))
    x, weight, grad = (
        torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7).view(shape)
        for shape in (size, live.shape, torch.Size((n_tokens, fan_out)))
    )
    bias = grad[0].clone()
    wanted = [x @ (weight * live).t() + bias, grad @ (weight * live), (grad.t() @ x)[live]]
    starts, starts_t = (
        torch.cat((torch.zeros(1, dtype=torch.int32), live.sum(dim).cumsum(0, dtype=torch.int32))) for dim in (1, 0)
    )
    cols, n_live = col.expand_as(live)[live].contiguous(), int(live.sum())
    tile_tokens = library.tile_bytes // dtype.itemsize
    x, values, bias, grad = (part.to(dtype) for part in (x, weight[live], bias, grad))
    got = [torch.zeros_like(part, dtype=dtype) for part in wanted]
    floats = [torch.empty(size, dtype=dtype) for size in (fan_out * tile_tokens, n_live, n_live, fan_in * tile_tokens)]
    integers = [torch.empty(size, dtype=torch.int32) for size in (n_live, fan_in)]
    shape = (1, n_tokens, fan_in, fan_out, cols.data_ptr(), cols.element_size(), starts.data_ptr())
    library.forward[dtype](
        *(x.data_ptr(), False, got[0].data_ptr(), False, *shape),
        *(values.data_ptr(), bias.data_ptr(), 1, floats[3].data_ptr()),
    )
    library.backward[dtype](
        *(grad.data_ptr(), False, x.data_ptr(), False, got[1].data_ptr(), *shape, starts_t.data_ptr()),
        *(values.data_ptr(), got[2].data_ptr(), None, 1),
        *(part.data_ptr() for part in (*floats[:3], *integers)),
    )
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True))
