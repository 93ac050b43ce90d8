"""Which class of transformers computes a decoder of this shape, and how that class spells its settings and weights.

| position | activation | else | class |
|---|---|---|---|
| learned | gelu | | GPT-2; biases that the model lacks are zeros |
| alibi | gelu | no biases, ffn_mult 4 | MPT |
| any | swiglu | | shipped code: no stock class has SwiGLU between such norms and positions |
| alibi | gelu | biases, or another ffn_mult | shipped code: MPT has no biases, its MLP is 4 times as wide |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from torch import Tensor

from supar_sweep.config.schema import ModelConfig

NORM_EPS = 1e-5
"""torch's own, which the GPT's norms use."""

SHIPPED = {"decoder_supar.py": "hf_decoder.py", "modeling_supar.py": "hf_model.py.txt"}
"""File in a model folder -> the file of this package that it is a copy of."""


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """A model as transformers reads it.

    Args:
        architecture: the class.
        config: of config.json.
        weights: by the class's names.
        code: modelling code to put beside them, file name -> text; empty for a stock class.
    """

    architecture: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    code: Mapping[str, str] = field(default_factory=dict)


def hf_model(config: ModelConfig, n_vocab: int, folded: Mapping[str, Tensor]) -> HFModel:
    """Return the model in the first class that fits.

    Args:
        config: the shape.
        n_vocab: vocabulary size.
        folded: dense weights by the names of the GPT, multipliers folded in (training/fold.py).
    """
    if config.activation == "gelu" and config.position == "learned":
        return _gpt2(config, n_vocab, folded)
    if config.activation == "gelu" and not config.bias and config.ffn_mult == 4:
        return _mpt(config, n_vocab, folded)
    return _shipped(config, n_vocab, folded)


def _gpt2(config: ModelConfig, n_vocab: int, folded: Mapping[str, Tensor]) -> HFModel:
    def transposed(name: str) -> Tensor:  # its linear layers keep [fan_in, fan_out]
        return folded[f"{name}.weight"].T.contiguous()

    def bias(name: str) -> Tensor:
        weight = folded[f"{name}.weight"]
        return folded.get(f"{name}.bias", weight.new_zeros(weight.shape[0]))

    names = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    names |= {
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    weights = {
        "transformer.wte.weight": folded["embedding.tokens.weight"],
        "transformer.wpe.weight": folded["embedding.positions.weight"],
        "transformer.ln_f.weight": folded["norm.weight"],
        "transformer.ln_f.bias": bias("norm"),
    }
    for index in range(config.n_layer):
        for ours, theirs in names.items():
            of, to = f"blocks.{index}.{ours}", f"transformer.h.{index}.{theirs}"
            weights[f"{to}.weight"] = folded[f"{of}.weight"] if ours.endswith("norm") else transposed(of)
            weights[f"{to}.bias"] = bias(of)
    if not config.tied_head:
        weights["lm_head.weight"] = folded["head.weight"]
    return HFModel(
        architecture="GPT2LMHeadModel",
        config={
            "model_type": "gpt2",
            "vocab_size": n_vocab,
            "n_embd": config.width,
            "n_head": config.n_head,
            "n_layer": config.n_layer,
            "n_positions": config.context_tokens,
            "n_inner": config.d_ffn,
            "activation_function": "gelu",  # the exact one
            "layer_norm_epsilon": NORM_EPS,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            "tie_word_embeddings": config.tied_head,
        },
        weights=weights,
    )


def _mpt(config: ModelConfig, n_vocab: int, folded: Mapping[str, Tensor]) -> HFModel:
    names = {"attention_norm": "norm_1", "mlp_norm": "norm_2"}
    names |= {
        "attention.qkv": "attn.Wqkv",
        "attention.out": "attn.out_proj",
        "mlp.up": "ffn.up_proj",
        "mlp.down": "ffn.down_proj",
    }
    weights = {
        "transformer.wte.weight": folded["embedding.tokens.weight"],
        "transformer.norm_f.weight": folded["norm.weight"],
    }
    for index in range(config.n_layer):
        for ours, theirs in names.items():
            weights[f"transformer.blocks.{index}.{theirs}.weight"] = folded[f"blocks.{index}.{ours}.weight"]
    if not config.tied_head:
        weights["lm_head.weight"] = folded["head.weight"]
    return HFModel(
        architecture="MptForCausalLM",
        config={
            "model_type": "mpt",
            "vocab_size": n_vocab,
            "d_model": config.width,
            "n_heads": config.n_head,
            "n_layers": config.n_layer,
            "max_seq_len": config.context_tokens,
            "max_position_embeddings": config.context_tokens,  # where evaluation tools look for it
            "expansion_ratio": 4,
            "layer_norm_epsilon": NORM_EPS,
            "learned_pos_emb": False,
            "no_bias": True,
            "attn_config": {
                "alibi": True,
                "alibi_bias_max": 8,
                "softmax_scale": None,
                "attn_pdrop": 0,
                "clip_qkv": None,
            },
            "tie_word_embeddings": config.tied_head,
        },
        weights=weights,
    )


def _shipped(config: ModelConfig, n_vocab: int, folded: Mapping[str, Tensor]) -> HFModel:
    folder = resources.files("supar_sweep.training")
    return HFModel(
        architecture="SuparForCausalLM",
        config={
            "model_type": "supar_gpt",
            "auto_map": {
                "AutoConfig": "modeling_supar.SuparConfig",
                "AutoModelForCausalLM": "modeling_supar.SuparForCausalLM",
            },
            "vocab_size": n_vocab,
            "hidden_size": config.width,
            "num_attention_heads": config.n_head,
            "num_hidden_layers": config.n_layer,
            "intermediate_size": config.d_ffn,
            "max_position_embeddings": config.context_tokens,
            "position": config.position,
            "activation": config.activation,
            "bias": config.bias,
            "tied_head": config.tied_head,
            "tie_word_embeddings": False,
        },
        weights={f"decoder.{name}": weight for name, weight in decoder_weights(config, folded).items()},
        code={name: folder.joinpath(source).read_text(encoding="utf-8") for name, source in SHIPPED.items()},
    )


def decoder_weights(config: ModelConfig, folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return folded weights by the names of the shipped decoder (training/hf_decoder.py).

    Args:
        config: the shape.
        folded: as for `hf_model`.
    """
    tied = ("head.weight",) if config.tied_head else ()
    return {name.removeprefix("embedding."): weight for name, weight in folded.items() if name not in tied}
