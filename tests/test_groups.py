"""Parameter groups: what each optimizer is given, and what is refused rather than trained wrongly."""

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import SPARSE_ROLES, Role
from supar_sweep.training.groups import RULES_OF, param_groups
from supar_sweep.training.model import build
from supar_sweep.training.optim import make_optimizer
from supar_sweep.training.roles import check_init
from supar_sweep.training.tags import tag
from tests.one_process import one_process
from tests.test_roles import Net, by_name, plan
from tests.tiny import tiny_cell

TORCH_OPTIMIZERS = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer) and kind not in (torch.optim.Optimizer, torch.optim.LBFGS)
]
"""LBFGS takes no groups at all."""


def numbers(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key in ("lr", "weight_decay", "eps")}


def train_a_step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(32) % 50
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(tokens), tokens).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def decay_free(kind: type[torch.optim.Optimizer]) -> bool:
    return "weight_decay" not in inspect.signature(kind).parameters


# ---------------------------------------------------------------- names and roles
def test_groups_carry_their_roles_and_names_of_their_own() -> None:
    net = Net()
    plans = plan(net, density=0.5)
    groups = param_groups(plans)
    of_parameter = {item.parameter: item.role for item in plans}
    assert len(groups) > 2
    for group in groups:
        assert group["role"] == "+".join(dict.fromkeys(of_parameter[parameter] for parameter in group["params"]))
    assert [group["name"] for group in groups] == ["embedding+head", "norm+bias", "hidden+hidden_residual"]
    net.narrow = nn.Linear(48, 64, bias=False)  # of other width ratios: further groups of the same role
    tag(net.narrow, "weight", "hidden", base_fan_in=16)
    net.tall = nn.Linear(128, 64, bias=False)
    tag(net.tall, "weight", "hidden", base_fan_in=16)
    named = [(group["name"], group["role"]) for group in param_groups(plan(net, density=0.5))]
    assert ("hidden", "hidden") in named
    assert ("hidden 2", "hidden") in named
    assert len({name for name, _ in named}) == len(named)


