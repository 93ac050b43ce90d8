"""The forward pass of several models of one shape at once: what a cohort computes.

Activations are stacked [K, N, features], member by member; weights stay where they are, each in its own model with its own
gradient, mask and optimizer. What costs little in itself and much in being called (residual sums, activations, attention,
views, autograd's own work) is called once for all members. On a CPU in float32 or float64 every sum is taken in the order of a
solo run, so that the bits are the same; elsewhere the matmuls are one batched product, equal up to rounding.

Shape suffixes as in model.py, and K members, N = B * T tokens of one member. Compact layers are called member by member: where
they pay, the matmuls are so large that stacking gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.linear import MaskedLinear
from supar_sweep.sparse.route import onednn_precision
from supar_sweep.training.model import GPT, MLP, Attention

Linear = MaskedLinear | CompactLinear


def losses(models: Sequence[GPT], x_KBT: Tensor, y_KBT: Tensor) -> Tensor:
    """Return each member's mean cross-entropy on its own batch, [K], in nats a token.

    Args:
        models: K of one shape, on one device; multipliers, masks and forms of their layers may differ.
        x_KBT: int64 tokens, member k's batch at k.
        y_KBT: int64, the tokens to predict.
    """
    logits_KNV = _logits(models, x_KBT)
    if logits_KNV.dtype == torch.bfloat16:  # the loss itself is never of low precision
        logits_KNV = logits_KNV.float()
    targets_KN = y_KBT.flatten(1)
    if _same_bits(logits_KNV):
        pairs = zip(logits_KNV.unbind(0), targets_KN.unbind(0), strict=True)
        return torch.stack([F.cross_entropy(logits_NV, targets_N) for logits_NV, targets_N in pairs])
    flat = F.cross_entropy(logits_KNV.flatten(0, 1), targets_KN.flatten(), reduction="none")
    return flat.view_as(targets_KN).mean(1)


def _logits(models: Sequence[GPT], x_KBT: Tensor) -> Tensor:
    """Return [K, N, V]."""
    n_members, _, n_tokens = x_KBT.shape
    tables = [model.embedding(x_BT) for model, x_BT in zip(models, x_KBT.unbind(0), strict=True)]
    x_KND = torch.stack(tables).view(n_members, -1, models[0].config.width)
    bias_HTT = models[0].attention_bias_HTT
    if bias_HTT is not None:
        bias_HTT = bias_HTT[:, :n_tokens, :n_tokens]
    residual_mults = [model.multipliers.residual for model in models]
    for index in range(len(models[0].blocks)):
        blocks = [cast(Any, model.blocks[index]) for model in models]
        normed_KND = _norm([block.attention_norm for block in blocks], x_KND)
        attended_KND = _attention([block.attention for block in blocks], normed_KND, n_tokens, bias_HTT)
        x_KND = x_KND + _scaled(attended_KND, residual_mults)
        normed_KND = _norm([block.mlp_norm for block in blocks], x_KND)
        x_KND = x_KND + _scaled(_mlp([block.mlp for block in blocks], normed_KND, n_tokens), residual_mults)
    normed_KND = _norm([model.norm for model in models], x_KND)
    scaled_KND = _scaled(normed_KND, [model.multipliers.logits for model in models])
    return _linear([model.head for model in models], scaled_KND, n_tokens)


def _attention(layers: Sequence[Attention], x_KND: Tensor, n_tokens: int, bias_HTT: Tensor | None) -> Tensor:
    """Return [K, N, D]."""
    first = layers[0]
    qkv = _linear([layer.qkv for layer in layers], x_KND, n_tokens)
    qkv = qkv.view(len(layers), -1, n_tokens, 3, first.n_head, first.d_head)
    attended: list[Tensor] = []
    for start, stop, scale in _runs([layer.scale for layer in layers]):
        q_BHTK, k_BHTK, v_BHTK = qkv[start:stop].flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            v_BHTK,
            attn_mask=None if bias_HTT is None else bias_HTT.to(q_BHTK.dtype),
            is_causal=bias_HTT is None,
            scale=scale,
        )
        attended.append(y_BHTK.transpose(1, 2).reshape(stop - start, *x_KND.shape[1:]))
    y_KND = attended[0] if len(attended) == 1 else torch.cat(attended)
    return _linear([layer.out for layer in layers], y_KND, n_tokens)


def _mlp(layers: Sequence[MLP], x_KND: Tensor, n_tokens: int) -> Tensor:
    """Return [K, N, D]."""
    if any(isinstance(layer.up, CompactLinear) or isinstance(layer.down, CompactLinear) for layer in layers):
        return _each(layers, x_KND, n_tokens)  # the two spare each other a transposition
    hidden = _linear([layer.up for layer in layers], x_KND, n_tokens)
    if layers[0].gated:
        gate_KNF, input_KNF = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate_KNF) * input_KNF
    else:
        hidden = F.gelu(hidden)
    return _linear([layer.down for layer in layers], hidden, n_tokens)


def _linear(layers: Sequence[Linear], x_KND: Tensor, n_tokens: int) -> Tensor:
    """Return [K, N, fan_out]."""
    dense = [layer for layer in layers if isinstance(layer, MaskedLinear)]
    if len(dense) < len(layers):
        return _each(layers, x_KND, n_tokens)
    weights: list[Tensor] = [layer.weight for layer in dense]
    biases: list[Tensor] = [layer.bias for layer in dense if layer.bias is not None]
    if _same_bits(x_KND):
        return cast(Tensor, _LinearEach.apply(x_KND, dense[0].route, *weights, *biases))  # type: ignore[no-untyped-call]
    stacked_KDO = torch.stack(weights).mT
    if not biases:
        return torch.bmm(x_KND, stacked_KDO)
    return torch.baddbmm(torch.stack(biases)[:, None], x_KND, stacked_KDO)


def _norm(layers: Sequence[nn.LayerNorm], x_KND: Tensor) -> Tensor:
    """Return [K, N, D]."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [bias for layer in layers for name, bias in layer.named_parameters() if name == "bias"]
    if _same_bits(x_KND):
        return cast(Tensor, _NormEach.apply(x_KND, layers[0].eps, *weights, *biases))  # type: ignore[no-untyped-call]
    normed_KND = F.layer_norm(x_KND, x_KND.shape[-1:], eps=layers[0].eps) * torch.stack(weights)[:, None]
    return normed_KND + torch.stack(biases)[:, None] if biases else normed_KND


