"""Dead weights and their gradients stay 0 however a model is copied, compiled and optimized; what moves them is found."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import supar_sweep
from supar_sweep.errors import ConfigError, MaskError
from supar_sweep.sparse.linear import attach_mask, let_dead_gradients_through, named_masks
from supar_sweep.sparse.masks import dense_mask
from supar_sweep.training import train
from supar_sweep.training.corpus import Corpus, load_corpus
from supar_sweep.training.held_masks import check_masks, hold_masks
from supar_sweep.training.model import build
from supar_sweep.training.roles import param_groups
from supar_sweep.training.run_cell import run_cell, run_cells
from tests.masked_nets import (
    BECOMES,
    N_BLOCKS,
    WIDTH,
    Net,
    backward,
    groups_by_name,
    inputs,
    masked_layers,
    n_dead_nonzero,
    planned,
)
from tests.short_runs import run
from tests.test_mask_updates import SPARSITY
from tests.tiny import end_of, folder_of, tiny_cell, tiny_job

STEPS = 3


def compiled(net: nn.Module, how: str, backend: str = "aot_eager") -> Callable[[Tensor], Tensor]:
    """Compiled before it ever ran: no eager forward has seen its parameters."""
    torch._dynamo.reset()
    if how == "eager":
        return net
    if how == "whole":
        whole: Callable[[Tensor], Tensor] = torch.compile(net, backend=backend, fullgraph=True)
        return whole
    for block in net.get_submodule("blocks").children():
        block.compile(backend=backend, fullgraph=True)
    return net


def trained_well(net: nn.Module, forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Take steps, and see that of gradients before clipping, and of weights after it, the live ones alone are not 0."""
    start = {name: weight.detach().clone() for name, (weight, _) in masked_layers(net).items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(forward, step)
        for weight, mask in masked_layers(net).values():
            assert weight.grad is not None
            assert torch.equal(weight.grad != 0, mask)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    assert len(start) == N_BLOCKS
    for name, (weight, mask) in masked_layers(net).items():
        assert torch.equal(weight != 0, mask)
        assert bool((weight != start[name])[mask].all())


# torch's own, of a block whose input is another's output, masks or not
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", ["eager", "whole", "blocks"])
@pytest.mark.parametrize("became", BECOMES)
def test_whatever_a_model_becomes_its_masks_hold(became: str, how: str) -> None:
    net = BECOMES[became](planned()[0])
    trained_well(net, compiled(net, how), torch.optim.AdamW(net.parameters(), weight_decay=0.5))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw for-loop": lambda groups: torch.optim.AdamW(groups, foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "nadam": torch.optim.NAdam,
}


@pytest.mark.parametrize("how", ["eager", "whole"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copys_masks_hold_under_every_optimizer(name: str, how: str) -> None:
    net, plans = planned()
    net = copy.deepcopy(net)
    trained_well(net, compiled(net, how), OPTIMIZERS[name](groups_by_name(net, plans)))


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_masks_hold_in_what_inductor_makes_of_a_copy(how: str) -> None:
    net = copy.deepcopy(planned()[0])
    trained_well(net, compiled(net, how, "inductor"), torch.optim.AdamW(net.parameters()))


def test_gradients_that_autograd_returns_are_masked() -> None:
    net = copy.deepcopy(planned()[0])
    loss = net(inputs()).square().mean()
    weights = [weight for weight, _ in masked_layers(net).values()]
    for grad, (_, mask) in zip(torch.autograd.grad(loss, weights), masked_layers(net).values(), strict=True):
        assert torch.equal(grad != 0, mask)


def test_whoever_acts_on_a_gradient_as_soon_as_it_is_there_sees_it_masked() -> None:
    """As an optimizer in the backward pass does, though it came before the mask."""
    layer = nn.Linear(WIDTH, WIDTH)
    seen: list[Tensor] = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))  # type: ignore[no-untyped-call]
    mask = dense_mask(0, (WIDTH, WIDTH), 100)
    attach_mask(layer, "weight", mask)
    backward(layer)
    assert torch.equal(seen[0] != 0, mask)


