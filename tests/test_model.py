"""The GPT: shapes, roles, causality, and each forward factor against plain formulas."""

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.config.schema import CellConfig
from supar_sweep.rules.parameterization import SPARSE_ROLES
from supar_sweep.sparse.linear import MaskedLinear, named_masks
from supar_sweep.training import model as gpt
from supar_sweep.training.model import GPT, alibi_bias, build_model
from supar_sweep.training.tags import collect
from tests.tiny import tiny_cell

VARIANTS = [
    {
        "model.position": position,
        "model.activation": activation,
        "model.bias": bias,
        "model.tied_head": tied,
    }
    for position, activation, bias, tied in product(
        ("learned", "alibi"), ("gelu", "swiglu"), (True, False), (True, False)
    )
]


def build(cell: CellConfig) -> Any:
    """Return (model, plans), untyped: these tests look into everything."""
    return gpt.build(cell)


def tokens(n_seqs: int = 2, n_tokens: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(256, (n_seqs, n_tokens), generator=torch.Generator().manual_seed(seed))


def scramble(model: Any) -> GPT:
    """Make every parameter matter: norms and biases too, which start at constants."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def by_hand(model: Any, cell: CellConfig, x: Tensor) -> Any:
    """The decoder written out with loops over heads and full softmaxes."""
    config, mult = cell.model, model.multipliers
    n_tokens = x.shape[1]
    h = model.embedding.tokens.weight[x]
    if config.position == "learned":
        h = h + model.embedding.positions.weight[:n_tokens]
    h = h * mult.embedding_output

    def norm(layer: Any, z: Any) -> Any:
        z = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, correction=0, keepdim=True) + 1e-5)
        return z * layer.weight + (0 if layer.bias is None else layer.bias)

    def linear(layer: Any, z: Any) -> Any:
        return z @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    for block in model.blocks:
        q, k, v = linear(block.attention.qkv, norm(block.attention_norm, h)).split(config.width, -1)
        heads = []
        for head in range(config.n_head):
            at = slice(head * config.d_head, (head + 1) * config.d_head)
            logits = q[..., at] @ k[..., at].transpose(1, 2) * mult.attention_scale
            for i, j in product(range(n_tokens), repeat=2):
                if j > i:
                    logits[:, i, j] = -math.inf
                elif config.position == "alibi":
                    logits[:, i, j] -= 2 ** (-8 * (head + 1) / config.n_head) * (i - j)
            heads.append(logits.softmax(-1) @ v[..., at])
        h = h + linear(block.attention.out, torch.cat(heads, -1)) * mult.residual
        inner = linear(block.mlp.up, norm(block.mlp_norm, h))
        if config.activation == "swiglu":
            gate, inner = inner.split(config.d_ffn, -1)
            inner = gate * torch.sigmoid(gate) * inner
        else:
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        h = h + linear(block.mlp.down, inner) * mult.residual
    return norm(model.norm, h) @ model.head.weight.T * mult.logits


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("name", ["sp", "supar"])
def test_forward_is_the_decoder_written_out(variant: dict[str, Any], name: Any) -> None:
    cell = tiny_cell(
        **variant,
        **{
            "parameterization": name,
            "train.precision": "float64",
            "depth": "completep",
            "depth_alpha": 0.75,
        },
        **{
            "base.n_layer": 1,
            "hparams.alpha_in": 3.0,
            "hparams.alpha_out": 3.0,
            "hparams.init_std": 0.5,
        },
    )
    model = scramble(build(cell)[0])
    x = tokens(n_tokens=6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model, cell, x), rtol=1e-9, atol=1e-9)


def test_multipliers_reach_the_forward_pass() -> None:
    cell = tiny_cell(**{"hparams.alpha_in": 3.0, "hparams.alpha_out": 2.0})
    model, _ = build(cell)
    m_d = 32 / 16
    assert model.multipliers.embedding_output == 3.0
    assert model.multipliers.logits == 2.0 / m_d
    assert model.multipliers.attention_scale == 1 / 8
    plain, _ = build(tiny_cell())
    torch.testing.assert_close(model.embedding(tokens()), 3.0 * plain.embedding(tokens()))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_parameter_has_its_role_and_base(variant: dict[str, Any]) -> None:
    cell = tiny_cell(**variant)
    roles = {item.name: item.tag for item in collect(build_model(cell))}
    for name, tag in roles.items():
        if name.endswith("bias"):
            assert tag.role == "bias"
        elif "norm" in name:
            assert tag.role == "norm"
        elif "embedding" in name:
            assert tag.role == "embedding"
        elif name == "head.weight":
            assert tag.role == "head"
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            assert tag.role == "hidden_residual"
        else:
            assert name.endswith(("attention.qkv.weight", "mlp.up.weight"))
            assert tag.role == "hidden"
        assert tag.in_block == name.startswith("blocks.")
    assert ("head.weight" in roles) != cell.model.tied_head
    assert ("embedding.positions.weight" in roles) == (cell.model.position == "learned")
    assert any(name.endswith("bias") for name in roles) == cell.model.bias
    _, plans = build(cell)
    for plan in plans:
        assert plan.m_d == 32 / 16, plan.name


def test_only_hidden_weights_are_sparse_and_each_at_its_density() -> None:
    model, plans = build(tiny_cell(**{"density": 0.125}))
    masks = named_masks(model)
    assert set(masks) == {plan.name for plan in plans if plan.role in SPARSE_ROLES}
    assert len(masks) == 4 * 2
    for plan in plans:
        assert plan.density == (0.125 if plan.name in masks else 1.0)
    for module in model.modules():
        if isinstance(module, MaskedLinear) and module is not model.head:
            assert module.density == 0.125


def test_density_1_has_no_masks() -> None:
    model, _ = build(tiny_cell(density=1.0))
    assert not named_masks(model)
    assert not list(model.buffers())


def test_er_gives_each_layer_its_own_lr() -> None:
    _, plans = build(tiny_cell(**{"density": 0.125, "layer_density": "er"}))
    sparse = [plan for plan in plans if plan.role in SPARSE_ROLES]
    assert sum(plan.live for plan in sparse) == sum(math.prod(p.shape) for p in sparse) // 8
    assert len({plan.density for plan in sparse}) > 1
    for plan in sparse:
        assert math.isclose(plan.hparams.lr, 0.01 / (2 * plan.density))


def test_sp_mup_and_supar_share_noise_and_masks() -> None:
    first, _ = build(tiny_cell(parameterization="sp"))
    for name in ("mup", "supar"):
        other, plans = build(tiny_cell(parameterization=name))
        for (key, mask), wanted in zip(named_masks(other).items(), named_masks(first).values(), strict=True):
            assert torch.equal(mask, wanted), key
        for plan, weight in zip(plans, first.parameters(), strict=True):
            if plan.role in SPARSE_ROLES:
                ratio = 2 if name == "supar" else 1  # 1 / sqrt(density), against muP's dense start
                torch.testing.assert_close(plan.parameter, weight * ratio)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_sp_is_mups_dense_start_with_holes_at_every_width(variant: dict[str, Any]) -> None:
    for width in (16, 64):
        shape = {**variant, "model.width": width, "depth": "gpt2"}
        dense, _ = build(tiny_cell(**shape, parameterization="mup", density=1.0))
        for density in (1.0, 0.25):
            sp, _ = build(tiny_cell(**shape, parameterization="sp", density=density))
            masks = named_masks(sp)
            assert bool(masks) == (density < 1)
            for (name, weight), wanted in zip(sp.named_parameters(), dense.parameters(), strict=True):
                assert torch.equal(weight, wanted * masks[name] if name in masks else wanted), name


@pytest.mark.parametrize("position", ["learned", "alibi"])
def test_no_token_sees_the_future(position: str) -> None:
    model, _ = build(tiny_cell(**{"model.position": position, "hparams.init_std": 0.5}))
    x = tokens()
    changed = x.clone()
    changed[:, 9:] = (x[:, 9:] + 1) % 256
    with torch.no_grad():
        a, b = model(x), model(changed)
        shorter = model(x[:, :9])
    torch.testing.assert_close(a[:, :9], b[:, :9])
    torch.testing.assert_close(a[:, :9], shorter)
    assert not torch.allclose(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("n_head", [1, 2, 4, 6, 12])
def test_alibi_slopes(n_head: int) -> None:
    config = tiny_cell(**{"model.width": 8 * n_head}).model
    bias = alibi_bias(config)
    assert bias.shape == (n_head, 16, 16)
    assert torch.all(bias.diagonal(dim1=1, dim2=2) == 0)
    assert torch.all(bias[:, 2, 5] == -math.inf)
    slopes = bias[:, 4, 4] - bias[:, 4, 3]
    torch.testing.assert_close(-bias[:, 9, 4], 5 * slopes)
    powers: dict[int, list[float]] = {
        1: [-8],
        2: [-4, -8],
        4: [-2, -4, -6, -8],
        6: [-2, -4, -6, -8, -1, -3],
        12: [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5],
    }
    torch.testing.assert_close(slopes, torch.tensor([2.0**p for p in powers[n_head]]))


def test_alibi_bias_is_no_part_of_the_state_dict() -> None:
    model, _ = build(tiny_cell(**{"model.position": "alibi", "density": 1.0}))
    assert [name for name, _ in model.named_buffers()] == ["attention_bias_HTT"]
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_sp_from_its_own_init_goes_without_a_base() -> None:
    model, plans = build(tiny_cell(**{"base": None, "parameterization": "sp", "sp_start": "own", "depth": "none"}))
    assert model.multipliers.logits == 1.0
    for plan in plans:
        if plan.role not in ("norm", "bias"):
            assert plan.hparams.init_std == 0.08


def test_ffn_width_ratio_is_the_models_for_any_ffn_mult() -> None:
    cell = tiny_cell(**{"model.width": 48, "model.ffn_mult": 8 / 3})
    for plan in build(cell)[1]:
        assert math.isclose(plan.m_d, 48 / 16, rel_tol=1e-15), plan.name


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    build(tiny_cell())
    assert torch.equal(before, torch.random.get_rng_state())


def test_precision_decides_the_parameters_dtype() -> None:
    for precision, dtype in (
        ("float32", torch.float32),
        ("bfloat16", torch.float32),
        ("float64", torch.float64),
    ):
        model, _ = build(tiny_cell(**{"train.precision": precision, "model.position": "alibi"}))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.attention_bias_HTT.dtype == dtype
        assert model(tokens()).dtype == dtype


@pytest.mark.parametrize("position", ["learned", "alibi"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_bf16_autocast_trains_and_agrees_roughly(position: str, activation: str) -> None:
    model, plans = build(tiny_cell(**{"model.position": position, "model.activation": activation}))
    x = tokens()
    with torch.no_grad():
        exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), x.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logits.detach().float(), exact, rtol=0.1, atol=0.05)
    assert not torch.equal(logits.detach().float(), exact)
    for plan in plans:
        assert plan.parameter.grad.dtype == torch.float32
        assert torch.isfinite(plan.parameter.grad).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("position", ["learned", "alibi"])
def test_the_compiled_model_computes_the_same_without_a_graph_break(position: str) -> None:
    model, plans = build(tiny_cell(**{"model.position": position}))
    twin = copy.deepcopy(model)
    # the graph is what could break here; generating code for it would need a C++ compiler
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = tokens()
    for run in (compiled, twin):
        F.cross_entropy(run(x).flatten(0, 1), x.flatten()).backward()  # type: ignore[no-untyped-call]
    for plan, other in zip(plans, twin.parameters(), strict=True):
        torch.testing.assert_close(plan.parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
        if plan.role in SPARSE_ROLES:
            dead = ~named_masks(plan.owner)["weight"]
            assert torch.count_nonzero(plan.parameter.grad[dead]) == 0
            assert torch.count_nonzero(plan.parameter.grad) > 0


def test_parameters_keep_their_identity_when_the_model_moves() -> None:
    model, plans = build(tiny_cell())
    model.to("cpu").double()
    assert all(any(plan.parameter is p for p in model.parameters()) for plan in plans)


def test_a_tied_head_shares_the_table_and_its_gradient() -> None:
    model, _ = build(tiny_cell(**{"model.tied_head": True}))
    assert model.head.weight is model.embedding.tokens.weight
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.embedding.tokens.weight
    x = tokens()
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()  # type: ignore[no-untyped-call]
    unused = torch.ones(256, dtype=torch.bool)
    unused[x.flatten()] = False
    # the softmax reaches rows that no input token touches
    assert torch.count_nonzero(model.embedding.tokens.weight.grad[unused]) > 0


def test_norms_and_biases_follow_the_setting() -> None:
    for bias in (True, False):
        model, _ = build(tiny_cell(**{"model.bias": bias}))
        layers = [m for m in model.modules() if isinstance(m, nn.LayerNorm | MaskedLinear)]
        assert len(layers) == 2 * (2 + 4) + 1 + 1
        for layer in layers:
            assert (layer.bias is not None) == (bias and layer is not model.head)
