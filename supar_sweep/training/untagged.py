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
    hold values of its user's: one constant but 0 or 1, such a constant in one gate of an LSTM or GRU, or biases that all lie on
    one side of what torch draws.

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
    if values is not None and (kept := _set_by_the_user(owner, role, values)) is not None:
        start = 1 if role == "norm" else 0
        raise ConfigError(
            name, f"holds {_shown(kept)}, and its start at {start} would replace that: {hint}", allowed=_STARTS
        )
    return role


def _is_known(owner: nn.Module, local_name: str) -> bool:
    """Return whether a class is known to have a plain bias of this name.

    The name counts as well: a mixer of transformers, or a subclass of nn.Linear, may hold a dt_bias of its own.
    """
    kinds = (kind for kind in type(owner).__mro__ if kind not in (nn.Module, object))
    roots = {kind.__module__.partition(".")[0] for kind in kinds}
    return bool(roots & {"torch", "transformers", "supar_sweep"} and _PLAIN_BIAS.fullmatch(local_name))


def _set_by_the_user(owner: nn.Module, role: Role, values: Tensor) -> Tensor | None:
    """Return values that somebody must have set, or None: a constant, or numbers that torch's own start does not reach."""
    if values.numel() == 0:
        return None
    bound, first = _default_bound(owner), float(values.flatten()[0])
    if bool((values == first).all()):
        # Gemma's norms multiply by 1 + gain and start it at 0, torch's own do not
        usual = (0.0, 1.0) if role == "bias" or isinstance(owner, _NORMS) else (1.0,)
        random = values.numel() == 1 and abs(first) <= bound  # one number is a constant whatever it is
        return None if first in usual or random else values
    if role == "bias" and _beyond(values, bound):  # as the dt of Mamba, or a head's log frequencies
        return values
    if isinstance(owner, RNNBase | RNNCellBase) and owner.hidden_size > 1 and not values.numel() % owner.hidden_size:
        for start in range(0, values.numel(), owner.hidden_size):
            gate = values[start : start + owner.hidden_size]  # a forget gate's 1 stands among random numbers
            of_gate = float(gate[0])
            if (of_gate != 0 and bool((gate == of_gate).all())) or _beyond(gate, bound):
                return gate
    return None


def _beyond(values: Tensor, bound: float) -> bool:
    """Return whether all values lie on one side of [-bound, bound], for a known bound > 0."""
    return bound > 0 and (float(values.min()) > bound or float(values.max()) < -bound)


def _default_bound(owner: nn.Module) -> float:
    """Return the largest bias of torch's default start; 0 where its owner has no random one."""
    if isinstance(owner, RNNBase | RNNCellBase):
        return 1 / math.sqrt(max(1, owner.hidden_size))
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return 0.0
    if isinstance(owner, nn.Bilinear):
        return 1 / math.sqrt(max(1, owner.in1_features))
    return 1 / math.sqrt(max(1, weight[0].numel()))


def _shown(values: Tensor) -> str:
    lowest, highest = float(values.min()), float(values.max())
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
