"""`supar-sweep transfer`: base hyperparameters + a target -> its own, each with rule and source."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from supar_sweep.cli.idle import refuse_for_transfer
from supar_sweep.cli.output import emit, say
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import decode, encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import COLUMNS, ROLES, SITES, Quantity, Role, find_rule, formula
from supar_sweep.rules.transfer import RoleHParams, forward_multipliers, role_hparams
from supar_sweep.sweep.tables import render

# Norms and hidden biases stand for their roles by those inside the blocks, where depth rules act.
IN_BLOCK: tuple[Role, ...] = ("hidden", "hidden_residual", "norm", "bias")
QUANTITIES: tuple[tuple[str, Quantity], ...] = (
    ("init_std", "init_var"),
    ("lr", "lr"),
    ("weight_decay", "weight_decay"),
    ("eps", "eps"),
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The shape to transfer to.

    Args:
        width: d_model; a multiple of model.d_head.
        density: 0 < density <= 1.
        n_layer: number of blocks.
    """

    width: int
    density: float
    n_layer: int


def transfer(settings: Settings) -> int:
    """Print what a target is trained with; return 0."""
    refuse_for_transfer(settings.given(), settings.plain)
    cell = target_cell(settings)
    # all that may fail comes before the first line of output
    rows, said = (
        list(factor_rows(cell)),
        [*held_fixed(cell), *(f"warning: {line}" for line in warnings(cell, settings))],
    )
    match settings.format:
        case "json":
            sys.stdout.write(json.dumps(remapped(cell), indent=2, allow_nan=False) + "\n")
        case "yaml":
            import yaml

            sys.stdout.write(yaml.safe_dump(remapped(cell), sort_keys=False))
        case _:
            emit(rows, format=settings.format, title=_title(cell))
    for line in said:
        say(line)
    return 0


def say_remapped(settings: Settings) -> None:
    """Write to stderr what the grid's SuPar targets are trained with, and what to hold fixed."""
    cells = [point.cell for point in settings.points() if point.cell.parameterization == "supar"]
    if not cells:
        return
    rows = []
    for cell in dict.fromkeys(replace(each, hparams=settings.cell().hparams) for each in cells):
        hidden = at_role(cell, "hidden")
        shape = {"width": cell.model.width, "density": cell.density, "n_layer": cell.model.n_layer}
        factor = cell.ratios().m_d * cell.ratios().m_rho
        numbers = {"init_std": hidden.init_std, "lr": hidden.lr}
        rows.append({**shape, "m_d m_rho": factor, **numbers, "seed": cell.seed})
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    columns = [name for name in first[0] if name != "seed"]
    say(render(first, columns, title="hidden weights of the targets (SuPar)").rstrip())
    say(held_fixed(cells[0])[0])


def target_cell(settings: Settings) -> CellConfig:
    """Return the settings' cell at the target's shape.

    Raises:
        ConfigError: a shape that does not exist, named by the key the user would type.
    """
    shape = decode(Target, settings.plain["target"], prefix="target")
    plain = settings.cell_plain()
    plain["model"] = {**plain["model"], "width": shape.width, "n_layer": shape.n_layer}
    plain["density"] = shape.density
    typed = {"model.width": "target.width", "density": "target.density"}
    typed["model.n_layer"] = "target.n_layer"
    try:
        return decode(CellConfig, plain)
    except ConfigError as error:
        given = settings.given("target")
        error.key = typed[error.key] if typed.get(error.key) in given else error.key
        raise


def remapped(cell: CellConfig) -> dict[str, Any]:
    """Return {"base", "target", "roles", "multipliers"}, plus "layers" where densities differ.

    Args:
        cell: the target.
    """
    ratios = cell.ratios()
    multipliers = forward_multipliers(cell.method(), ratios, cell.hparams, d_head=cell.model.d_head)
    plain = {
        "base": {
            **(encode(cell.base) or {"width": cell.model.width, "n_layer": cell.model.n_layer}),
            "density": 1.0,
            **encode(cell.hparams),
            "eps": cell.optimizer.eps,
            "parameterization": cell.parameterization,
            "optimizer": cell.optimizer.name,
        },
        "target": {
            "width": cell.model.width,
            "density": cell.density,
            "n_layer": cell.model.n_layer,
            "m_d": ratios.m_d,
            "m_rho": ratios.m_rho,
            "m_L": ratios.m_L,
        },
        "roles": {role: encode(at_role(cell, role)) for role in ROLES},
        "multipliers": encode(multipliers),
    }
    if layers := layer_rows(cell):
        plain["layers"] = layers
    return plain


