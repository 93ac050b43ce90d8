"""A model measured against one of the base shape: what is derived, and what the two must not disagree about."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import supar_sweep
from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import Ratios
from supar_sweep.rules.parameterization import Method
from supar_sweep.training.base_model import derive_ratios
from supar_sweep.training.roles import ParameterPlan, check_init, parameterize
from supar_sweep.training.tags import tag
from tests.test_roles import HPARAMS, Net, by_name, plan

BASE = 16


class Block(nn.Module):
    """Grouped queries, and an MLP of a factor of its own."""

    def __init__(self, width: int, ffn: int, n_expert: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, width // 2, bias=False)
        self.up = nn.Parameter(torch.empty(n_expert, ffn, width))
        self.down = nn.Linear(ffn, width)
        tag(self.norm, "weight", "norm", in_block=True)
        for layer in (self.q, self.kv):
            tag(layer, "weight", "hidden", in_block=True)
        tag(self, "up", "hidden", in_block=True, fan_in=width)
        tag(self.down, "weight", "hidden_residual")


class Decoder(nn.Module):
    """Blocks in a list; nothing is said of the base."""

    def __init__(
        self, width: int, n_layer: int, *, ffn: int | None = None, n_expert: int = 2, tied: bool = False
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, groups=2 * width, bias=False)
        self.blocks = nn.ModuleList(Block(width, ffn or 3 * width, n_expert) for _ in range(n_layer))
        self.head = nn.Linear(width, 50, bias=False)
        tag(self.table, "weight", "embedding")
        tag(self.conv, "weight", "embedding")
        if tied:
            self.head.weight = self.table.weight
        else:
            tag(self.head, "weight", "head")


def against(module: nn.Module, base: Any, ratios: Ratios | None = None, **more: Any) -> list[ParameterPlan]:
    settings: dict[str, Any] = {"method": Method(parameterization="supar"), "hparams": HPARAMS, "density": 1.0, **more}
    return parameterize(module, ratios=ratios, base=base, seed=0, eps=1e-8, **settings)


# ---------------------------------------------------------------- derived
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "base_of",
    [lambda base: base(), lambda base: base, lambda base: base().to("meta")],
    ids=["module", "callable", "meta"],
)
def test_base_fan_in_and_ratios_come_from_the_base(base_of: Callable[..., Any], tied: bool) -> None:
    model = Decoder(4 * BASE, 6, ffn=5 * 32, n_expert=4, tied=tied)
    base = base_of(lambda: Decoder(BASE, 2, ffn=32, tied=tied))
    plans = against(model, base)
    check_init(plans)
    named = by_name(plans)
    for index in range(6):  # blocks 2 to 5 are in the target alone
        for layer, m_d in (("q.weight", 4), ("kv.weight", 4), ("up", 4), ("down.weight", 5)):
            assert named[f"blocks.{index}.{layer}"].m_d == m_d
    assert named["table.weight"].m_d == named["blocks.5.norm.weight"].m_d == 4
    assert derive_ratios(model, base) == Ratios(m_d=4, m_L=3, n_layer=6)
    # by hand it is the same
    by_hand = against(model, base, Ratios(m_d=4, m_L=3, n_layer=6))
    assert [item.hparams for item in by_hand] == [item.hparams for item in plans]


def test_a_callable_is_built_on_the_meta_device() -> None:
    seen: list[nn.Module] = []

    def build() -> nn.Module:
        seen.append(Decoder(BASE, 1))
        return seen[-1]

    against(Decoder(2 * BASE, 1), build)
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}


def test_the_base_is_not_changed_and_needs_no_tags() -> None:
    base = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    tag(model[0], "weight", "embedding")
    tag(model[1], "weight", "hidden")
    before = [parameter.clone() for parameter in base.parameters()]
    assert by_name(against(model, base))["1.weight"].m_d == 2
    assert all(torch.equal(one, other) for one, other in zip(base.parameters(), before, strict=True))


def test_depth_is_nothing_where_nothing_is_in_a_block() -> None:
    model, base = (nn.Sequential(*(nn.Linear(width, width) for _ in range(3))) for width in (8, 4))
    for layer in model:
        tag(layer, "weight", "hidden")
    assert derive_ratios(model, base) == Ratios(m_d=2)


# ---------------------------------------------------------------- refused
def wider_head(width: int) -> Decoder:
    model = Decoder(width, 2)
    model.head = nn.Linear(width, 2 * width, bias=False)
    tag(model.head, "weight", "head")
    return model


def more_layers(model: nn.Module, name: str) -> nn.Module:
    model.add_module(name, nn.Linear(3, 3))
    return model


def blocks_in(*names: str) -> nn.Module:
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.ModuleList([Block(BASE, BASE, 1) for _ in range(2)]))
    return model


@pytest.mark.parametrize(
    ("model", "base", "message"),
    [
        (
            Decoder(64, 2),
            Decoder(BASE, 2).blocks,
            r"^0\.up: is in the base \(shape \(2, 48, 16\)\), but not in the model",
        ),
        (Decoder(64, 2).blocks, Decoder(BASE, 2), r"^table\.weight: is in the base"),
        (Decoder(64, 2), more_layers(Decoder(BASE, 2), "extra"), r"^extra\.weight: is in the base"),
        (Decoder(64, 2), nn.Sequential(), r"^table\.weight: is not in the base; allowed: the same architecture"),
        (
            wider_head(64),
            wider_head(BASE),
            r"^head\.weight: is a head whose outputs change: shape \(128, 64\), at the base \(32, 16\)",
        ),
    ],
)
def test_models_of_two_architectures_are_refused(model: nn.Module, base: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        against(model, base)


def test_an_embedding_grows_along_one_axis() -> None:
    model, base = Decoder(64, 2), Decoder(BASE, 2)
    base.table = nn.Embedding(40, BASE)
    problem = (
        r"^table\.weight: is an embedding that grows along more than one axis: shape \(50, 64\), at the base \(40, 16\)"
    )
    with pytest.raises(ConfigError, match=problem):
        against(model, base)


def test_axes_must_be_as_many() -> None:
    model, base = Decoder(64, 2), Decoder(BASE, 2)
    for block in base.blocks:
        block.up = nn.Parameter(torch.empty(32, BASE))
    with pytest.raises(ConfigError, match=r"^blocks\.0\.up: has shape \(2, 192, 64\), at the base \(32, 16\)"):
        against(model, base)


def test_layers_of_the_target_alone_need_namesakes_that_agree() -> None:
    model, base = Decoder(64, 3), Decoder(BASE, 2)
    base.blocks[1].q = nn.Linear(BASE, 2 * BASE, bias=False)
    problem = (
        r"^blocks\.2\.q\.weight: is not in the base, and its layers of such names differ \(\(16, 16\), \(32, 16\)\)"
    )
    with pytest.raises(ConfigError, match=problem):
        against(model, base)


def test_a_tag_must_not_contradict_the_base() -> None:
    model = Decoder(64, 2)
    q = model.get_submodule("blocks.1.q")
    tag(q, "weight", "hidden", base_fan_in=32, in_block=True)
    problem = r"^blocks\.1\.q\.weight: is tagged with another base_fan_in than the 16 of the base \(got 32\)"
    with pytest.raises(ConfigError, match=problem):
        against(model, Decoder(BASE, 2))
    tag(q, "weight", "hidden", base_fan_in=16, in_block=True)
    against(model, Decoder(BASE, 2))


@pytest.mark.parametrize("tied", [False, True])
def test_ratios_must_not_contradict_the_base(tied: bool) -> None:
    model, base = Decoder(64, 6, tied=tied), Decoder(BASE, 2, tied=tied)
    name = "table" if tied else "head"
    problem = rf"^ratios\.m_d: {name}\.weight is 4 times as wide as in the base \(got 2\)"
    with pytest.raises(ConfigError, match=problem):
        against(model, base, Ratios(m_d=2, m_L=3, n_layer=6))
    with pytest.raises(ConfigError, match=r"^ratios\.m_L: the model has 6 blocks, the base 2 \(got 1.0\)"):
        against(model, base, Ratios(m_d=4, n_layer=6))


def test_depth_that_cannot_be_counted_is_asked_for() -> None:
    for names in (("encoder", "decoder"), ("1",)):  # two lists; a number that never changes before the one that does
        model = blocks_in(*names)
        with pytest.raises(ConfigError, match=r"^ratios\.n_layer: cannot be counted.*ratios=Ratios\("):
            against(model, blocks_in(*names))
        against(model, blocks_in(*names), Ratios(m_d=1, n_layer=2))


def test_what_builds_the_base_must_build_a_model() -> None:
    with pytest.raises(ConfigError, match=r"^base: built no model \(got 'dict'\)"):
        against(Decoder(64, 2), dict)


def test_neither_ratios_nor_base_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^ratios: must be set where no base model is given"):
        against(Net(), None)


# ---------------------------------------------------------------- ratios against the tags alone
def test_ratios_that_every_tag_contradicts_are_an_error() -> None:
    problem = (
        r"^ratios\.m_d: is the width's ratio, but no hidden weight's fan_in grows by it; that of up\.weight does by 4 "
        r"\(64 over base_fan_in 16\) \(got 2\)"
    )
    with pytest.raises(ConfigError, match=problem):
        plan(Net(), ratios=Ratios(m_d=2))


def conv_net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 256, 3), nn.Conv2d(256, 256, 3), nn.Linear(256, 10))
    tag(model[0], "weight", "embedding")
    tag(model[1], "weight", "hidden", base_fan_in=9 * 64)
    tag(model[2], "weight", "head")
    return model


def llama_block() -> nn.Module:
    model = nn.Module()
    model.table, model.q, model.down = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(172, 64)
    tag(model.table, "weight", "embedding")
    tag(model.q, "weight", "hidden", base_fan_in=16)
    tag(model.down, "weight", "hidden_residual", base_fan_in=48)  # 8/3 of the width, rounded
    return model


def token_mixer() -> nn.Module:
    model = nn.Module()
    model.patches, model.over_tokens, model.over_channels = nn.Linear(12, 64), nn.Linear(49, 49), nn.Linear(64, 64)
    tag(model.patches, "weight", "embedding")
    tag(model.over_tokens, "weight", "hidden", base_fan_in=49)
    tag(model.over_channels, "weight", "hidden", base_fan_in=16)
    return model


def layer_alone() -> nn.Module:
    layer = nn.Linear(24, 64)
    tag(layer, "weight", "hidden", base_fan_in=12)
    return layer


@pytest.mark.parametrize("build", [conv_net, llama_block, token_mixer, layer_alone])
def test_factors_of_a_layers_own_are_no_contradiction(build: Callable[[], nn.Module]) -> None:
    check_init(plan(build(), ratios=Ratios(m_d=4)))


def test_sp_from_its_own_start_needs_no_base() -> None:
    model = Decoder(64, 2)
    plan(model, parameterization="sp", sp_start="own", ratios=Ratios(m_d=7))


# ---------------------------------------------------------------- plans of a trained model
def unwritten(module: nn.Module, seed: int, density: float = 0.25) -> list[ParameterPlan]:
    return parameterize(
        module,
        method=Method(parameterization="supar"),
        hparams=HPARAMS,
        ratios=Ratios(m_d=4, m_L=2, n_layer=4),
        density=density,
        seed=seed,
        eps=1e-8,
        write=False,
    )


def test_plans_of_a_trained_model_write_nothing() -> None:
    net = Net()
    first = plan(net, density=0.25)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    plans = unwritten(net, 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [(item.name, item.hparams, item.live) for item in plans] == [
        (item.name, item.hparams, item.live) for item in first
    ]
    loaded = Net()  # a state without masks: the seed's are attached
    loaded.load_state_dict({name: tensor for name, tensor in before.items() if not name.endswith("_mask")})
    unwritten(loaded, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
def test_plans_of_a_trained_model_are_of_the_density_that_its_masks_have(density: float) -> None:
    # their learning rates would be those of another density
    net = Net()
    plan(net, density=0.25)
    with pytest.raises(ConfigError, match=r"^density: \w+\.weight has \d+ live weights, and this density asks for"):
        unwritten(net, 0, density)


def test_the_values_of_a_trained_model_are_not_set_to_0_by_masks_of_another_seed() -> None:
    net, loaded = Net(), Net()
    plan(net, density=0.25)
    loaded.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if not name.endswith("_mask")})
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for seed, density in ((7, 0.25), (0, 0.125)):
        with pytest.raises(
            ConfigError, match=r"has no mask, and the mask of this seed would set \d+ of its weights to 0"
        ):
            unwritten(loaded, seed, density)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in before.items())
    assert not [name for name in loaded.state_dict() if name.endswith("_mask")]


def test_the_names_are_public() -> None:
    assert supar_sweep.derive_ratios is derive_ratios
