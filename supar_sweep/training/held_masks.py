"""Whether masks still hold after training steps, and how to hold them where the optimizer would not.

The gradient of a dead weight is 0 (sparse/linear.py). That keeps the weight at 0 under an optimizer that works element by
element. One that mixes the entries of a matrix, such as Muon, SOAP or Shampoo, moves it all the same, and so does whoever
writes gradients or weights by hand.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supar_sweep.errors import ConfigError, MaskError
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.linear import named_masks, part_here
from supar_sweep.sparse.owners import named_owners
from supar_sweep.training.plans import ParameterPlan

_HELD = "_supar_held_masks"


class _Place(NamedTuple):
    """Where a planned parameter stands now."""

    plan: ParameterPlan
    owner: nn.Module
    local_name: str

    @property
    def parameter(self) -> Tensor | None:
        return self.owner._parameters.get(self.local_name)

    @property
    def mask(self) -> Tensor | None:
        return named_masks(self.owner).get(self.local_name)


class _Masked(NamedTuple):
    """A parameter with the module that has its mask."""

    name: str
    parameter: Tensor
    owner: nn.Module
    local_name: str

    @property
    def mask(self) -> Tensor:
        """Its mask as it stands."""
        return self.owner.get_buffer(f"{self.local_name}_mask")

    def here(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return what this process holds of the parameter, or of its gradient, and of the mask."""
        return part_here(self.mask, tensor)


def check_masks(plans: Sequence[ParameterPlan], model: nn.Module | None = None) -> None:
    """Raise MaskError if a dead weight is not exactly 0; to be called after any step.

    Every masked weight is read once, and the device is waited for once. Where parameters are sharded (DTensor), all
    processes must call it: they add up their counts, so that all of them raise, or none. A layer whose live weights are not
    finite is passed over: its training has diverged, which the loss says.

    Args:
        plans: from `parameterize`.
        model: the model that is trained, if that is a copy of the one `parameterize` saw; parameters are found in it by
            their names, without the prefixes of wrappers. None: the one `parameterize` saw, with the parameters it has now.

    Raises:
        MaskError: with the layer's name, how many of its dead weights are not 0, and what to do; or the mask is gone.
    """
    masked = _masked(plans, model)
    moved = [(item, count) for item, count in zip(masked, _sums(masked, _n_moved), strict=True) if count]
    # only where something is wrong: this costs more than the check
    not_finite = _sums([item for item, _ in moved], _n_not_finite)
    wrong = [entry for entry, count in zip(moved, not_finite, strict=True) if not count]
    if wrong:
        item, count = wrong[0]
        others = f", and neither are some of {len(wrong) - 1} further layers" if len(wrong) > 1 else ""
        raise MaskError(
            f"{item.name}: {count} of {int((~item.mask).sum())} dead weights are not 0{others}. An optimizer that "
            "mixes the entries of a matrix (Muon, SOAP, Shampoo) needs supar_sweep.hold_masks(optimizer, plans). Gradients "
            "and weights that you write yourself must be multiplied by supar_sweep.named_masks(model)"
        )


def hold_masks(optimizer: Optimizer, plans: Sequence[ParameterPlan], model: nn.Module | None = None) -> HeldMasks:
    """Have an optimizer leave dead weights at 0 after every step, whatever it computes; return a handle that ends this.

    Needed where an optimizer mixes the entries of a matrix (Muon, SOAP, Shampoo), or where gradients are written by hand.
    Before each step the gradients of dead weights are set to 0, after it the weights, before other hooks see them. It
    is part of the optimizer: copies and pickles have it too. State that has the weight's shape needs no mask: Muon's
    momentum is a sum of masked gradients, so its dead entries are 0.

    Call it for each optimizer, once its parameters are what will be trained: after `fully_shard`.

    Args:
        optimizer: a torch optimizer, over all of the plans' parameters or some of them.
        plans: from `parameterize`.
        model: as for `check_masks`.

    Raises:
        ConfigError: the optimizer has no step hooks, or trains none of the model's parameters.
        MaskError: the mask of a layer is gone.
    """
    if "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {}):
        raise ConfigError(
            "optimizer",
            "has no step hooks",
            value=type(optimizer).__name__,
            allowed="a torch.optim.Optimizer; where it is wrapped, the one inside",
        )
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    _check_trained(trained, list(_places(plans, model)))
    if _HELD not in optimizer.__dict__:
        optimizer.__class__ = _holding(type(optimizer))
        optimizer.__dict__[_HELD] = []
        _follow(optimizer)
    entries: list[_Masked] = optimizer.__dict__[_HELD]
    known = {id(item.parameter) for item in entries}
    new = [item for item in _masked(plans, model) if id(item.parameter) in trained - known]
    entries += new
    return HeldMasks(entries, new)


class HeldMasks:
    """What one call of `hold_masks` added to an optimizer.

    Args:
        entries: all that the optimizer holds.
        new: those of this call.
    """

    def __init__(self, entries: list[_Masked], new: Sequence[_Masked]) -> None:
        self._entries, self._new = entries, new

    @property
    def names(self) -> list[str]:
        """The parameters whose masks are held by this call."""
        return [item.name for item in self._new]

    def remove(self) -> None:
        """Leave them to the optimizer again."""
        gone = {id(item.parameter) for item in self._new}
        self._entries[:] = [item for item in self._entries if id(item.parameter) not in gone]


