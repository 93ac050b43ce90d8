"""How a weight is stored: which axes of a tensor are a matrix's outputs, which its inputs, which count matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.linear import MaskedLinear

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A tensor's axes in order: those that count matrices, then outputs and inputs, or inputs and outputs.

    A tensor [E, out, in] is E matrices [out, in], each with noise, a mask and a number of live weights of its own.

    Args:
        n_counting: leading axes that count matrices.
        cut: the axis at which the inputs begin; the outputs, if these are stored last.
        inputs_first: whether the inputs are stored before the outputs.
    """

    n_counting: int
    cut: int
    inputs_first: bool = False

    def sizes(self, shape: Shape) -> tuple[int, int, int]:
        """Return (number of matrices, fan_out, fan_in) of a tensor of this shape."""
        first, second = math.prod(shape[self.n_counting : self.cut]), math.prod(shape[self.cut :])
        fan_out, fan_in = (second, first) if self.inputs_first else (first, second)
        return math.prod(shape[: self.n_counting]), fan_out, fan_in

    def tensor(self, matrices: Sequence[Tensor], shape: Shape) -> Tensor:
        """Return the tensor of this shape that holds the matrices, each [fan_out, fan_in]."""
        stacked = matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))
        return (stacked.transpose(1, 2) if self.inputs_first else stacked).reshape(shape)


VECTOR = Layout(0, 0)  # n elements are [1, n]
MATRIX = Layout(0, 1)  # [out, ...in]
TRANSPOSED = Layout(0, 1, inputs_first=True)  # [in, ...out]


class _Owner(NamedTuple):
    """How one kind of owner stores its weights.

    Args:
        fits: whether a module with a weight of this shape is of the kind.
        layout: of the weight; None where it cannot be known.
        problem: why not, after the owner's name.
        certain: whether a fan_in that says otherwise is a mistake.
    """

    fits: Callable[[nn.Module, Shape], bool]
    layout: Layout | None
    problem: str = ""
    certain: bool = False


def _is_gpt2_conv1d(owner: nn.Module, shape: Shape) -> bool:
    # by name, so that transformers need not be imported, nor installed: copies of the class keep name and attribute
    names = {kind.__name__ for kind in type(owner).__mro__}
    return "Conv1D" in names and len(shape) == 2 and getattr(owner, "nf", None) == shape[1]


# the first that fits holds
_OWNERS: tuple[_Owner, ...] = (
    _Owner(lambda owner, shape: len(shape) < 2, VECTOR),
    _Owner(
        lambda owner, shape: bool(getattr(owner, "transposed", False)),
        None,
        "stores its weight input first, so its fan_in is not at hand",
    ),
    _Owner(_is_gpt2_conv1d, TRANSPOSED, certain=True),
    _Owner(lambda owner, shape: isinstance(owner, (nn.Linear, MaskedLinear, CompactLinear)), MATRIX, certain=True),
    _Owner(lambda owner, shape: isinstance(owner, _ConvNd), MATRIX, certain=True),
    # ASSUMPTION: what else has two axes is used as torch.nn.functional.linear uses it
    _Owner(lambda owner, shape: len(shape) == 2, MATRIX),
    _Owner(
        lambda owner, shape: isinstance(owner, nn.Bilinear),
        None,
        "sums over pairs of inputs, so which of the two grows with width cannot be known",
    ),
    _Owner(
        lambda owner, shape: True, None, "is not a known kind of layer, so which axes are its inputs cannot be known"
    ),
)


def layout_of(name: str, owner: nn.Module, shape: Shape, fan_in: int | None, fan_out: int | None) -> Layout | None:
    """Return how a weight is stored; None where that cannot be known.

    Args:
        name: of the weight, for errors.
        owner: the module that holds it.
        shape: of the tensor.
        fan_in, fan_out: as tagged; None where the tag leaves them out.

    Raises:
        ConfigError: the tagged numbers do not fit the tensor, or its owner is known to store it otherwise.
    """
    known = _kind(owner, shape)
    if fan_in is None:
        return known.layout
    if known.certain and known.layout is not None:
        _, own_out, own_in = known.layout.sizes(shape)
        if fan_in != own_in or fan_out not in (None, own_out):
            raise ConfigError(
                name,
                f"{type(owner).__name__} of shape {shape} has fan_in {own_in} and fan_out {own_out}",
                value=f"fan_in={fan_in}" + ("" if fan_out is None else f", fan_out={fan_out}"),
                allowed="these, or no fan_in",
            )
        return known.layout
    likely = [TRANSPOSED] if getattr(owner, "transposed", False) else []
    found = [layout for layout in likely + _layouts(len(shape)) if _fits(layout.sizes(shape), fan_in, fan_out)]
    if not found:
        wanted = f"fan_in={fan_in}" if fan_out is None else f"fan_in={fan_in}, fan_out={fan_out}"
        raise ConfigError(
            name,
            f"has no such axes in its shape {shape}",
            value=wanted,
            allowed="[..., out, in] or [..., in, out]: fan_in, and fan_out beside it, products of neighbouring axes",
        )
    return found[0]


def refusal(name: str, owner: nn.Module, shape: Shape) -> ConfigError:
    """Return the error for a weight whose layout cannot be known.

    Args:
        name: of the weight.
        owner: the module that holds it.
        shape: of the tensor.
    """
    return ConfigError(
        name,
        f"{type(owner).__name__} {_kind(owner, shape).problem} (shape {shape})",
        allowed="its fan_in by hand: supar_sweep.tag(..., fan_in=..., base_fan_in=...), and fan_out= where several axes are "
        "outputs",
    )


def _kind(owner: nn.Module, shape: Shape) -> _Owner:
    return next(kind for kind in _OWNERS if kind.fits(owner, shape))


def _fits(sizes: tuple[int, int, int], fan_in: int, fan_out: int | None) -> bool:
    return sizes[2] == fan_in and fan_out in (None, sizes[1])


def _layouts(n_axes: int) -> list[Layout]:
    """Return every layout of a tensor, the likeliest first: [..., out, in] before [..., in, out], few axes as outputs."""
    layouts = [
        Layout(n_counting, cut, inputs_first)
        for inputs_first in (False, True)
        for n_counting in range(n_axes)
        for cut in range(n_counting + 1, n_axes)
    ]

    def n_outputs(layout: Layout) -> int:
        return n_axes - layout.cut if layout.inputs_first else layout.cut - layout.n_counting

    return sorted(layouts, key=lambda layout: (layout.inputs_first, n_outputs(layout)))
