"""Who a cell is: a hash of what changes its numbers. No torch.

Out of it: launcher, paths, threads, compute route, cohort, checkpoint cadence (RuntimeConfig has no
way in), and settings that have no effect where they stand. In it: the rule table's version and the
data's fingerprint. A cell's folder carries a label beside the id; the label is for people and is
never parsed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from types import NoneType
from typing import Any

from supar_sweep.config.fields import IDENTITY_DEFAULT
from supar_sweep.config.schema import CellConfig
from supar_sweep.rules.parameterization import RULES_VERSION, Quantity, formula

ID_CHARS = 16
"""Hex digits of an id: 64 bits, so that among a million cells two share one with a chance of 3e-8.
"""

SIGNIFICANT_DIGITS = 12
"""Floats are told apart to 12 digits: 2**-7 written as a power, a decimal or a range's member is
one learning rate.
"""

DATA_LOCATIONS = ("paths", "train_path", "val_path", "dataset")
"""Where the data lies. What it holds is in the fingerprint, so moving a corpus changes no id."""


def cell_id(cell: CellConfig, fingerprint: str, of_field: Callable[[Any], Any] | None = None) -> str:
    """Return the cell's id: 16 hex digits, the same everywhere and for every order of settings.

    Args:
        cell: the cell.
        fingerprint: of the corpus's contents.
        of_field: as for `canonical`.
    """
    identity = {"rules": RULES_VERSION, "data": fingerprint, "cell": canonical(cell, of_field)}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_CHARS]


def canonical(cell: CellConfig, of_field: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Return the cell as plain values with one spelling for everything that trains the same way.

    - fields added later are left out at their default (fields.later);
    - numbers have one form (1 and 1.0, 0.3 and 0.1 + 0.2);
    - what has no effect is null: SP's alphas, the start of SP elsewhere, the base where no rule
      reads it, the decay mode without decay, the layer densities and mask updates of a dense cell,
      an exponent of density that is the rule's own, the density that rules without one would read;
    - a dense cell of muP, SuPar or an ablation is muP, because they are the same there.

    A training function of the user's own may read any setting, so nothing is taken to be without
    effect for it.

    Args:
        cell: the cell.
        of_field: `decode.Once(plain_value)`, where many cells share their sections.
    """
    of_field = of_field or plain_value
    # sections are copied, as below something is taken out of them
    plain: dict[str, Any] = {
        name: dict(of_field(item)) if is_dataclass(item) else plain_value(item) for name, item in _items(cell)
    }
    for name in DATA_LOCATIONS:
        plain["data"].pop(name, None)
    if cell.train.target is not None:
        return plain
    sp, completep = cell.parameterization == "sp", cell.depth == "completep"
    plain["parameterization"] = _trained_as(cell)
    if cell.density == 1:
        plain["layer_density"] = None
        plain.pop("sparsity", None)
    elif "sparsity" in plain:
        plain["sparsity"] |= dict.fromkeys(_idle_sparsity(cell))
    if sp:
        plain["hparams"]["alpha_in"] = plain["hparams"]["alpha_out"] = None
    else:
        plain["sp_start"] = None
    if plain["base"] is not None and not completep:  # m_L stands in CompleteP's columns only
        plain["base"]["n_layer"] = None
        if sp and cell.sp_start == "own":  # and SP's own start reads no m_d
            plain["base"] = None
    if cell.hparams.weight_decay == 0:
        plain["optimizer"]["decay_mode"] = None
    return plain


def label(cell: CellConfig) -> str:
    """Return a short name for people, e.g. "supar-w256-r0.0625-lr2^-7-s0".

    The id stands beside it and is the truth.

    Args:
        cell: the cell.
    """
    log2_lr = f"{math.log2(cell.hparams.lr):.4g}"
    masks = "" if cell.mask_schedule() is None else f"-{cell.sparsity.method}"
    return f"{_trained_as(cell)}{masks}-w{cell.model.width}-r{cell.density:.4g}-lr2^{log2_lr}-s{cell.seed}"


def _idle_sparsity(cell: CellConfig) -> tuple[str, ...]:
    """Return the settings of changing masks that change no number of a sparse cell."""
    method = cell.method()
    quantities: tuple[Quantity, ...] = ("init_var", "lr", "weight_decay")

    def hidden(quantity: Quantity, *, exponent: float | None) -> str:
        return formula(quantity, "hidden", replace(method, lr_density_exponent=exponent), in_block=True) or ""

    exponent = method.lr_density_exponent
    idle = []
    if hidden("lr", exponent=exponent) == hidden("lr", exponent=None):
        idle.append("dynamic_lr_exponent")
    if not any("m_rho" in hidden(quantity, exponent=exponent) for quantity in quantities):
        idle.append("hparams_density")
    return tuple(idle)


def _trained_as(cell: CellConfig) -> str:
    """Return the cell's parameterization, or the one that a dense cell cannot be told from."""
    dense_mup = cell.density == 1 and cell.parameterization != "sp" and cell.train.target is None
    return "mup" if dense_mup else cell.parameterization


def plain_value(value: Any) -> Any:
    """Return what a field of a cell holds as plain values, of which each has one spelling; see `canonical`."""
    if isinstance(value, (str, int, NoneType)):
        return value
    if is_dataclass(value):
        return {name: plain_value(item) for name, item in _items(value)}
    if isinstance(value, float):
        rounded = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        return int(rounded) if rounded.is_integer() else rounded
    if isinstance(value, (tuple, list)):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    return value


def _items(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield each field's name and value, but for later ones at their default."""
    for name, later in _fields(config.__class__):
        item = getattr(config, name)
        if not (later and item == later[0]):
            yield name, item


@lru_cache(maxsize=64)
def _fields(cls: type[Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Return each field's name with the default at which it is left out (none for fields of the
    first release).
    """
    return tuple(
        (
            item.name,
            (item.metadata[IDENTITY_DEFAULT],) if IDENTITY_DEFAULT in item.metadata else (),
        )
        for item in fields(cls)
    )