def at_role(cell: CellConfig, role: Role, density: float | None = None) -> RoleHParams:
    """Return what a role is trained with, at the cell's density or at a layer's own."""
    return role_hparams(
        role,
        cell.method(),
        cell.ratios(density),
        cell.hparams,
        in_block=role in IN_BLOCK,
        eps=cell.optimizer.eps,
    )


def layer_rows(cell: CellConfig) -> dict[str, dict[str, Any]]:
    """Return layer -> its density and hyperparameters; nothing where all layers share one."""
    from supar_sweep.sparse.density import live_counts
    from supar_sweep.training.cost import sparse_shapes

    if cell.layer_density == "uniform" or cell.density == 1:
        return {}
    shapes = sparse_shapes(cell)
    rows: dict[str, dict[str, Any]] = {}
    for name, live in live_counts(cell.layer_density, shapes, cell.density).items():
        own = live / (shapes[name][0] * shapes[name][1])
        role: Role = "hidden_residual" if name.endswith((".out", ".down")) else "hidden"
        rows[name] = {"role": role, "density": own, **encode(at_role(cell, role, own))}
    return rows


def factor_rows(cell: CellConfig) -> Iterator[dict[str, Any]]:
    """Yield one row a number: base value, formula, factor, value at the target, source."""
    method, hparams = cell.method(), cell.hparams
    bases = {**encode(hparams), "eps": cell.optimizer.eps}
    for role in ROLES:
        values = encode(at_role(cell, role))
        for name, quantity in QUANTITIES:
            rule = find_rule(quantity, role, method.optimizer)
            text = formula(quantity, role, method, in_block=role in IN_BLOCK)
            if rule is None or text is None:
                continue
            if quantity == "init_var" and text not in ("0", "1"):
                text = f"({text})^1/2"
            if quantity == "weight_decay" and method.decay_mode == "independent" and text != "0":
                text = f"{text} / lr"
            base, value = bases[name], values[name]
            yield _row(role, name, base, text, value / base if base else math.nan, value, rule.source)
    sites = encode(forward_multipliers(method, cell.ratios(), hparams, d_head=cell.model.d_head))
    for site in SITES:
        rule = find_rule("forward", site, method.optimizer)
        text = formula("forward", site, method, in_block=site == "residual")
        assert rule is not None and text is not None
        yield _row(site, "multiplier", 1.0, text, sites[site], sites[site], rule.source)
    for name, layer in layer_rows(cell).items():
        for quantity_name in ("init_std", "lr", "weight_decay"):
            base, value = bases[quantity_name], layer[quantity_name]
            text = f"{layer['role']} at density {layer['density']:.6g}"
            factor = value / base if base else math.nan
            yield _row(name, quantity_name, base, text, factor, value, "SuPar app. D.4")


def _row(where: str, quantity: str, base: Any, text: str, factor: float, value: Any, source: str) -> dict[str, Any]:
    return {
        "where": where,
        "quantity": quantity,
        "base": base,
        "formula": text,
        "factor": None if math.isnan(factor) else factor,
        "value": value,
        "source": source,
    }


def _title(cell: CellConfig) -> str:
    ratios, model = cell.ratios(), cell.model
    return (
        f"{cell.parameterization}, {cell.optimizer.name}: "
        f"width {model.width}, density {cell.density:g}, n_layer {model.n_layer} "
        f"(m_d {ratios.m_d:g}, m_rho {ratios.m_rho:g}, m_L {ratios.m_L:g})"
    )


def fixed_settings(cell: CellConfig) -> dict[str, Any]:
    """Return what must be the same at the proxy and at the target, by name."""
    train, schedule = cell.train, cell.schedule
    return {
        "tokens": train.steps * train.batch_seqs * cell.model.context_tokens,
        "batch_tokens": train.batch_seqs * cell.model.context_tokens,
        "schedule": schedule.name,
        "final_lr_fraction": schedule.final_lr_fraction,
        "warmup_share": round(schedule.warmup_steps / train.steps, 3),
        **{name: value for name, value in encode(cell.model).items() if name not in ("width", "n_layer")},
        "depth": cell.depth,
        "depth_alpha": cell.depth_alpha,
        "data": cell.data.name,
        "optimizer_name": cell.optimizer.name,
        "optimizer": encode(replace(cell.optimizer, clip_norm=None)),
        "clip_norm": cell.optimizer.clip_norm,
    }


