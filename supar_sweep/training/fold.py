"""The rules' forward factors folded into the weights: the same function, from a decoder that has none.

Exact in real numbers for every parameterization; in floating point to the rounding of one product a weight.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from supar_sweep.rules.transfer import ForwardMultipliers
from supar_sweep.training.model import GPT

_WRITES_RESIDUAL = re.compile(r"blocks\.\d+\.(attention\.out|mlp\.down)\.(weight|bias)")
_QKV = re.compile(r"blocks\.\d+\.attention\.qkv\.(weight|bias)")


def plain_multipliers(d_head: int) -> ForwardMultipliers:
    """Return the factors of the standard decoder: 1, and 1/sqrt(d_head) in the attention logits.

    Args:
        d_head: head dimension, >= 1.
    """
    return ForwardMultipliers(embedding_output=1.0, logits=1.0, attention_scale=1 / math.sqrt(d_head), residual=1.0)


def fold(model: GPT) -> dict[str, Tensor]:
    """Return the weights with which a GPT of `plain_multipliers` computes what this one computes, by their names there.

    - embedding factor e: token and position tables times e;
    - attention factor a: the queries' rows of qkv, and their bias, times a * sqrt(d_head);
    - residual factor r: both output projections, and their biases, times r;
    - logits factor l: the final norm's weight and bias times l. A tied head is the embedding table, now e times
      too large, so there they take l / e, and the head stays tied.

    Args:
        model: every layer dense and without a mask.
    """
    config, multipliers = model.config, model.multipliers
    queries_mult = multipliers.attention_scale * math.sqrt(config.d_head)
    logits_mult = multipliers.logits / (multipliers.embedding_output if config.tied_head else 1.0)
    folded: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.startswith("embedding."):
            folded[name] = weight * multipliers.embedding_output
        elif _QKV.fullmatch(name):
            folded[name] = weight.clone()
            folded[name][: config.width] *= queries_mult
        elif _WRITES_RESIDUAL.fullmatch(name):
            folded[name] = weight * multipliers.residual
        elif name.startswith("norm."):
            folded[name] = weight * logits_mult
        else:
            folded[name] = weight
    if config.tied_head:
        folded["head.weight"] = folded["embedding.tokens.weight"]
    return folded
