"""Masks on any module's parameters, and a linear layer with a choice of matmul.

A mask is a bool buffer `<param>_mask` beside its parameter, so it is part of the state_dict and
moves with the module. Dead weights are zeroed when the mask is attached or loaded; their gradients
are zeroed as soon as autograd has accumulated them, before clipping or the optimizer can see them.
A zero weight with zero gradients stays zero under AdamW and SGD, decay included, so the forward
needs no mask at all.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.route import check_route, onednn_linear

_NAMES = "_masked_param_names"
_DENSE_GRADIENTS = "_dead_gradients_pass"


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
    masked: list[str] = module.__dict__.setdefault(_NAMES, [])
    if param_name in masked:
        module.get_buffer(f"{param_name}_mask").copy_(mask)
    elif bool(mask.all()) and not keep_full:
        return False
    else:
        # a copy: the caller may go on to use or change its tensor
        module.register_buffer(f"{param_name}_mask", mask.detach().clone().to(param.device))
        if not masked:
            module.register_forward_pre_hook(_before_forward)
            module.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        masked.append(param_name)
    _ensure_hooks(module)
    _zero_own_dead(module)
    return True


def named_masks(module: nn.Module) -> dict[str, Tensor]:
    """Return parameter name (dotted, from `module`) -> its attached mask."""
    found: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        for name in _masked_names(child):
            dotted = f"{prefix}.{name}" if prefix else name
            found[dotted] = child.get_buffer(f"{name}_mask")
    return found


def let_dead_gradients_through(module: nn.Module, passes: bool) -> None:
    """Set whether backward leaves the gradients of dead entries as they are; the caller then zeroes them before the optimizer.

    Args:
        module: every masked parameter in it.
        passes: False, as at the start: they are zeroed as soon as they are there.
    """
    for child in module.modules():
        if _masked_names(child):
            child.__dict__[_DENSE_GRADIENTS] = passes


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


class _GradientMask:
    """The post-accumulate-grad hook of one masked parameter.

    Its mask is looked up when called: loading or moving the module may have replaced it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = weakref.ref(module)  # weak: module -> parameter -> hook -> module is a cycle
        self.name = name

    def __call__(self, param: Tensor) -> None:
        module = self.module()
        if module is None or param.grad is None or module.__dict__.get(_DENSE_GRADIENTS, False):
            return
        mask = module.get_buffer(f"{self.name}_mask")
        # as int8: torch converts a bool operand element by element, three times slower
        param.grad.mul_(mask.view(torch.int8))


def _masked_names(module: nn.Module) -> list[str]:
    return cast("list[str]", module.__dict__.get(_NAMES, []))


@torch.no_grad()
def _zero_own_dead(module: nn.Module) -> None:
    for name in _masked_names(module):
        # masked_fill rather than a product: a dead entry may hold anything, NaN too
        module.get_parameter(name).masked_fill_(~module.get_buffer(f"{name}_mask"), 0.0)


def _ensure_hooks(module: nn.Module) -> None:
    """Put the gradient hook on parameters that lack it.

    deepcopy, pickle and load_state_dict(assign=True) make new parameters, which carry no hooks.
    """
    for name in _masked_names(module):
        param = module.get_parameter(name)
        hooks: dict[int, Any] = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        mine = (h for h in hooks.values() if isinstance(h, _GradientMask))
        if param.requires_grad and not any(h.module() is module for h in mine):
            hook = _GradientMask(module, name)
            param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        _ensure_hooks(module)


def _after_load(module: nn.Module, incompatible_keys: object) -> None:
    _ensure_hooks(module)
    _zero_own_dead(module)