def held_fixed(cell: CellConfig) -> list[str]:
    """Return what the user must keep the same between proxy and target, as lines of text."""
    fixed = fixed_settings(cell)
    shown = ", ".join(f"{name} {fixed[name]}" for name in ("tokens", "batch_tokens", "schedule", "warmup_share"))
    return [f"hold fixed from the proxy to the target: {shown}; and the data, d_head, the optimizer"]


def warnings(cell: CellConfig, settings: Settings) -> list[str]:
    """Return where proxy (as far as it is known) and target differ in what must be held fixed, and what the target
    asks of the rules beyond their reach.

    Args:
        cell: the target.
        settings: with the lineage of the hyperparameters, where they came from a file.
    """
    found: list[str] = []
    winner, now = settings.winner, fixed_settings(cell)
    tuned_at: Mapping[str, Any] = (winner.tuned_at if winner else settings.plain.get("tuned_at")) or {}
    if winner and winner.lineage.get("proxy"):
        proxy = decode(CellConfig, winner.lineage["proxy"], prefix="lineage.proxy")
        found += _departures(fixed_settings(proxy), now)
        if (proxy.parameterization == "sp") != (cell.parameterization == "sp"):
            found.append(f"tuned with {proxy.parameterization}, which is no base for {cell.parameterization}")
    elif tuned_at:
        for name in tuned_at:
            if name not in now:
                raise ConfigError(f"tuned_at.{name}", "unknown key", allowed=tuple(now), nearest_to=str(name))
        found += _departures(tuned_at, now)
        found.append(f"not known of the proxy: {', '.join(name for name in now if name not in tuned_at)}")
    elif winner:
        found.append("the file says nothing of its proxy, so nothing could be compared")
    if winner and winner.base is None:
        found.append(f"the file names no base, so its numbers are taken to be in units of {encode(cell.base)}")
    elif winner and winner.base != cell.base:
        found.append(f"base: tuned in units of {encode(winner.base)}, used with {encode(cell.base)}")
    if cell.ratios().m_L != 1 and cell.depth != "completep":
        found.append(f"m_L = {cell.ratios().m_L:g}: only depth=completep carries learning rates over depth")
    if cell.pruned_for() == "current":
        found.append(
            "sparsity.hparams_density=current: a run starts dense, with the init and lr of density 1; what stands here "
            "is what its lr comes to at the final density"
        )
    return found + few_live_lines([cell])


def few_live_lines(cells: Iterable[CellConfig]) -> list[str]:
    """Return one line that names the shapes whose sparsest layer has too few live weights a neuron for the rules to hold.

    Args:
        cells: of the built-in GPT.
    """
    from supar_sweep.sparse.density import FEW_LIVE, few_live, live_counts
    from supar_sweep.training.cost import sparse_shapes

    said: dict[tuple[int, float], float] = {}
    for cell in {(cell.model, cell.density, cell.layer_density): cell for cell in cells}.values():
        shapes = sparse_shapes(cell)
        fewest = few_live(shapes, live_counts(cell.layer_density, shapes, cell.density))
        if fewest is not None:
            key = (cell.model.width, cell.density)
            said[key] = min(fewest[1], said.get(key, fewest[1]))
    if not said:
        return []
    fewest_first = sorted((live, width, density) for (width, density), live in said.items())
    where = [f"width {width}, density {density:.6g}" for _, width, density in fewest_first]
    more = [f"{live:.3g} ({shape})" for (live, *_), shape in zip(fewest_first[1:4], where[1:4], strict=True)]
    more += [f"{len(where) - 4} further shapes"] if len(where) > 4 else []
    text = ", ".join([f"{fewest_first[0][0]:.3g} live weights a neuron ({where[0]})", *more])
    return [f"{text}: {FEW_LIVE}"]


def say_few_live(cells: Iterable[CellConfig]) -> None:
    """Warn of a grid's shapes at which SuPar's corrections are asked of too few live weights a neuron.

    Args:
        cells: of the grid; those of other rules, and of a training function of the user's own, are passed over.
    """
    corrected = (
        cell for cell in cells if cell.train.target is None and "supar" in COLUMNS[cell.parameterization].values()
    )
    for line in few_live_lines(cell for cell in corrected if cell.density < 1):
        say(f"warning: {line}")


def _departures(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting known of the proxy that the target has otherwise (numbers: by more than 1%)."""

    def same(one: Any, other: Any) -> bool:
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return math.isclose(one, other, rel_tol=0.01) if numbers else bool(one == other)

    return [
        f"{name}: {before[name]} at the proxy, {now[name]} at the target"
        for name in now
        if name in before and not same(before[name], now[name])
    ]
