"""Masks on any module's parameters, and a linear layer with a choice of matmul.

A mask is a bool buffer `<param>_mask` beside its parameter, so it is part of the state_dict and
moves with the module. Dead weights are zeroed when the mask is attached or loaded. Their gradients
are zeroed by a hook on the parameter, before autograd accumulates them. A zero weight with zero
gradients stays zero under every optimizer that works element by element, decay included, so the
forward needs no mask at all.

A copy, unpickling, FSDP2 and load_state_dict(assign=True) put a new Parameter in the module, which has
no hooks, and a compiled forward runs no Python that could notice. All of them write to the module's
dict of parameters. So that dict is one of ours, which puts the hook on whatever is written there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.owners import named_owners
from supar_sweep.sparse.route import check_route, onednn_linear

_MASKS = "_supar_masks"


def attach_mask(module: nn.Module, param_name: str, mask: Tensor, *, keep_full: bool = False) -> bool:
    """Mask one parameter in place; return whether a mask was attached.

    A mask with no dead entry attaches nothing unless a mask stands there already: density 1 costs
    nothing. Attaching again replaces the mask. The mask survives state_dict round trips (also with
    assign=True), device moves, deepcopy and pickling.

    Args:
        module: the module that owns the parameter directly.
        param_name: its name on that module, such as "weight".
        mask: bool, of the parameter's shape, True where live; copied to the parameter's device.
        keep_full: attach a mask with no dead entry too, which will get some later.

    Raises:
        ConfigError: the module has no such parameter, or the mask's shape or dtype does not fit.
    """
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if param_name not in names:
        raise ConfigError("param_name", "no such one", value=param_name, allowed=names, nearest_to=param_name)
    param = module.get_parameter(param_name)
    if mask.dtype != torch.bool or mask.shape != param.shape:
        raise ConfigError(
            f"{param_name}_mask",
            "does not fit its parameter",
            value=f"{mask.dtype} {tuple(mask.shape)}",
            allowed=f"torch.bool {tuple(param.shape)}",
        )
    if param_name in _masked_names(module):
        module.get_buffer(f"{param_name}_mask").copy_(mask)
    elif bool(mask.all()) and not keep_full:
        return False
    else:
        # a copy: the caller may go on to use or change its tensor
        module.register_buffer(f"{param_name}_mask", mask.detach().clone().to(param.device))
        _add_name(module, param_name)
    _zero_own_dead(module)
    return True


def named_masks(module: nn.Module) -> dict[str, Tensor]:
    """Return parameter name (dotted, from `module`, without the prefixes of wrappers) -> its attached mask."""
    return {
        f"{prefix}{name}": owner.get_buffer(f"{name}_mask")
        for prefix, owner in named_owners(module)
        for name in _masked_names(owner)
    }


def let_dead_gradients_through(module: nn.Module, passes: bool) -> None:
    """Set whether backward leaves the gradients of dead entries as they are; the caller then zeroes them before the optimizer.

    Args:
        module: every masked parameter in it.
        passes: False, as at the start: they are zeroed as soon as they are there.
    """
    for child in module.modules():
        if masks := _masks_of(child):
            masks.dead_gradients_pass = passes


def part_here(mask: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor and its mask as this process holds them: of a sharded one, the local shards, the tensor's as a view.

    Args:
        mask: of the whole tensor.
        tensor: a parameter or its gradient, plain or a DTensor.
    """
    if type(tensor) in (Tensor, nn.Parameter) and type(mask) is Tensor:
        return tensor, mask
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(mask, DTensor):  # tensor parallelism distributes buffers too: every process has the whole of it
        mask = mask.full_tensor()
    if not isinstance(tensor, DTensor):
        return tensor, mask
    whole = [Replicate()] * tensor.device_mesh.ndim
    placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    everywhere = DTensor.from_local(mask, tensor.device_mesh, whole, run_check=False)
    return tensor.to_local(), everywhere.redistribute(placements=placements).to_local()


