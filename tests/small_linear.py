"""One small linear layer, its mask and its inputs, for the tests of masks and of matmul routes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supar_sweep.sparse.linear import MaskedLinear, attach_mask
from supar_sweep.sparse.masks import dense_mask

FAN_IN, FAN_OUT, TOKENS = 24, 40, 12
N_LIVE = 96


def precision() -> Any:
    """Return torch's oneDNN matmul setting, or None where this torch has none."""
    return getattr(torch.backends.mkldnn, "matmul", None)


def layer(density_count: int | None = N_LIVE, *, bias: bool = True, route: str = "torch") -> Any:
    torch.manual_seed(0)
    made = MaskedLinear(FAN_IN, FAN_OUT, bias=bias, route=route)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    if density_count is not None:
        attach_mask(made, "weight", dense_mask(1, (FAN_OUT, FAN_IN), density_count))
    return made


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(3, TOKENS, FAN_IN, generator=torch.Generator().manual_seed(seed))
