"""The modules of a model by name, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
"""They hold the model as `module`, a name that a submodule of the user's own may have too."""

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile, activation checkpointing and FSDP1 call the module that they wrap."""


def named_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (prefix, module) of a module and all below it, each once, in the order of named_modules().

    A prefix is "" or ends in a dot; what wrappers put into the path is not in it.

    Args:
        module: any nn.Module.
    """
    seen: set[int] = set()

    def below(prefix: str, owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        yield prefix, owner
        for name, child in owner._modules.items():
            if child is not None:
                wraps = name in _WRAPPED or (name == "module" and isinstance(owner, _WRAPPERS))
                yield from below(prefix if wraps else f"{prefix}{name}.", child)

    return below("", module)