class MaskedLinear(nn.Module):
    """y = x W^T + b, with an optional mask on W and a choice of fp32 matmul.

    The weight starts at zero: initialization belongs to the caller, who knows the layer's role.
    `attach_mask(layer, "weight", mask)` makes it sparse; without it, this is a plain linear layer.

    Args:
        fan_in: inputs, >= 1.
        fan_out: outputs, >= 1.
        bias: whether to add a bias [fan_out].
        route: "torch" or "onednn" (see `choose_route` in route.py); "onednn" takes effect for float32 on the
            CPU outside autocast and torch.compile, everything else runs torch's own.
        device, dtype: of the parameters.

    Raises:
        ConfigError: unknown route.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        bias: bool = True,
        *,
        route: str = "torch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fan_in = fan_in
        self.fan_out = fan_out
        check_route(route)
        self.route = route
        self.weight = nn.Parameter(torch.zeros(fan_out, fan_in, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(fan_out, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @property
    def density(self) -> float:
        """The achieved density of the weight, in (0, 1]."""
        if "weight" not in _masked_names(self):
            return 1.0
        return float(self.get_buffer("weight_mask").sum().item()) / self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., fan_out].

        Args:
            x: [..., fan_in].
        """
        if self.route == "onednn" and not torch.compiler.is_compiling() and self._plain_fp32(x):
            return onednn_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return what print(layer) shows between its brackets."""
        return f"{self.fan_in}, {self.fan_out}, bias={self.bias is not None}, route={self.route!r}"

    def _plain_fp32(self, x: Tensor) -> bool:
        return (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == self.weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )


def set_route(module: nn.Module, route: str) -> int:
    """Set the matmul route of every MaskedLinear in `module`; return how many there are.

    Args:
        module: any module.
        route: "torch" or "onednn".

    Raises:
        ConfigError: unknown route.
    """
    check_route(route)
    layers = [child for child in module.modules() if isinstance(child, MaskedLinear)]
    for layer in layers:
        layer.route = route
    return len(layers)


class _Masks:
    """What is masked in one module. Its parameters' dict and their hooks refer to this, and this to none of them: no cycle.

    Args:
        buffers: the module's own dict, where masks are looked up when needed: loading or moving replaces them.
    """

    def __init__(self, buffers: Mapping[str, Tensor | None]) -> None:
        self.buffers = buffers
        self.names: list[str] = []
        self.dead_gradients_pass = False

    def mask(self, name: str) -> Tensor:
        """Return the mask of a parameter in `names`."""
        mask = self.buffers[f"{name}_mask"]
        assert mask is not None
        return mask


class _GradientMask:
    """The hook of one masked parameter: it gets a gradient before it is accumulated, or returned by torch.autograd.grad."""

    def __init__(self, masks: _Masks, name: str) -> None:
        self.masks, self.name = masks, name

    def __call__(self, grad: Tensor) -> Tensor | None:
        if self.masks.dead_gradients_pass:
            return None
        local, mask = part_here(self.masks.mask(self.name), grad)
        # not in place: autograd may use the same tensor elsewhere; as int8: torch converts a bool operand element by
        # element, three times slower
        masked = local * mask.view(torch.int8)
        if local is grad:
            return masked
        from torch.distributed.tensor import DTensor

        assert isinstance(grad, DTensor)
        return DTensor.from_local(
            masked, grad.device_mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
        )


class _Parameters(dict[str, nn.Parameter | None]):
    """A module's dict of parameters: what becomes a masked parameter gets the hook.

    Args:
        masks: of the module.
        parameters: what the module has.
    """

    def __init__(self, masks: _Masks, parameters: Mapping[str, nn.Parameter | None]) -> None:
        super().__init__(parameters)
        self.masks = masks
        self.hook_all()

    def __setitem__(self, name: str, parameter: nn.Parameter | None) -> None:
        super().__setitem__(name, parameter)
        if name in self.masks.names:
            self._hook(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Parameters, (self.masks, dict(self))

    def hook_all(self) -> None:
        """Put the hook on masked parameters that lack it."""
        for name in self.masks.names:
            self._hook(name)

    def _hook(self, name: str) -> None:
        parameter = self.get(name)
        # torch.func puts tensors here that are no parameters, and cannot have hooks
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
            return
        hooks: Mapping[int, Any] = parameter._backward_hooks or {}
        if any(isinstance(hook, _GradientMask) and hook.masks is self.masks for hook in hooks.values()):
            return
        # a frozen parameter takes no hook, and nobody tells when it is trained again
        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True).register_hook(_GradientMask(self.masks, name))  # type: ignore[no-untyped-call]
        parameter.requires_grad_(requires_grad)


def _masks_of(module: nn.Module) -> _Masks | None:
    return module.__dict__.get(_MASKS)


def _masked_names(module: nn.Module) -> list[str]:
    masks = _masks_of(module)
    return [] if masks is None else masks.names


def _add_name(module: nn.Module, name: str) -> None:
    """Have a parameter masked by the buffer that was registered for it."""
    masks = _masks_of(module)
    if masks is None:
        masks = module.__dict__[_MASKS] = _Masks(module._buffers)
        module.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
    masks.names.append(name)
    _ensure_hooks(module)


@torch.no_grad()
def _zero_own_dead(module: nn.Module) -> None:
    for name in _masked_names(module):
        local, mask = part_here(module.get_buffer(f"{name}_mask"), module.get_parameter(name))
        # masked_fill rather than a product: a dead entry may hold anything, NaN too
        local.masked_fill_(~mask, 0.0)


def _ensure_hooks(module: nn.Module) -> None:
    masks, parameters = _masks_of(module), module._parameters
    assert masks is not None
    if isinstance(parameters, _Parameters):
        parameters.hook_all()
    else:
        module.__dict__["_parameters"] = _Parameters(masks, parameters)


def _after_load(module: nn.Module, incompatible_keys: object) -> None:
    _ensure_hooks(module)  # torch may have swapped a parameter's insides
    _zero_own_dead(module)