class _Holding(Optimizer):
    """What the class of an optimizer gets when it holds masks: torch's own copies and pickles lose every hook."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), _HELD: self.__dict__[_HELD]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _follow(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__bases__[1],), self.__getstate__()


def _holding(optimizer_class: type[Optimizer]) -> type[Optimizer]:
    """Return the class with `_Holding` before it, under its own name."""
    return type(optimizer_class.__name__, (_Holding, optimizer_class), {"__module__": optimizer_class.__module__})


def _empty(optimizer_class: type[Optimizer]) -> Optimizer:
    made = _holding(optimizer_class)
    return made.__new__(made)


def _follow(optimizer: Optimizer) -> None:
    """Put the hooks on an optimizer that has none."""
    optimizer.register_step_pre_hook(_mask_gradients)
    after = optimizer.register_step_post_hook(_zero_dead)
    # first: other hooks, such as a running average, are to see the weights as they will be used
    cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks).move_to_end(after.id, last=False)


@torch.no_grad()
def _mask_gradients(optimizer: Optimizer, *_: object) -> None:
    for item in optimizer.__dict__[_HELD]:
        if item.parameter.grad is not None:
            local, mask = item.here(item.parameter.grad)
            local.mul_(mask.view(torch.int8))


@torch.no_grad()
def _zero_dead(optimizer: Optimizer, *_: object) -> None:
    for item in optimizer.__dict__[_HELD]:
        local, mask = item.here(item.parameter)
        local.mul_(mask.view(torch.int8))  # eight times as fast on a CPU as masked_fill_


def _places(plans: Sequence[ParameterPlan], model: nn.Module | None) -> Iterator[_Place]:
    """Yield where the parameters of dense layers stand now; of compact ones no dead weight exists."""
    by_name = {} if model is None else _by_name(model)
    for plan in plans:
        if isinstance(plan.owner, CompactLinear):
            continue
        if model is None:
            yield _Place(plan, plan.owner, plan.local_name)
        elif (place := by_name.get(plan.name)) is not None:
            yield _Place(plan, *place)
        elif plan.live < math.prod(plan.shape):
            raise MaskError(
                f"{plan.name}: this model has no such parameter (of {sorted(by_name)[:3]} ...). If it is a wrapper, "
                "pass the model that the wrapper holds"
            )


def _by_name(model: nn.Module) -> Mapping[str, tuple[nn.Module, str]]:
    """Return name without prefixes of wrappers -> owner and local name of each parameter."""
    return {f"{prefix}{name}": (owner, name) for prefix, owner in named_owners(model) for name in owner._parameters}


def _masked(plans: Sequence[ParameterPlan], model: nn.Module | None) -> list[_Masked]:
    """Return the masked parameters.

    Raises:
        MaskError: a parameter with dead weights has no mask, or none that fits.
    """
    found = []
    for place in _places(plans, model):
        plan, parameter, mask = place.plan, place.parameter, place.mask
        if mask is None and plan.live == math.prod(plan.shape):
            continue
        if mask is None:
            raise MaskError(
                f"{plan.name}: its mask is gone, so nothing keeps its dead weights at 0. A model that was loaded or made anew "
                "has none: call parameterize on it, then load_state_dict"
            )
        if parameter is None or parameter.shape != mask.shape:
            shape = "is not a parameter" if parameter is None else f"has the shape {tuple(parameter.shape)}"
            raise MaskError(
                f"{plan.name}: {shape} now, while its mask has {tuple(mask.shape)}; wrappers that flatten or replace "
                "parameters cannot be followed. fully_shard and DistributedDataParallel can"
            )
        found.append(_Masked(plan.name, parameter, place.owner, place.local_name))
    return found


def _check_trained(trained: set[int], places: Sequence[_Place]) -> None:
    """Raise ConfigError where an optimizer trains tensors that are no parameters of the model, or no longer.

    Args:
        trained: ids of the optimizer's parameters.
        places: of the model's.
    """
    for place in places:
        if id(place.plan.parameter) in trained and place.parameter is not place.plan.parameter:
            raise ConfigError(
                "optimizer",
                f"trains a tensor that is no longer {place.plan.name}: fully_shard, or another change of the model, has "
                "replaced the parameter since parameterize",
                allowed="groups whose params come from dict(model.named_parameters()), by each plan's name",
            )
    if places and not any(id(place.parameter) in trained for place in places):
        raise ConfigError(
            "optimizer",
            "trains none of the parameters in plans",
            allowed="groups of this model's parameters; for a copy of it, hold_masks(optimizer, plans, model=copy)",
        )


def _n_moved(local: Tensor, mask: Tensor) -> Tensor:
    return torch.count_nonzero((local != 0) > mask)  # of bools, "greater" is "and not"


def _n_not_finite(local: Tensor, mask: Tensor) -> Tensor:
    return torch.count_nonzero(local.isfinite() < mask)


def _sums(masked: Sequence[_Masked], count: Callable[[Tensor, Tensor], Tensor]) -> list[int]:
    """Return what `count` says of each parameter and its mask, summed over the processes that share it."""
    alike: dict[Any, dict[int, Tensor]] = {}
    for index, item in enumerate(masked):
        local, mask = item.here(item.parameter)
        sharding = getattr(item.parameter, "device_mesh", None), getattr(item.parameter, "placements", None)
        alike.setdefault((local.device, sharding), {})[index] = count(local.detach(), mask)
    sums = [0] * len(masked)
    for (_, (mesh, placements)), of_index in alike.items():
        counts = torch.stack(list(of_index.values()))
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            whole = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
            counts = DTensor.from_local(counts, mesh, whole, run_check=False).full_tensor()
        for index, value in zip(of_index, counts.tolist(), strict=True):
            sums[index] = value
    return sums
