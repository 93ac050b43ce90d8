"""The decoder of supar-sweep in plain torch, its multipliers folded into the weights: what an exported model computes.

This file needs torch and nothing else: `supar-sweep export` puts a copy of it into model folders that no class of
transformers fits.

Shape suffixes: B sequences, T tokens, D width, H heads, K head dimension, F inner width of the MLP.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """Pre-LN decoder: learned positions or ALiBi, GELU or SwiGLU, tied or untied head.

    Args:
        n_vocab: vocabulary.
        width: d_model.
        n_head: heads; must divide width.
        n_layer: blocks.
        d_ffn: inner width of the MLP.
        context_tokens: longest sequence; learned positions end there.
        position: "learned" or "alibi".
        activation: "gelu" (the exact one) or "swiglu".
        bias: biases in linear layers and norms.
        tied_head: logits are read off the token table.
    """

    def __init__(
        self,
        *,
        n_vocab: int,
        width: int,
        n_head: int,
        n_layer: int,
        d_ffn: int,
        context_tokens: int,
        position: str,
        activation: str,
        bias: bool,
        tied_head: bool,
    ) -> None:
        super().__init__()
        self.slopes = alibi_slopes(n_head) if position == "alibi" else None
        self.tokens = nn.Embedding(n_vocab, width)
        self.positions = nn.Embedding(context_tokens, width) if position == "learned" else None
        self.blocks = nn.ModuleList(
            Block(width, n_head, d_ffn, gated=activation == "swiglu", bias=bias) for _ in range(n_layer)
        )
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = None if tied_head else nn.Linear(width, n_vocab, bias=False)

    def forward(self, tokens_BT: Tensor, is_token_BT: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V].

        Args:
            tokens_BT: int64.
            is_token_BT: false or 0 where a sequence is padded; None = nowhere.
        """
        n_tokens = tokens_BT.shape[1]
        x_BTD = self.tokens(tokens_BT)
        if is_token_BT is not None and bool(is_token_BT.all()):
            is_token_BT = None
        if self.positions is not None:
            if is_token_BT is None:
                x_BTD = x_BTD + self.positions.weight[:n_tokens]
            else:  # padding, left or right, takes no position
                x_BTD = x_BTD + self.positions((is_token_BT.long().cumsum(1) - 1).clamp(min=0))
        bias = self._attention_bias(n_tokens, is_token_BT, x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, bias)
        table = self.tokens.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x_BTD), table)

    def _attention_bias(self, n_tokens: int, is_token_BT: Tensor | None, like: Tensor) -> Tensor | None:
        """Return what is added to the attention logits, [1 or B, 1 or H, T, T]; None for a plain causal mask."""
        if self.slopes is None and is_token_BT is None:
            return None
        position_T = torch.arange(n_tokens, device=like.device)
        # not in bfloat16, which cannot tell 1025 from 1024
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        distance_TT = (position_T[:, None] - position_T[None, :]).to(dtype)
        seen = (distance_TT >= 0)[None, None]
        if is_token_BT is not None:
            # what stands in a padded place is never read, but it must be a number: it sees itself
            seen = (seen & is_token_BT.bool()[:, None, None, :]) | (distance_TT == 0)
        bias = torch.zeros_like(distance_TT)[None, None]
        if self.slopes is not None:
            slopes_H = torch.tensor(self.slopes, dtype=dtype, device=like.device)
            bias = (-slopes_H[:, None, None] * distance_TT)[None]
        return bias.masked_fill(~seen, -math.inf).to(like.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, n_head: int, d_ffn: int, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, n_head, bias)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, d_ffn, gated, bias)

    def forward(self, x_BTD: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, T, D].

        Args:
            x_BTD: the residual stream.
            bias: added to the attention logits; None for a plain causal mask.
        """
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), bias)
        return cast(Tensor, x_BTD + self.mlp(self.mlp_norm(x_BTD)))


class Attention(nn.Module):
    """Causal multi-head attention, logits QK^T / sqrt(K)."""

    def __init__(self, width: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x_BTD: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, T, D].

        Args:
            x_BTD: normalised residual stream.
            bias: as for Block.
        """
        n_seqs, n_tokens, width = x_BTD.shape
        split = self.qkv(x_BTD).view(n_seqs, n_tokens, 3, self.n_head, width // self.n_head)
        q_BHTK, k_BHTK, v_BHTK = split.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=bias, is_causal=bias is None)
        return cast(Tensor, self.out(y_BHTK.transpose(1, 2).reshape(n_seqs, n_tokens, width)))


class MLP(nn.Module):
    """GELU, or SwiGLU with gate and input in one matrix [2F, D]."""

    def __init__(self, width: int, d_ffn: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gated = gated
        self.up = nn.Linear(width, 2 * d_ffn if gated else d_ffn, bias=bias)
        self.down = nn.Linear(d_ffn, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return [B, T, D].

        Args:
            x_BTD: normalised residual stream.
        """
        hidden = self.up(x_BTD)
        if self.gated:
            gate_BTF, input_BTF = hidden.chunk(2, dim=-1)
            return cast(Tensor, self.down(F.silu(gate_BTF) * input_BTF))
        return cast(Tensor, self.down(F.gelu(hidden)))


def alibi_slopes(n_head: int) -> tuple[float, ...]:
    """Return ALiBi's slope of each head.

    Args:
        n_head: number of heads.

    Source: Press, Smith, Lewis 2022 (arXiv:2108.12409), section 3: 2^(-8 h / H), h = 1..H, for H a power of two;
    else those of the power of two below, then every other one of the power of two above.
    """
    below = 2 ** math.floor(math.log2(n_head))
    slopes = [2.0 ** (-8 * head / below) for head in range(1, below + 1)]
    slopes += [2.0 ** (-4 * head / below) for head in range(1, 2 * below, 2)]
    return tuple(slopes[:n_head])
