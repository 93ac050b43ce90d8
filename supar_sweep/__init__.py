"""SuPar sweeps: tune a small dense proxy once, train sparse models of any width and density with
the same hyperparameters.

The public names for a model and a training loop of your own (docs/examples/mlp.py is a whole
example)::

    tag                  say which role a parameter plays
    Method               which rules are in force
    HParams, Ratios      the numbers in base units; the target in units of the base
    parameterize         write weights and masks in place; a plan per parameter
    derive_ratios        the ratios of a model to one of the base shape
    check_init           measure the start, and refuse a wrong one
    check_masks          refuse dead weights that have moved, at any step
    hold_masks           keep them at 0 under an optimizer that mixes entries (Muon, SOAP, Shampoo)
    named_masks          the masks by parameter name
    param_groups         groups for any torch optimizer
    parameter_rows       the table of what each parameter is trained with
    forward_multipliers  factors for your own forward pass
    role_hparams         the numbers of one role, without a model

Importing this package loads no torch: each name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supar_sweep.errors import ConfigError as ConfigError
    from supar_sweep.errors import MaskError as MaskError
    from supar_sweep.errors import SuparError as SuparError
    from supar_sweep.rules.hparams import HParams as HParams
    from supar_sweep.rules.hparams import Ratios as Ratios
    from supar_sweep.rules.parameterization import Method as Method
    from supar_sweep.rules.transfer import forward_multipliers as forward_multipliers
    from supar_sweep.rules.transfer import role_hparams as role_hparams
    from supar_sweep.sparse.linear import named_masks as named_masks
    from supar_sweep.training.base_model import derive_ratios as derive_ratios
    from supar_sweep.training.groups import param_groups as param_groups
    from supar_sweep.training.held_masks import check_masks as check_masks
    from supar_sweep.training.held_masks import hold_masks as hold_masks
    from supar_sweep.training.plans import check_init as check_init
    from supar_sweep.training.plans import parameter_rows as parameter_rows
    from supar_sweep.training.roles import parameterize as parameterize
    from supar_sweep.training.tags import tag as tag

    __version__: str

_HOMES = {
    "ConfigError": "supar_sweep.errors",
    "MaskError": "supar_sweep.errors",
    "SuparError": "supar_sweep.errors",
    "HParams": "supar_sweep.rules.hparams",
    "Ratios": "supar_sweep.rules.hparams",
    "Method": "supar_sweep.rules.parameterization",
    "forward_multipliers": "supar_sweep.rules.transfer",
    "role_hparams": "supar_sweep.rules.transfer",
    "named_masks": "supar_sweep.sparse.linear",
    "check_init": "supar_sweep.training.plans",
    "check_masks": "supar_sweep.training.held_masks",
    "derive_ratios": "supar_sweep.training.base_model",
    "hold_masks": "supar_sweep.training.held_masks",
    "param_groups": "supar_sweep.training.groups",
    "parameter_rows": "supar_sweep.training.plans",
    "parameterize": "supar_sweep.training.roles",
    "tag": "supar_sweep.training.tags",
}

__all__ = [
    "ConfigError",
    "HParams",
    "MaskError",
    "Method",
    "Ratios",
    "SuparError",
    "check_init",
    "check_masks",
    "derive_ratios",
    "forward_multipliers",
    "hold_masks",
    "named_masks",
    "param_groups",
    "parameter_rows",
    "parameterize",
    "role_hparams",
    "tag",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("supar-sweep")
    if name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value  # found without this function from now on
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