def _each(layers: Sequence[nn.Module], x_KND: Tensor, n_tokens: int) -> Tensor:
    """Return each member's own layer applied to its own activations [B, T, D], stacked [K, N, features]."""
    n_members, n_all, width = x_KND.shape
    x_KBTD = x_KND.view(n_members, n_all // n_tokens, n_tokens, width)
    outputs = [layer(x_BTD) for layer, x_BTD in zip(layers, x_KBTD.unbind(0), strict=True)]
    return torch.stack(outputs).flatten(1, 2)


def _scaled(x_KND: Tensor, factors: Sequence[float]) -> Tensor:
    """Return member k's part times factors[k]; x itself where all are 1."""
    if all(factor == 1.0 for factor in factors):
        return x_KND
    if len(set(factors)) == 1:
        return x_KND * factors[0]
    # a plain number is not rounded to bfloat16 by torch, so neither are these
    column_K11 = _column(tuple(factors), torch.promote_types(x_KND.dtype, torch.float32), x_KND.device)
    return (x_KND * column_K11).to(x_KND.dtype)


@lru_cache(maxsize=64)
def _column(factors: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the factors as [K, 1, 1]; kept, because making them on a GPU waits for it."""
    return torch.tensor(factors, dtype=dtype, device=device).view(-1, 1, 1)


def _runs(values: Sequence[float]) -> Iterator[tuple[int, int, float]]:
    """Yield (start, stop, value) of each run of equal values."""
    start = 0
    for value, group in groupby(values):
        stop = start + len(list(group))
        yield start, stop, value
        start = stop


def _same_bits(x: Tensor) -> bool:
    """Return whether sums must be taken in a solo run's order: on a CPU outside autocast, where members' matmuls one by one
    cost no more than a batched one.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
    )


class _LinearEach(torch.autograd.Function):
    """y_k = x_k W_k^T + b_k: the members' matmuls one by one, into one output."""

    @staticmethod
    def forward(ctx: Any, x_KND: Tensor, route: str, *parameters: Tensor) -> Tensor:
        n_members = len(x_KND)
        weights, biases = parameters[:n_members], parameters[n_members:]
        ctx.save_for_backward(x_KND, *weights)
        ctx.route, ctx.has_bias = route, bool(biases)
        y_KNO = x_KND.new_empty(*x_KND.shape[:2], len(weights[0]))
        with _route(route):
            for k, (x_ND, weight, y_NO) in enumerate(zip(x_KND.unbind(0), weights, y_KNO.unbind(0), strict=True)):
                if biases:
                    torch.addmm(biases[k], x_ND, weight.t(), out=y_NO)
                else:
                    torch.mm(x_ND, weight.t(), out=y_NO)
        return y_KNO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_KND, *weights = ctx.saved_tensors
        grad_KNO = grads[0].contiguous()
        grad_x_KND = torch.empty_like(x_KND)
        grad_weights = []
        with _route(ctx.route):
            for x_ND, weight, grad_NO, grad_x_ND in zip(
                x_KND.unbind(0), weights, grad_KNO.unbind(0), grad_x_KND.unbind(0), strict=True
            ):
                torch.mm(grad_NO, weight, out=grad_x_ND)
                grad_weights.append(grad_NO.t() @ x_ND)
        grad_biases = [grad_NO.sum(0) for grad_NO in grad_KNO.unbind(0)] if ctx.has_bias else []
        return grad_x_KND, None, *grad_weights, *grad_biases


class _NormEach(torch.autograd.Function):
    """LayerNorm of each member with its own weight and bias, one by one, into one output."""

    @staticmethod
    def forward(ctx: Any, x_KND: Tensor, eps: float, *parameters: Tensor) -> Tensor:
        n_members, n_features = len(x_KND), x_KND.shape[-1:]
        weights, biases = parameters[:n_members], parameters[n_members:]
        y_KND = torch.empty_like(x_KND)
        saved: list[Tensor] = []
        for k, (x_ND, weight, y_ND) in enumerate(zip(x_KND.unbind(0), weights, y_KND.unbind(0), strict=True)):
            normed, mean, inverse_std = torch.native_layer_norm(
                x_ND, n_features, weight, biases[k] if biases else None, eps
            )
            y_ND.copy_(normed)
            saved += [weight, mean, inverse_std, *([biases[k]] if biases else [])]
        ctx.save_for_backward(x_KND, *saved)
        ctx.has_bias = bool(biases)
        return y_KND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_KND, *saved = ctx.saved_tensors
        each = 4 if ctx.has_bias else 3
        grad_x_KND = torch.empty_like(x_KND)
        grad_weights, grad_biases = [], []
        for k, (x_ND, grad_ND) in enumerate(zip(x_KND.unbind(0), grads[0].contiguous().unbind(0), strict=True)):
            weight, mean, inverse_std, *bias = saved[each * k : each * (k + 1)]
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad_ND,
                x_ND,
                x_KND.shape[-1:],
                mean,
                inverse_std,
                weight,
                bias[0] if bias else None,
                [True, True, ctx.has_bias],
            )
            grad_x_KND[k] = grad_x
            grad_weights.append(grad_weight)
            grad_biases += [grad_bias] if ctx.has_bias else []
        return grad_x_KND, None, *grad_weights, *grad_biases


def _route(route: str) -> Any:
    return onednn_precision() if route == "onednn" else nullcontext()