def test_roles_choose_and_leave_nothing_between() -> None:
    plans = plan(Net())
    hidden = param_groups(plans, roles=SPARSE_ROLES)
    rest = param_groups(plans, roles={"embedding", "head", "norm", "bias"})
    chosen = [id(parameter) for groups in (hidden, rest) for group in groups for parameter in group["params"]]
    assert sorted(chosen) == sorted(id(item.parameter) for item in plans)
    assert {role for group in hidden for role in group["role"].split("+")} == set(SPARSE_ROLES)
    with pytest.raises(ConfigError, match=r"^roles: unknown role \(got 'hiden'\); did you mean 'hidden'"):
        param_groups(plans, roles=("hiden",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^roles: is a single string \(got 'hidden'\); .*or one as \('hidden',\)"):
        param_groups(plans, roles="hidden")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^roles: no parameter has one \(got \('own',\)\)"):
        param_groups(plans, roles=["own"])


# ---------------------------------------------------------------- torch's optimizers
@pytest.mark.parametrize("kind", TORCH_OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_of_torch_takes_its_groups(kind: type[torch.optim.Optimizer]) -> None:
    method = "sgd" if RULES_OF[kind.__name__] == "sgd" else "adamw"
    net = Net()
    if kind is torch.optim.SparseAdam:
        net.table = nn.Embedding(50, 64, sparse=True)
        tag(net.table, "weight", "embedding")
    plans = plan(net, density=0.25, optimizer=method, weight_decay=0.0 if decay_free(kind) else None)
    roles: tuple[Role, ...] | None = (
        SPARSE_ROLES if kind is torch.optim.Muon else ("embedding",) if kind is torch.optim.SparseAdam else None
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the rules have no row for Muon|.* adds weight decay to the gradient")
        groups = param_groups(plans, optimizer=kind, roles=roles)
    optimizer: Any = kind(groups)  # type: ignore[call-arg]
    of_parameter = {item.parameter: item.hparams for item in plans}
    for group in optimizer.param_groups:
        wanted = of_parameter[group["params"][0]]
        assert group["lr"] == wanted.lr
        assert group.get("weight_decay", 0.0) == wanted.weight_decay
        if kind.__name__ in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax"):
            assert group["eps"] == wanted.eps
        elif "eps" in group:  # its own
            assert group["eps"] == inspect.signature(kind).parameters["eps"].default or kind is torch.optim.SparseAdam
    before = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    train_a_step(net, optimizer)
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    # what a checkpoint keeps can be loaded, and the schedulers take the groups
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    copied = kind(copy.deepcopy(groups))  # type: ignore[call-arg]
    copied.load_state_dict(torch.load(buffer, weights_only=True))
    assert [group["name"] for group in copied.param_groups] == [group["name"] for group in groups]


def test_a_cyclic_schedule_and_states_from_before_names_are_taken() -> None:
    plans = plan(Net(), density=0.25)
    optimizer, other = (torch.optim.AdamW(param_groups(plans)) for _ in range(2))
    peaks = [group["lr"] for group in optimizer.param_groups]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=4)
    old = other.state_dict()
    for group in old["param_groups"]:
        del group["name"], group["role"]
    other.load_state_dict(old)
    assert [group["lr"] for group in other.param_groups] == peaks


def test_our_own_groups_are_those_of_old_checkpoints() -> None:
    # their number, order and parameters decide whether an optimizer's state of before can be loaded
    cell = tiny_cell()
    _, plans = build(cell)
    wanted: dict[Any, list[int]] = {}
    for item in plans:
        key = (item.hparams.lr, item.hparams.weight_decay, item.hparams.eps)
        wanted.setdefault(key, []).append(id(item.parameter))
    groups = make_optimizer(cell, plans, "cpu").param_groups
    assert [[id(parameter) for parameter in group["params"]] for group in groups] == list(wanted.values())


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("planned", "kind", "other"),
    [
        ("adamw", torch.optim.SGD, "sgd"),
        ("adamw", torch.optim.ASGD, "sgd"),
        ("sgd", torch.optim.AdamW, "adamw"),
        ("sgd", torch.optim.Adafactor, "adamw"),
    ],
)
def test_rules_of_another_optimizer_are_refused(planned: str, kind: Any, other: str) -> None:
    class Mine(kind):  # type: ignore[misc]
        """A subclass is judged as its base."""

    plans = plan(Net(), optimizer=planned)
    for each in (kind, Mine):
        problem = (
            rf"^optimizer: the plans hold the learning rates of {planned}, which are not those of {each.__name__}; "
        )
        with pytest.raises(ConfigError, match=rf"{problem}allowed: parameterize with Method\(optimizer='{other}'\)"):
            param_groups(plans, optimizer=each)


def test_an_optimizer_of_ones_own_is_taken_as_it_is() -> None:
    class Lion(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    for planned in ("adamw", "sgd"):
        for group in param_groups(plan(Net(), optimizer=planned), optimizer=Lion):
            assert set(numbers(group)) == {"lr", "weight_decay"}


def test_a_weight_decay_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^weight_decay: has no effect: Rprop does not have one"):
        param_groups(plan(Net()), optimizer=torch.optim.Rprop)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam], ids=lambda kind: kind.__name__
)
def test_weight_decay_is_decoupled_where_an_optimizer_can(kind: Any) -> None:
    nets = []
    for weight_decay in (0.1, 0.0):
        net = Net()
        plans = plan(net, weight_decay=weight_decay)
        optimizer = kind(param_groups(plans, optimizer=kind))
        # RAdam's first step alone would not tell
        assert all(group["decoupled_weight_decay"] == (group["weight_decay"] > 0) for group in optimizer.param_groups)
        before, lr = net.up.weight.detach().clone(), by_name(plans)["up.weight"].hparams.lr
        train_a_step(net, optimizer)
        nets.append(net.up.weight.detach())
    # the decay is a term of its own, whatever the gradient: -lr * weight_decay * weight
    decay = by_name(plan(Net(), weight_decay=0.1))["up.weight"].hparams.weight_decay
    torch.testing.assert_close(nets[0] - nets[1], -lr * decay * before, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adadelta])
