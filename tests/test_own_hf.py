"""Models of transformers under the rules: GPT-2's Conv1D, Mixtral's experts, Mamba-2's bare parameters, Gemma's norms."""

from typing import Any

import pytest
import torch
from torch import nn

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import Ratios
from supar_sweep.rules.parameterization import Method
from supar_sweep.training.base_model import derive_ratios
from supar_sweep.training.plans import ParameterPlan, check_init
from supar_sweep.training.roles import parameterize
from supar_sweep.training.tags import collect, tag
from tests.test_roles import HPARAMS, by_name

pytestmark = pytest.mark.hf

MULT, BASE, VOCAB = 4, 16, 64
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def start(model: nn.Module, base: Any, density: float = 0.5) -> dict[str, ParameterPlan]:
    method = Method(parameterization="supar")
    plans = parameterize(model, method=method, hparams=HPARAMS, base=base, density=density, seed=0, eps=1e-8)
    check_init(plans)
    return by_name(plans)


def gpt2(width: int, n_layer: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=width, n_layer=n_layer, n_head=2, vocab_size=VOCAB, n_positions=8, **SPECIAL)
    return GPT2LMHeadModel(config)


def mixtral(width: int, n_layer: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": n_layer, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **shape, **heads, **SPECIAL))


def test_gpt2_has_the_fan_in_of_its_conv1d() -> None:
    model = gpt2(MULT * BASE, 4)
    for table in (model.transformer.wte, model.transformer.wpe):
        tag(table, "weight", "embedding")
    for block in model.transformer.h:
        tag(block.attn.c_attn, "weight", "hidden", in_block=True)
        tag(block.mlp.c_fc, "weight", "hidden", in_block=True)
        tag(block.attn.c_proj, "weight", "hidden_residual")
        tag(block.mlp.c_proj, "weight", "hidden_residual")
    plans = start(model, lambda: gpt2(BASE, 2))
    layers = {name: plan for name, plan in plans.items() if "hidden" in plan.role}
    assert len(layers) == 4 * 4
    assert {plan.m_d for plan in layers.values()} == {MULT}  # read off the wrong side: 12, 16 and 1
    assert derive_ratios(model, lambda: gpt2(BASE, 2)) == Ratios(m_d=MULT, m_L=2, n_layer=4)


def test_mixtrals_experts_are_refused_until_their_fan_in_is_said() -> None:
    model = mixtral(MULT * BASE, 2)
    tag(model.model.embed_tokens, "weight", "embedding")
    tag(model.lm_head, "weight", "head")
    for layer in model.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            tag(projection, "weight", "hidden", in_block=True)
        tag(layer.mlp.gate, "weight", "head")
        tag(attention.o_proj, "weight", "hidden_residual")
        tag(experts, "gate_up_proj", "hidden", in_block=True)
        tag(experts, "down_proj", "hidden_residual")
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj: MixtralExperts is not a known kind of layer"):
        collect(model)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        tag(experts, "gate_up_proj", "hidden", in_block=True, fan_in=experts.gate_up_proj.shape[2])
        tag(experts, "down_proj", "hidden_residual", fan_in=experts.down_proj.shape[2])
    plans = start(model, lambda: mixtral(BASE, 2))
    assert {plan.m_d for plan in plans.values()} == {MULT}
    experts = plans["model.layers.0.mlp.experts.gate_up_proj"]
    assert [int((expert != 0).sum()) for expert in experts.parameter] == [experts.live // 4] * 4


def test_mamba_2_keeps_what_is_tagged_own() -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8},
        **{"n_groups": 1, "vocab_size": VOCAB, **SPECIAL},
    )
    model: Any = Mamba2ForCausalLM(config)
    mixer = model.backbone.layers[0].mixer
    before = {name: mixer.get_parameter(name).clone() for name in ("dt_bias", "A_log", "D")}
    tag(model.backbone.embeddings, "weight", "embedding")
    tag(mixer.conv1d, "weight", "embedding")
    tag(mixer.in_proj, "weight", "hidden", in_block=True)
    tag(mixer.out_proj, "weight", "hidden_residual")
    if model.lm_head.weight is not model.backbone.embeddings.weight:
        tag(model.lm_head, "weight", "head")
    for name in before:  # refused one after another, until each is tagged
        with pytest.raises(ConfigError, match=rf"mixer\.({'|'.join(before)}): .*own \(keeps its values\)"):
            collect(model)
        tag(mixer, name, "own", in_block=True)
    start(model, model, density=1.0)
    assert all(torch.equal(mixer.get_parameter(name), value) for name, value in before.items())


def test_mamba_1_keeps_its_dt() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(**{"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "vocab_size": VOCAB, **SPECIAL})
    dt_proj: Any = MambaForCausalLM(config).backbone.layers[0].mixer.dt_proj
    tag(dt_proj, "weight", "hidden")
    with pytest.raises(ConfigError, match=r"^bias: holds -\d.* to -\d.*, and its start at 0 would replace that"):
        collect(dt_proj)
    tag(dt_proj, "bias", "own")
    assert len(collect(dt_proj)) == 2


def test_gemmas_norms_are_not_started_at_1() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norm = GemmaRMSNorm(8)
    with pytest.raises(ConfigError, match=r"^weight: holds 0, and its start at 1 would replace that"):
        collect(norm)
