"""A GPT decoder whose every weight carries its role.

Shape suffixes: B sequences, T tokens of context, D width (d_model), H heads, K d_head, F d_ffn,
V vocabulary.

The model is built with zero weights and tags; `start` (roles.py) writes its values. What the
rules put into the forward pass (factors of embedding, attention logits, residual branches, logits)
arrives as ForwardMultipliers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.config.schema import CellConfig, ModelConfig
from supar_sweep.rules.parameterization import Role
from supar_sweep.rules.transfer import ForwardMultipliers, forward_multipliers
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.linear import MaskedLinear
from supar_sweep.training.roles import ParameterPlan, check_init, start
from supar_sweep.training.tags import collect, tag


def build(cell: CellConfig, compact: Mapping[str, int] | None = None) -> tuple[GPT, list[ParameterPlan]]:
    """Return the cell's model on the CPU, initialised, masked and checked, with a plan per
    parameter.

    float32, or float64 where the cell's precision is float64 (bfloat16 is autocast's business). The
    plans hold the parameters themselves, which `.to(device)` keeps.

    Args:
        cell: the cell.
        compact: layer -> number of live weights, of the layers that store these only; the numbers
            in them are the dense layers'.

    Raises:
        ConfigError: density out of reach for a layer, or a start that is off.
    """
    model = build_model(cell, compact)
    if cell.train.precision == "float64":
        model.double()
    plans = start(
        collect(model),
        method=cell.method(),
        hparams=cell.hparams,
        ratios=cell.ratios(),
        density=cell.density,
        layer_density=cell.layer_density,
        seed=cell.seed,
        eps=cell.optimizer.eps,
        pruned_for=cell.pruned_for(),
    )
    check_init(plans)
    return model, plans


def build_model(cell: CellConfig, compact: Mapping[str, int] | None = None) -> GPT:
    """Return the cell's model on the CPU in float32: tagged, not yet initialised (weights are 0).

    Args:
        cell: the cell; its vocabulary is cell.data.n_vocab.
        compact: see `build`.
    """
    multipliers = forward_multipliers(cell.method(), cell.ratios(), cell.hparams, d_head=cell.model.d_head)
    base_width = None if cell.base is None else cell.base.width
    return GPT(
        cell.model, n_vocab=cell.data.n_vocab, multipliers=multipliers, base_width=base_width, compact=compact or {}
    )


class GPT(nn.Module):
    """Pre-LN decoder: learned positions or ALiBi, GELU or SwiGLU, tied or untied head.

    Roles: embedding = token and position tables (and a tied head); hidden = qkv and the MLP's
    inputs; hidden_residual = attention and MLP output projections; head = an untied head. A tied
    head follows the embedding's rule; the logits multiplier is the same for both.

    Args:
        config: the shape.
        n_vocab: vocabulary size, >= 1.
        multipliers: the factors inside the forward pass.
        base_width: d_model of the base; None only for SP from its own init_std.
        compact: layer, such as blocks.0.mlp.up -> live weights, of the layers that store these only.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        n_vocab: int,
        multipliers: ForwardMultipliers,
        base_width: int | None,
        compact: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.config = config
        self.multipliers = multipliers
        self.embedding = Embedding(config, n_vocab, multipliers.embedding_output)
        self.blocks = nn.ModuleList(
            Block(config, multipliers, base_width, _below(compact, f"blocks.{index}"))
            for index in range(config.n_layer)
        )
        self.norm = _norm(config, in_block=False)
        self.head = MaskedLinear(config.width, n_vocab, bias=False)
        if config.tied_head:
            self.head.weight = cast(nn.Parameter, self.embedding.tokens.weight)
        else:
            tag(self.head, "weight", "head")
        self.attention_bias_HTT: Tensor | None
        bias_HTT = alibi_bias(config) if config.position == "alibi" else None
        # a function of the shape alone: no business of a checkpoint's
        self.register_buffer("attention_bias_HTT", bias_HTT, persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits [B, T, V].

        Args:
            tokens_BT: [B, T] int64 in [0, V), T <= context_tokens.
        """
        n_tokens = tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT)
        bias_HTT = self.attention_bias_HTT
        if bias_HTT is not None:
            bias_HTT = bias_HTT[:, :n_tokens, :n_tokens]
        for block in self.blocks:
            x_BTD = block(x_BTD, bias_HTT)
        # the head has no bias, so its input may carry the logits' factor: D numbers a token instead
        # of V
        return cast(Tensor, self.head(_scaled(self.norm(x_BTD), self.multipliers.logits)))


class Embedding(nn.Module):
    """Token (and learned position) table, summed, times the embedding multiplier."""

    def __init__(self, config: ModelConfig, n_vocab: int, output_mult: float) -> None:
        super().__init__()
        self.output_mult = output_mult
        self.tokens = _table(n_vocab, config.width)
        self.positions = _table(config.context_tokens, config.width) if config.position == "learned" else None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return [B, T, D].

        Args:
            tokens_BT: [B, T] int64.
        """
        x_BTD: Tensor = self.tokens(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[: tokens_BT.shape[1]]
        return _scaled(x_BTD, self.output_mult)


class Block(nn.Module):
    """x + c * attention(norm(x)), then x + c * mlp(norm(x)), c = the residual multiplier."""

    def __init__(
        self,
        config: ModelConfig,
        multipliers: ForwardMultipliers,
        base_width: int | None,
        compact: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.residual_mult = multipliers.residual
        self.attention_norm = _norm(config, in_block=True)
        self.attention = Attention(config, multipliers.attention_scale, base_width, _below(compact, "attention"))
        self.mlp_norm = _norm(config, in_block=True)
        self.mlp = MLP(config, base_width, _below(compact, "mlp"))

    def forward(self, x_BTD: Tensor, bias_HTT: Tensor | None) -> Tensor:
        """Return [B, T, D].

        Args:
            x_BTD: the residual stream.
            bias_HTT: ALiBi's bias, causal mask included, or None.
        """
        attended_BTD = self.attention(self.attention_norm(x_BTD), bias_HTT)
        x_BTD = x_BTD + _scaled(attended_BTD, self.residual_mult)
        return x_BTD + _scaled(self.mlp(self.mlp_norm(x_BTD)), self.residual_mult)


class Attention(nn.Module):
    """Causal multi-head attention; its logits are QK^T times `scale`, ALiBi's bias not scaled."""

    def __init__(self, config: ModelConfig, scale: float, base_width: int | None, compact: Mapping[str, int]) -> None:
        super().__init__()
        self.n_head, self.d_head, self.scale = config.n_head, config.d_head, scale
        width = config.width
        self.qkv = _linear(config, width, 3 * width, base_width, n_live=compact.get("qkv"))
        self.out = _linear(config, width, width, base_width, writes_residual=True, n_live=compact.get("out"))

    def forward(self, x_BTD: Tensor, bias_HTT: Tensor | None) -> Tensor:
        """Return [B, T, D].

        Args:
            x_BTD: normalised residual stream.
            bias_HTT: ALiBi's bias, causal mask included, or None for a plain causal mask.
        """
        n_seqs, n_tokens, width = x_BTD.shape
        qkv = self.qkv(x_BTD).view(n_seqs, n_tokens, 3, self.n_head, self.d_head)
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            v_BHTK,
            attn_mask=None if bias_HTT is None else bias_HTT.to(q_BHTK.dtype),
            is_causal=bias_HTT is None,
            scale=self.scale,
        )
        return cast(Tensor, self.out(y_BHTK.transpose(1, 2).reshape(n_seqs, n_tokens, width)))


class MLP(nn.Module):
    """GELU, or SwiGLU with gate and input fused in one matrix [2F, D]."""

    def __init__(self, config: ModelConfig, base_width: int | None, compact: Mapping[str, int]) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        base_ffn = None if base_width is None else base_width * config.ffn_mult
        inner = 2 * config.d_ffn if self.gated else config.d_ffn
        self.up = _linear(config, config.width, inner, base_width, n_live=compact.get("up"))
        self.down = _linear(
            config, config.d_ffn, config.width, base_ffn, writes_residual=True, n_live=compact.get("down")
        )
        if isinstance(self.up, CompactLinear) and isinstance(self.down, CompactLinear):
            self.up.feature_major = True  # only an elementwise function stands between the two

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


def alibi_bias(config: ModelConfig) -> Tensor:
    """Return ALiBi's bias with the causal mask, [H, T, T]: -slope_h * (i - j) for j <= i, -inf
    above the diagonal.

    Args:
        config: gives the number of heads and the context.

    Source: Press, Smith, Lewis 2022 (arXiv:2108.12409), section 3: slopes 2^(-8 h / H), h = 1..H,
    for H a power of two; else those of the power of two below, then every other one of the power of
    two above.
    """
    below = 2 ** math.floor(math.log2(config.n_head))
    slopes = [2.0 ** (-8 * head / below) for head in range(1, below + 1)]
    slopes += [2.0 ** (-4 * head / below) for head in range(1, 2 * below, 2)]
    slopes_H = torch.tensor(slopes[: config.n_head])
    position_T = torch.arange(config.context_tokens, dtype=torch.float32)
    distance_TT = position_T[:, None] - position_T[None, :]
    bias_HTT = -slopes_H[:, None, None] * distance_TT
    return bias_HTT.masked_fill_(distance_TT < 0, -math.inf)


def _linear(
    config: ModelConfig,
    fan_in: int,
    fan_out: int,
    base_fan_in: float | None,
    *,
    writes_residual: bool = False,
    n_live: int | None = None,
) -> MaskedLinear | CompactLinear:
    role: Role = "hidden_residual" if writes_residual else "hidden"
    layer: MaskedLinear | CompactLinear
    if n_live is None:
        layer = MaskedLinear(fan_in, fan_out, bias=config.bias)
    else:
        layer = CompactLinear(fan_in, fan_out, n_live, bias=config.bias)
    own_name = "weight" if n_live is None else "values"
    tag(layer, own_name, role, base_fan_in=base_fan_in, in_block=True)
    return layer


def _below(names: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Return the entries below a module, by their names there."""
    return {name.removeprefix(f"{prefix}."): n for name, n in names.items() if name.startswith(f"{prefix}.")}


def _norm(config: ModelConfig, *, in_block: bool) -> nn.LayerNorm:
    layer = nn.LayerNorm(config.width, bias=config.bias)
    tag(layer, "weight", "norm", in_block=in_block)
    return layer


def _table(n_rows: int, width: int) -> nn.Embedding:
    # from zeros: nn.Embedding's own start would draw from the global generator for nothing
    table = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        torch.zeros(n_rows, width), freeze=False
    )
    tag(table, "weight", "embedding")
    return cast(nn.Embedding, table)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """Return x * factor; x itself for the factor 1, so that it costs nothing."""
    return x if factor == 1.0 else x * factor