def attention() -> tuple[nn.Module, Callable[[nn.Module], Any], list[str]]:
    module = nn.MultiheadAttention(WIDTH, 2, bias=False)
    return module, lambda module: module(inputs(), inputs(1), inputs(2))[0], ["in_proj_weight", "out_proj.weight"]


def lstm() -> tuple[nn.Module, Callable[[nn.Module], Any], list[str]]:
    return nn.LSTM(WIDTH, WIDTH), lambda module: module(inputs())[0], ["weight_ih_l0", "weight_hh_l0"]


@pytest.mark.parametrize("became", BECOMES)
@pytest.mark.parametrize("made", [attention, lstm])
def test_layers_whose_forward_nobody_calls_are_masked_too(made: Callable[[], Any], became: str) -> None:
    module, output, names = made()
    for name in names:
        owner, _, local_name = name.rpartition(".")
        shape = module.get_parameter(name).shape
        attach_mask(module.get_submodule(owner), local_name, dense_mask(0, (shape[0], shape[1]), shape.numel() // 4))
    module = BECOMES[became](module)
    masks = named_masks(module)
    assert sorted(masks) == sorted(names)
    output(module).square().sum().backward()
    for name, mask in masks.items():
        grad = module.get_parameter(name).grad
        assert grad is not None
        assert not grad[~mask].any()
        assert grad[mask].any()


def test_copies_share_neither_masks_nor_what_may_pass() -> None:
    net = planned()[0]
    twin = copy.deepcopy(net)
    let_dead_gradients_through(twin, True)
    twin.get_buffer("blocks.0.fc.weight_mask").fill_(True)
    backward(net)
    backward(twin)
    for weight, mask in masked_layers(net).values():
        assert torch.equal(weight.grad != 0, mask)  # type: ignore[arg-type]
    assert all(bool(weight.grad.all()) for weight, _ in masked_layers(twin).values() if weight.grad is not None)


def test_torch_func_computes_with_a_masked_module() -> None:
    net = planned()[0]
    tensors = {name: value.detach() for name, value in net.named_parameters()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, tensors, (inputs(),)).square().mean()

    grads = torch.func.grad(loss)(tensors)
    assert grads["head.weight"].any()
    backward(net)  # its own parameters are back, with their masks
    assert all(torch.equal(weight.grad != 0, mask) for weight, mask in masked_layers(net).values())  # type: ignore[arg-type]


# ---------------------------------------------------------------- optimizers that mix entries
def muon_and_adamw(net: nn.Module, plans: Any) -> list[torch.optim.Optimizer]:
    hidden = [plan for plan in plans if plan.role == "hidden_residual"]
    rest = [plan for plan in plans if plan not in hidden]
    return [
        torch.optim.Muon(groups_by_name(net, hidden), momentum=0.9),
        torch.optim.AdamW(groups_by_name(net, rest)),
    ]


def steps(net: nn.Module, optimizers: list[torch.optim.Optimizer], n_steps: int = STEPS) -> list[int]:
    """Take steps; return the number of dead weights that are not 0 after each."""
    found = []
    for step in range(n_steps):
        backward(net, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(n_dead_nonzero(net))
    return found


def test_muon_moves_dead_weights_and_the_check_says_so() -> None:
    net, plans = planned()
    check_masks(plans)
    assert steps(net, muon_and_adamw(net, plans), 1)[0] > 0
    n_dead = WIDTH * WIDTH - plans[0].live
    with pytest.raises(MaskError) as error:
        check_masks(plans)
    said = str(error.value)
    n_moved = n_dead_nonzero(net.blocks[0])
    assert said.startswith(f"blocks.0.fc.weight: {n_moved} of {n_dead} dead weights are not 0, and ")
    assert f"{N_BLOCKS - 1} further layers" in said
    assert "hold_masks(optimizer, plans)" in said


def test_held_masks_keep_dead_weights_at_0_and_live_ones_as_muon_leaves_them() -> None:
    net, plans = planned()
    twin = copy.deepcopy(net)
    optimizers, others = muon_and_adamw(net, plans), muon_and_adamw(twin, plans)
    held = [hold_masks(optimizer, plans) for optimizer in optimizers]
    assert [len(each.names) for each in held] == [N_BLOCKS, 0]
    steps(twin, others, 1)
    assert steps(net, optimizers, 1) == [0]
    for name, (weight, mask) in masked_layers(net).items():
        assert torch.equal(weight[mask], masked_layers(twin)[name][0][mask])
    assert steps(net, optimizers) == [0] * STEPS
    check_masks(plans)
    for weight, mask in masked_layers(net).values():
        assert not optimizers[0].state[weight]["momentum_buffer"][~mask].any()
        assert bool((weight != 0)[mask].all())


REMADE: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "twice": lambda both: copy.deepcopy(pickle.loads(pickle.dumps(both))),
}


@pytest.mark.parametrize("how", REMADE)
def test_copies_of_an_optimizer_hold_masks_too(how: str) -> None:
    net, plans = planned()
    optimizers = muon_and_adamw(net, plans)
    for optimizer in optimizers:
        hold_masks(optimizer, plans)
    steps(net, optimizers, 1)
    other, remade = REMADE[how]((net, optimizers))
    assert [type(optimizer).__name__ for optimizer in remade] == ["Muon", "AdamW"]
    assert isinstance(remade[0], torch.optim.Muon)
    assert steps(other, remade) == [0] * STEPS
    check_masks(plans, model=other)
    steps(net, optimizers)
    for (weight, _), (copied, _) in zip(masked_layers(net).values(), masked_layers(other).values(), strict=True):
        assert torch.equal(weight, copied)
    # what it saves is as it would be without masks
    assert remade[0].state_dict().keys() == muon_and_adamw(net, plans)[0].state_dict().keys()


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_gradients_written_by_hand_are_held(kind: str) -> None:
    net, plans = planned()
    optimizer = OPTIMIZERS[f"adamw {kind}"](param_groups(plans))
    hold_masks(optimizer, plans)
    for _ in range(STEPS):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert n_dead_nonzero(net) == 0
    for weight, mask in masked_layers(net).values():
        assert not optimizer.state[weight]["exp_avg"][~mask].any()
        assert bool((weight != 0)[mask].all())


def test_one_optimizer_a_parameter_each_holds_its_own() -> None:
    net, plans = planned()
    optimizers = [
        torch.optim.Muon([plan.parameter], lr=0.1)
        if plan.role == "hidden_residual"
        else torch.optim.SGD([plan.parameter])
        for plan in plans
    ]
    assert [hold_masks(optimizer, plans).names for optimizer in optimizers] == [
        [plan.name] if plan.role == "hidden_residual" else [] for plan in plans
    ]
    assert steps(net, list(optimizers)) == [0] * STEPS


def test_masks_are_held_with_a_scaler_a_schedule_and_accumulation() -> None:
    net, plans = planned()
    optimizer = muon_and_adamw(net, plans)[0]
    hold_masks(optimizer, plans)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = 0
    for step in range(4):
        before = next(iter(masked_layers(net).values()))[0].detach().clone()
        for part in range(2):
            loss = net(inputs(2 * step + part)).square().mean()
            scaler.scale(loss * float("inf") if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        assert n_dead_nonzero(net) == 0
        taken += not torch.equal(before, next(iter(masked_layers(net).values()))[0])
    assert taken == 3  # the scaler skipped the one with infinite gradients


def test_other_step_hooks_see_the_weights_masked() -> None:
    net, plans = planned()
    optimizer = muon_and_adamw(net, plans)[0]
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(n_dead_nonzero(net)))
    hold_masks(optimizer, plans)
    steps(net, [optimizer])
    assert seen == [0] * STEPS


def test_a_removed_hold_holds_no_longer_and_can_be_taken_again() -> None:
    net, plans = planned()
    optimizer = muon_and_adamw(net, plans)[0]
    held = hold_masks(optimizer, plans)
    assert hold_masks(optimizer, plans).names == []
    held.remove()
    assert steps(net, [optimizer], 1)[0] > 0
    hold_masks(optimizer, plans)
    assert steps(net, [optimizer], 1) == [0]


def test_an_optimizer_over_tensors_that_were_replaced_is_refused() -> None:
    net, plans = planned()
    BECOMES["new parameters"](net)
    with pytest.raises(ConfigError, match=r"no longer blocks\.0\.fc\.weight.*named_parameters"):
        hold_masks(torch.optim.AdamW(param_groups(plans)), plans)
    assert hold_masks(torch.optim.AdamW(groups_by_name(net, plans)), plans).names == [
        plan.name for plan in plans if plan.density < 1
    ]


def test_an_optimizer_over_another_model_is_refused_and_a_copy_can_be_named() -> None:
    net, plans = planned()
    other = copy.deepcopy(net)
    optimizer = muon_and_adamw(other, plans)[0]
    with pytest.raises(ConfigError, match=r"none of the parameters in plans.*model=copy"):
        hold_masks(optimizer, plans)
    hold_masks(optimizer, plans, model=other)
    assert steps(other, [optimizer]) == [0] * STEPS
    with pytest.raises(ConfigError, match=r"no step hooks \(got 'list'\)"):
        hold_masks([optimizer], plans)  # type: ignore[arg-type]


def test_nothing_is_held_where_nothing_is_masked() -> None:
    net, plans = planned(density=1.0)
    optimizer = muon_and_adamw(net, plans)[0]
    assert hold_masks(optimizer, plans).names == []
    check_masks(plans)
    check_masks(plans, model=net)


# ---------------------------------------------------------------- the check
class Wrapper(nn.Module):
    """Keeps a model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "copied": copy.deepcopy,
    "wrapped": lambda net: Wrapper(copy.deepcopy(net)),
    "compiled": lambda net: torch.compile(copy.deepcopy(net), backend="eager"),
    "wrapped and compiled": lambda net: torch.compile(Wrapper(copy.deepcopy(net)), backend="eager"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_the_check_sees_one_weight_in_the_model_that_is_trained(how: str) -> None:
    net, plans = planned()
    other = WRAPPED[how](net)
    check_masks(plans, model=other)
    weight, mask = list(masked_layers(other).values())[1]
    with torch.no_grad():
        weight[tuple((~mask).nonzero()[-1])] = 1e-30
    check_masks(plans)
    with pytest.raises(MaskError, match=r"^blocks\.1\.fc\.weight: 1 of \d+ dead weights are not 0\."):
        check_masks(plans, model=other)


def test_the_check_reads_the_parameter_that_the_model_has_now() -> None:
    net, plans = planned()
    BECOMES["new parameters"](net)
    with torch.no_grad():
        masked_layers(net)["blocks.2.fc"][0].fill_(1.0)
    with pytest.raises(MaskError, match=r"^blocks\.2\.fc\.weight: (\d+) of \1 dead"):
        check_masks(plans)


def test_a_diverged_layer_is_the_losss_to_tell_but_not_one_dead_weight() -> None:
    net, plans = planned()
    weight, mask = masked_layers(net)["blocks.0.fc"]
    with torch.no_grad():
        weight.fill_(float("nan"))
        check_masks(plans)
        weight.masked_fill_(mask, 1.0)
    with pytest.raises(MaskError, match=r"blocks\.0"):
        check_masks(plans)


def test_a_mask_that_is_gone_or_does_not_fit_is_an_error() -> None:
    _, plans = planned()
    with pytest.raises(MaskError, match=r"blocks\.0\.fc\.weight: its mask is gone"):
        check_masks(plans, model=Net())
    with pytest.raises(MaskError, match=r"blocks\.0\.fc\.weight: this model has no such parameter"):
        check_masks(plans, model=nn.Linear(2, 2))
    net, plans = planned()
    net.get_submodule("blocks.0.fc").weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(MaskError, match=r"has the shape \(4,\) now"):
        check_masks(plans)


def test_compact_layers_have_no_dead_weights_to_check() -> None:
    cell = tiny_cell()
    dense = {plan.name: plan.live for plan in build(cell)[1] if plan.density < 1}
    name = next(iter(dense))
    model, plans = build(cell, {name.removesuffix(".weight"): dense[name]})
    check_masks(plans)
    check_masks(plans, model=model)
    optimizer = torch.optim.AdamW(param_groups(plans))
    assert sorted(hold_masks(optimizer, plans).names) == sorted(dense.keys() - {name})


def test_the_names_are_public() -> None:
    assert supar_sweep.check_masks is check_masks
    assert supar_sweep.hold_masks is hold_masks
    assert supar_sweep.named_masks is named_masks
    assert issubclass(supar_sweep.MaskError, supar_sweep.SuparError)


# ---------------------------------------------------------------- our own loop
@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(tiny_cell().data)


BAD_LR = 0.0123
BAD_STEP = 5


@pytest.fixture
def corrupting() -> Iterator[None]:
    """After its step BAD_STEP, an optimizer of this process whose lr is BAD_LR moves the dead weights of one layer."""
    done: dict[int, int] = {}

    def corrupt(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer.param_groups[0]["initial_lr"] != BAD_LR:
            return
        step = done[id(optimizer)] = done.get(id(optimizer), 0) + 1
        if step == BAD_STEP:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            weight = next(weight for weight in weights if weight.dim() == 2 and bool((weight == 0).any()))
            with torch.no_grad():
                weight[weight == 0] = 1e-6

    handle = register_optimizer_step_post_hook(corrupt)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("every_steps", "runtime", "last_step"),
    [
        (100, {}, 12),  # before the result at the latest
        (4, {}, 8),
        (100, {"checkpoint_every_steps": 3}, 6),
    ],
)
def test_a_cell_whose_dead_weights_move_fails_and_names_the_layer(
    every_steps: int,
    runtime: dict[str, Any],
    last_step: int,
    corrupting: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "MASK_CHECK_STEPS", every_steps)
    job = tiny_job(tmp_path / "cells", runtime=runtime, **{"hparams.lr": BAD_LR})
    assert run_cell(job) == "failed"
    assert "blocks.0.attention.qkv.weight: " in end_of(job)["message"]
    assert " dead weights are not 0. " in end_of(job)["message"]
    assert folder_of(job).metrics()[-1]["step"] == last_step
    saved = [path.name for path in folder_of(job).checkpoints.glob("step-*.pt")]
    assert saved == (["step-00000003.pt"] if runtime else [])


def test_its_company_goes_on(corrupting: None, tmp_path: Path) -> None:
    jobs = [tiny_job(tmp_path / "cells", **{"hparams.lr": lr}) for lr in (0.01, BAD_LR, 0.02)]
    ends: dict[str, str] = {}
    run_cells(jobs, ended=lambda cell_id, end, _: ends.update({cell_id: end}))
    assert [ends[job["cell_id"]] for job in jobs] == ["done", "failed", "done"]


@pytest.mark.parametrize("name", [None, *SPARSITY])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_every_step_of_a_sound_run_passes(
    name: str | None, accumulation_steps: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparsity = {} if name is None else {"sparsity": SPARSITY[name]}
    cell = tiny_cell(**{"train.steps": 20, "train.accumulation_steps": accumulation_steps, **sparsity})
    unchecked = run(corpus, cell)[1].lines
    monkeypatch.setattr(train, "MASK_CHECK_STEPS", 1)
    outcome, sink = run(corpus, cell)
    assert outcome.end == "done"
    assert sink.lines == unchecked


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_diverged_run_stays_diverged(optimizer: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MASK_CHECK_STEPS", 1)
    settings = {"name": "sgd", "decay_mode": "scaled", "clip_norm": None, "momentum": 0.9}
    cell = tiny_cell(**{"hparams.lr": 1e30, **({"optimizer": settings} if optimizer == "sgd" else {})})
    assert run(corpus, cell)[0].end == "diverged"
