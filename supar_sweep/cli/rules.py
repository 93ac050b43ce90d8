"""`supar-sweep rules`: the rule table, or what each parameter of a model gets and how it starts."""

from __future__ import annotations

import sys
from typing import Any

from supar_sweep.cli.output import emit
from supar_sweep.cli.settings import CELL_KEYS, Settings
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import TABLE
from supar_sweep.sweep.tables import FORMATS
from supar_sweep.training.cost import count_parameters
from supar_sweep.training.environment import is_out_of_memory, memory_of_machine_gb

COLUMNS = {
    "quantity": "quantity",
    "where": "of",
    "optimizer": "optimizer",
    "sp": "SP",
    "mup": "muP",
    "supar": "SuPar",
    "gpt2": "depth: gpt2",
    "completep": "depth: completep",
    "source": "source",
}
PARAMETER_COLUMNS = (*("name", "role", "shape", "density", "init_std", "measured_std", "lr", "weight_decay", "eps"),)


def rules(settings: Settings) -> int:
    """Print the rule table, or with show=parameters one line a parameter; return 0."""
    show = settings.plain["show"]
    if show not in ("auto", "table", "parameters"):
        raise ConfigError("show", "unknown choice", value=show, allowed=("auto", "table", "parameters"))
    if show == "parameters" or (show == "auto" and settings.given(*CELL_KEYS, "hparams_file")):
        return _parameters(settings)
    if settings.format == "markdown":
        sys.stdout.write(markdown())
    else:
        emit(rule_rows(), COLUMNS, settings.format)
    return 0


def rule_rows() -> list[dict[str, Any]]:
    """Return the rule table, one plain row a rule: its factor in each column, and its source."""
    return [{**{name: getattr(rule, name) for name in COLUMNS}, "optimizer": rule.optimizer or "any"} for rule in TABLE]


def markdown() -> str:
    """Return the rule table in Markdown, as docs/rules.md shows it: roles with the same factors share a row."""
    factors = ("sp", "mup", "supar", "gpt2", "completep")
    grouped: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    for row in rule_rows():
        key = (row["quantity"], row["optimizer"], *(row[name] for name in factors))
        group = grouped.setdefault(key, {"where": [], "source": []})
        for name, texts in group.items():
            if row[name] not in texts:
                texts.append(row[name])
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|" + "---|" * len(COLUMNS)]
    for (quantity, optimizer, *values), group in grouped.items():
        cells = [quantity, ", ".join(group["where"]), optimizer]
        lines.append(f"| {' | '.join([*cells, *(f'`{value}`' for value in values), '; '.join(group['source'])])} |")
    return "\n".join(lines) + "\n"


def _parameters(settings: Settings) -> int:
    if settings.format == "markdown":
        raise ConfigError("format", "has no effect on show=parameters", value="markdown", allowed=FORMATS)
    cell = settings.cell()
    if cell.train.target is not None:
        raise ConfigError(
            "train.target",
            "shows nothing here: the GPT's parameters are not those of your training function",
            value=cell.train.target,
            allowed="null, or supar_sweep.parameter_rows on your own module",
        )
    _check_memory(cell)
    from supar_sweep.training.model import build
    from supar_sweep.training.roles import parameter_rows

    model = cell.model
    method = f"{cell.parameterization}, {cell.optimizer.name}"
    title = f"{method}: width {model.width}, density {cell.density:g}, n_layer {model.n_layer}"
    try:
        rows = parameter_rows(build(cell)[1])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(cell) from None
    emit(rows, PARAMETER_COLUMNS, settings.format, title=title)
    return 0


def _check_memory(cell: CellConfig) -> None:
    """Raise ConfigError where the model, which is made and measured, cannot fit in the memory that is free here."""
    if 4 * count_parameters(cell).total > 1e9 * memory_of_machine_gb():
        raise _too_large(cell)


def _too_large(cell: CellConfig) -> ConfigError:
    model, n = cell.model, count_parameters(cell).total
    shape = f"width {model.width}, n_layer {model.n_layer}, context_tokens {model.context_tokens}"
    allowed = "a smaller one; `transfer` shows a role's values at any size"
    return ConfigError(
        "model", f"has {n:.3g} parameters, which are more than fit in memory here ({shape})", allowed=allowed
    )
