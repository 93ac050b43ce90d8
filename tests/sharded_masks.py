"""What two processes do with a masked net that they share: each case trains it in another way and says what came of it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from supar_sweep.errors import MaskError, SuparError
from supar_sweep.training.held_masks import check_masks, hold_masks
from supar_sweep.training.roles import param_groups
from tests.masked_nets import Net, backward, groups_by_name, masked_layers, planned

N_RANKS, STEPS = 2, 3


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def facts(net: nn.Module) -> dict[str, int]:
    """Return how many dead weights are not 0, and how many live ones are 0, of all layers."""
    pairs = [(whole(weight.detach()), whole(mask)) for weight, mask in masked_layers(net).values()]
    return {
        "dead": sum(int((weight[~mask] != 0).sum()) for weight, mask in pairs),
        "still": sum(int((weight[mask] == 0).sum()) for weight, mask in pairs),
    }


def trained(net: nn.Module, forward: Callable[[Tensor], Tensor], plans: Any) -> dict[str, Any]:
    """Train with AdamW, each rank on its own batches."""
    start = {name: whole(weight.detach()).clone() for name, (weight, _) in masked_layers(net).items()}
    optimizer = torch.optim.AdamW(groups_by_name(net, plans))
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(forward, N_RANKS * step + dist.get_rank())
        optimizer.step()
    moved = sum(int((whole(weight.detach()) != start[name]).sum()) for name, (weight, _) in masked_layers(net).items())
    check_masks(plans, model=net)
    return {**facts(net), "moved": moved}


def sharded(net: Net, *, compiles: bool = False, copies: bool = False, **policy: torch.dtype) -> Net:
    """Return the net under FSDP2, block by block, as torchtitan does it."""
    net = copy.deepcopy(net) if copies else net
    mixed = MixedPrecisionPolicy(**policy)  # type: ignore[arg-type]
    for block in net.blocks:
        if compiles:
            block.compile(backend="aot_eager")
        fully_shard(block, mp_policy=mixed)
    fully_shard(net, mp_policy=mixed)
    return net


def fsdp(**how: Any) -> dict[str, Any]:
    net, plans = planned()
    net = sharded(net, **how)
    return trained(net, net, plans)


def data_parallel() -> dict[str, Any]:
    net, plans = planned()
    net = copy.deepcopy(net)
    ddp = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    result = trained(net, torch.compile(ddp, backend="aot_eager"), plans)
    check_masks(plans, model=ddp)
    return result


def tensor_parallel() -> dict[str, Any]:
    net, plans = planned()
    mesh = init_device_mesh("cpu", (N_RANKS,))
    ways = {
        "blocks.0.fc": ColwiseParallel(output_layouts=Replicate()),
        "blocks.1.fc": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(net, mesh, ways)
    return trained(net, net, plans)


def held_by_hand() -> dict[str, Any]:
    """Gradients that nobody masks, and hold_masks."""
    net, plans = planned()
    stale = torch.optim.AdamW(param_groups(plans))
    net = sharded(net)
    refused = ""
    try:
        hold_masks(stale, plans)
    except SuparError as error:
        refused = str(error)
    optimizer = torch.optim.AdamW(groups_by_name(net, plans))
    hold_masks(optimizer, plans)
    for _ in range(STEPS):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    check_masks(plans)
    return {**facts(net), "refused": refused}


def one_moved() -> dict[str, Any]:
    """One dead weight, in a shard of rank 1 alone."""
    net, plans = planned()
    net = sharded(net)
    weight, mask = masked_layers(net)["blocks.1.fc"]
    assert isinstance(weight, DTensor)
    if dist.get_rank() == 1:
        local = weight.to_local()
        row, column = (~mask[-len(local) :]).nonzero()[-1].tolist()
        with torch.no_grad():
            local[row, column] = 1.0
    said: list[Any] = [None] * N_RANKS
    mine = ""
    try:
        check_masks(plans)
    except MaskError as error:
        mine = str(error)
    dist.all_gather_object(said, mine)
    return {"said": said}


def loaded() -> dict[str, Any]:
    """A dense state dict, loaded into shards."""
    net, plans = planned()
    state: dict[str, Any] = {
        name: torch.ones_like(value) for name, value in net.state_dict().items() if "mask" not in name
    }
    state |= {name: value.clone() for name, value in net.state_dict().items() if "mask" in name}
    net = sharded(net)
    set_model_state_dict(net, state, options=StateDictOptions(full_state_dict=True))
    check_masks(plans)
    return facts(net)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fsdp": fsdp,
    "fsdp, compiled blocks": lambda: fsdp(compiles=True),
    "fsdp, a copy, compiled blocks": lambda: fsdp(compiles=True, copies=True),
    "fsdp, bf16": lambda: fsdp(param_dtype=torch.bfloat16),
    "fsdp, bf16, compiled blocks": lambda: fsdp(compiles=True, param_dtype=torch.bfloat16),
    "ddp, a copy, compiled": data_parallel,
    "tensor parallel": tensor_parallel,
    "held by hand": held_by_hand,
    "one moved": one_moved,
    "loaded": loaded,
}


def run(rank: int, folder: str) -> None:
    """Run every case on one of the ranks; rank 0 writes down what came of each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=N_RANKS)
    for name, case in CASES.items():
        torch._dynamo.reset()
        result = case()
        if rank == 0:
            Path(folder, f"{name}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
