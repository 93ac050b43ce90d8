"""Multipliers folded into the weights: the same logits from a decoder that has none, and from the one that is shipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from supar_sweep.config.schema import CellConfig, ModelConfig
from supar_sweep.rules.transfer import ForwardMultipliers
from supar_sweep.sparse.convert import to_dense
from supar_sweep.sparse.density import live_counts
from supar_sweep.sparse.linear import named_masks
from supar_sweep.training import model as gpt
from supar_sweep.training.cost import sparse_shapes
from supar_sweep.training.fold import fold, plain_multipliers
from supar_sweep.training.hf_classes import decoder_weights, hf_model
from supar_sweep.training.hf_decoder import Decoder, alibi_slopes
from tests.test_model import VARIANTS, scramble, tokens
from tests.tiny import tiny_cell

METHODS: dict[str, dict[str, Any]] = {
    "sp": {"parameterization": "sp"},
    "mup": {"parameterization": "mup", "depth": "none"},
    "supar": {"parameterization": "supar"},
    "completep": {"depth": "completep", "depth_alpha": 0.75, "base.n_layer": 1},
}
LARGE = {"hparams.alpha_in": 3.0, "hparams.alpha_out": 5.0, "hparams.init_std": 0.4, "train.precision": "float64"}


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(map(str, variant.values()))


def dense(cell: CellConfig, multipliers: ForwardMultipliers | None = None) -> gpt.GPT:
    """A float64 model of the cell, its masks burnt in, norms and biases moved off their constants."""
    weights, _ = to_dense(gpt.build_model(cell), scramble(gpt.build(cell)[0]).state_dict())
    return loaded(cell, weights, multipliers or gpt.build_model(cell).multipliers)


def loaded(cell: CellConfig, weights: Any, multipliers: ForwardMultipliers) -> gpt.GPT:
    model = gpt.GPT(cell.model, n_vocab=256, multipliers=multipliers, base_width=16, compact={}).double()
    model.load_state_dict(weights)
    return model


def shipped(config: ModelConfig, weights: Any) -> Decoder:
    decoder = Decoder(
        n_vocab=256,
        width=config.width,
        n_head=config.n_head,
        n_layer=config.n_layer,
        d_ffn=config.d_ffn,
        context_tokens=config.context_tokens,
        position=config.position,
        activation=config.activation,
        bias=config.bias,
        tied_head=config.tied_head,
    ).double()
    decoder.load_state_dict(decoder_weights(config, weights))
    return decoder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@torch.no_grad()
def test_folded_weights_compute_the_same_logits_without_multipliers(variant: dict[str, Any], method: str) -> None:
    cell = tiny_cell(**variant, **METHODS[method], **LARGE)
    model = dense(cell)
    wanted = model(tokens())
    plain = loaded(cell, fold(model), plain_multipliers(cell.model.d_head))
    torch.testing.assert_close(plain(tokens()), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shipped(cell.model, fold(model))(tokens()), wanted, rtol=1e-10, atol=1e-10)
    if method != "sp":  # SP has no factors: there is nothing to fold
        unfolded = loaded(cell, model.state_dict(), plain_multipliers(cell.model.d_head))
        assert not torch.allclose(unfolded(tokens()), wanted, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("factor", ["embedding_output", "logits", "attention_scale", "residual"])
@torch.no_grad()
def test_each_factor_is_folded(factor: str, tied: bool) -> None:
    cell = tiny_cell(**{"model.tied_head": tied, "model.bias": True, **LARGE})
    plain = plain_multipliers(cell.model.d_head)
    model = dense(cell, replace(plain, **{factor: 1.7}))
    wanted = model(tokens())
    torch.testing.assert_close(loaded(cell, fold(model), plain)(tokens()), wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(loaded(cell, model.state_dict(), plain)(tokens()), wanted, rtol=1e-3)


def test_folding_leaves_the_model_as_it_was_and_dead_weights_dead() -> None:
    cell = tiny_cell(**LARGE)
    model = dense(cell)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    masks = named_masks(gpt.build(cell)[0])
    assert masks
    for name, mask in masks.items():
        assert torch.equal(folded[name] != 0, mask), name


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_either_form_of_a_checkpoint_is_the_same_dense_model(form: str) -> None:
    cell = tiny_cell(**{"density": 0.25, "layer_density": "er"})
    counts = live_counts("er", sparse_shapes(cell), cell.density)
    masked = gpt.build(cell)[0]
    source = gpt.build(cell, counts)[0] if form == "compact" else masked
    assert (form == "compact") == ("blocks.0.mlp.up.values" in source.state_dict())
    weights, masks = to_dense(gpt.build_model(cell), source.state_dict())
    gpt.build_model(cell).load_state_dict(weights)
    assert masks.keys() == sparse_shapes(cell).keys()
    for name, mask in named_masks(masked).items():
        assert torch.equal(masks[name.removesuffix(".weight")], mask)
    for name, weight in masked.named_parameters():
        assert torch.equal(weights[name], weight), name


def test_dead_weights_of_a_masked_state_are_zeros() -> None:
    cell = tiny_cell(density=0.25)
    state = gpt.build(cell)[0].state_dict()
    name = "blocks.0.mlp.up"
    state[f"{name}.weight"] = torch.ones_like(state[f"{name}.weight"])
    weights, masks = to_dense(gpt.build_model(cell), state)
    assert torch.equal(weights[f"{name}.weight"], masks[name].float())


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_the_stock_class_is_taken_where_one_fits(variant: dict[str, Any]) -> None:
    cell = tiny_cell(**variant, **LARGE)
    found = hf_model(cell.model, 256, fold(dense(cell)))
    model = cell.model
    if model.activation == "gelu" and model.position == "learned":
        assert (found.architecture, found.config["model_type"]) == ("GPT2LMHeadModel", "gpt2")
    elif model.activation == "gelu" and not model.bias:
        assert (found.architecture, found.config["model_type"]) == ("MptForCausalLM", "mpt")
    else:
        assert found.architecture == "SuparForCausalLM"
    assert bool(found.code) == (found.architecture == "SuparForCausalLM")
    for name, text in found.code.items():
        compile(text, name, "exec")


def test_mpts_mlp_is_four_times_as_wide_or_the_code_is_shipped() -> None:
    cell = tiny_cell(**{"model.position": "alibi", "model.ffn_mult": 2.0, **LARGE})
    assert hf_model(cell.model, 256, fold(dense(cell))).architecture == "SuparForCausalLM"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["learned", "alibi"])
@torch.no_grad()
def test_padding_changes_no_logits_of_the_shipped_decoder(position: str, side: str) -> None:
    cell = tiny_cell(**{"model.position": position, "model.activation": "swiglu", **LARGE})
    decoder = shipped(cell.model, fold(dense(cell)))
    x = tokens(2, 9)
    wanted = decoder(x)
    filler, is_token = torch.full((2, 4), 7), torch.ones(2, 9, dtype=torch.int64)
    parts = (filler, x) if side == "left" else (x, filler)
    masks = (torch.zeros_like(filler), is_token) if side == "left" else (is_token, torch.zeros_like(filler))
    found = decoder(torch.cat(parts, 1), torch.cat(masks, 1))
    assert bool(found.isfinite().all())
    found = found[:, 4:] if side == "left" else found[:, :9]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(decoder(x, is_token), wanted)


@pytest.mark.parametrize("n_head", [1, 2, 4, 6, 12])
def test_the_shipped_slopes_are_the_models(n_head: int) -> None:
    bias = gpt.alibi_bias(tiny_cell(**{"model.width": 8 * n_head}).model)
    torch.testing.assert_close(torch.tensor(alibi_slopes(n_head)), bias[:, 1, 1] - bias[:, 1, 0])