def test_weight_decay_in_the_gradient_is_warned_of(kind: Any) -> None:
    with pytest.warns(UserWarning, match=rf"^{kind.__name__} adds weight decay to the gradient.*use AdamW, or"):
        param_groups(plan(Net(), weight_decay=0.1), optimizer=kind)
    param_groups(plan(Net(), weight_decay=0.0), optimizer=kind)  # a warning is an error here


def test_what_is_no_class_of_optimizers_is_refused() -> None:
    plans = plan(Net())
    for wrong in (torch.optim.AdamW(param_groups(plans)), nn.Linear, "adamw"):
        with pytest.raises(ConfigError, match=r"^optimizer: is not an optimizer class") as error:
            param_groups(plans, optimizer=wrong)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)  # an optimizer prints all of its groups


def test_muon_takes_matrices_and_says_that_no_rule_is_for_it() -> None:
    plans = plan(Net())
    problem = r"^norm\.weight: is not a matrix, and Muon takes nothing else \(got 'norm'\); allowed: roles=\('hidden', "
    with pytest.raises(ConfigError, match=problem):
        param_groups(plans, optimizer=torch.optim.Muon)
    with pytest.warns(UserWarning, match=r"no row for Muon.* already$"):
        groups = param_groups(plans, optimizer=torch.optim.Muon, roles=SPARSE_ROLES)
    with pytest.warns(
        UserWarning, match=r"no row for Muon.* moves pruned weights, unless you call supar_sweep\.hold_masks"
    ):
        param_groups(plan(Net(), density=0.25), optimizer=torch.optim.Muon, roles=SPARSE_ROLES)
    assert all(set(numbers(group)) == {"lr", "weight_decay"} for group in groups)


# ---------------------------------------------------------------- parameters that are no longer those of the plans
def assign(net: Net) -> None:
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)


def parametrize(net: Net) -> None:
    nn.utils.parametrizations.weight_norm(net.up)


@pytest.mark.parametrize("replace", [assign, parametrize], ids=lambda replace: replace.__name__)
def test_parameters_that_were_replaced_are_refused(replace: Callable[[Net], None]) -> None:
    net = Net()
    plans = plan(net)
    replace(net)
    name = r"^(table|up)\.weight: was replaced after parameterize"
    for use in (param_groups, check_init):
        with pytest.raises(ConfigError, match=rf"{name}.*would train nothing; allowed: groups by name: named = dict\("):
            use(plans)


@pytest.mark.filterwarnings("ignore")  # what torch says of a mesh of one process
def test_fully_sharded_parameters_are_refused_and_the_way_out_trains() -> None:
    net = Net()
    plans = plan(net, density=0.25)
    with one_process():
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match=r"^table\.weight: was replaced after parameterize, as fully_shard"):
            param_groups(plans)
        with pytest.raises(
            ConfigError, match=r"^table\.weight: is sharded already .* parameterize first, then fully_shard"
        ):
            plan(net, density=0.25)
        named = dict(net.named_parameters())
        groups = [
            {
                "params": [named[item.name]],
                "lr": item.hparams.lr,
                "weight_decay": item.hparams.weight_decay,
                "eps": item.hparams.eps,
            }
            for item in plans
        ]
        before = {name: parameter.detach().full_tensor().clone() for name, parameter in named.items()}  # type: ignore[attr-defined]
        train_a_step(net, torch.optim.AdamW(groups))
        for name, item in by_name(plans).items():
            now = named[name].detach().full_tensor()  # type: ignore[attr-defined]
            assert not torch.equal(now, before[name])
            if item.role in SPARSE_ROLES:
                assert torch.count_nonzero(now) <= item.live


def test_moved_and_cast_parameters_are_the_plans_own() -> None:
    net = Net()
    plans = plan(net)
    net.to("cpu").double()
    assert len(param_groups(plans)) > 1
