"""What an untagged parameter is: only where its class and its values leave no doubt."""

from __future__ import annotations

import math
import re

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import ALL_ROLES, Role

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_PLAIN_BIAS = re.compile(r"bias|in_proj_bias|bias_[ih]h(_l\d+(_reverse)?)?")
"""What torch's own layers call the biases that may start at 0."""

_STARTS = ("bias (starts at 0)", "norm (starts at 1)", "own (keeps its values)")


def guess_role(name: str, owner: nn.Module, local_name: str, parameter: Tensor, *, starts: bool) -> Role:
    """Return the role of an untagged parameter: a norm's gain, or a bias that starts at 0.

    Known are the classes of torch, of this package, and `bias` and the norms of transformers. What is started anew must not
    hold a value of its user's: one constant but 0 or 1, or such a constant in one gate of an LSTM or GRU.

    Args:
        name: full dotted name, for errors.
        owner: the module that holds it.
        local_name: its name there.
        parameter: its values are read where they are at hand.
        starts: whether its values are to be replaced.

    Raises:
        ConfigError: two or more axes, a parameter whose role cannot be known, or values that the start would destroy.
    """
    hint = f"tag it with supar_sweep.tag(owner, {local_name!r}, role)"
    if parameter.dim() > 1:
        raise ConfigError(name, f"has no role (shape {tuple(parameter.shape)}): {hint}", allowed=ALL_ROLES)
    values = None if parameter.is_meta or not starts else parameter.detach()
    class_name = type(owner).__name__
    if "bias" in local_name:
        if not _is_known(owner, local_name) and values is not None and bool((values != 0).any()):
            raise ConfigError(
                name,
                f"is called bias, but of {class_name} it is not known whether it may start at 0 (it holds "
                f"{_shown(values)}): {hint}",
                allowed=_STARTS,
            )
        role: Role = "bias"
    elif isinstance(owner, _NORMS) or "norm" in class_name.lower():
        role = "norm"
    else:
        # a gain taken for a bias would start at 0 and silence its layer, so there is no default
        raise ConfigError(
            name,
            f"has no role: a parameter of {class_name}, neither called bias nor in a norm; {hint}",
            allowed=_STARTS,
        )
    if values is not None and (kept := _constant_of_the_users(owner, role, values)) is not None:
        start = 1 if role == "norm" else 0
        raise ConfigError(name, f"holds {kept:g}, and its start at {start} would replace that: {hint}", allowed=_STARTS)
    return role


def _is_known(owner: nn.Module, local_name: str) -> bool:
    """Return whether a class is known to have a plain bias of this name.

    The name counts as well: a mixer of transformers, or a subclass of nn.Linear, may hold a dt_bias of its own.
    """
    kinds = (kind for kind in type(owner).__mro__ if kind not in (nn.Module, object))
    roots = {kind.__module__.partition(".")[0] for kind in kinds}
    return bool(roots & {"torch", "transformers", "supar_sweep"} and _PLAIN_BIAS.fullmatch(local_name))


def _constant_of_the_users(owner: nn.Module, role: Role, values: Tensor) -> float | None:
    """Return a constant that somebody must have set, or None."""
    if values.numel() == 0:
        return None
    first = float(values.flatten()[0])
    if bool((values == first).all()):
        # Gemma's norms multiply by 1 + gain and start it at 0, torch's own do not
        usual = (0.0, 1.0) if role == "bias" or isinstance(owner, _NORMS) else (1.0,)
        random = values.numel() == 1 and abs(first) <= _default_bound(owner)
        return None if first in usual or random else first
    if isinstance(owner, RNNBase | RNNCellBase) and owner.hidden_size > 1 and not values.numel() % owner.hidden_size:
        for gate in values.view(-1, owner.hidden_size):  # a forget gate's 1 stands among random numbers
            of_gate = float(gate[0])
            if of_gate != 0 and bool((gate == of_gate).all()):
                return of_gate
    return None


def _default_bound(owner: nn.Module) -> float:
    """Return the largest bias of torch's default start: one number alone is a constant whatever it is."""
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return 0.0
    return 1 / math.sqrt(max(1, weight[0].numel()))


def _shown(values: Tensor) -> str:
    lowest, highest = float(values.min()), float(values.max())
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
