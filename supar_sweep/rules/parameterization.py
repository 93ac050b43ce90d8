"""THE rule table: how init, learning rate, decay, eps and forward multipliers scale with shape. No torch.

Every rule of SP, muP and SuPar stands here, once, as data. A rule is a product of powers, written as in the papers:
"m_d^-1 m_rho^-1" is 1 / (m_d * m_rho). The symbols:

    m_d        fan_in / base fan_in (the width ratio)          m_rho      density / base density (the base is dense)
    m_L        n_layer / base n_layer                          2n_layer   2 * n_layer of the target, absolute
    d_head     head dimension, fixed as width grows            alpha      CompleteP's depth exponent, 1/2 <= alpha <= 1
    alpha_in, alpha_out   tuned multipliers of the embedding's output and of the logits

Sources: SuPar = Dey, Bergsma, Hestness 2024 (arXiv:2405.15743). [code] = the authors' public minimal code.
TP5 = Yang et al. 2022 (arXiv:2203.03466). CP = Dey et al. 2025, CompleteP (arXiv:2505.01618). [here] = chosen and tested in
this project because the papers are silent; docs/design.md says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import Ratios

RULES_VERSION = 1
"""Part of every cell's identity: raised whenever a number below changes, or the noise or the masks (sparse/noise.py) do."""

Role = Literal["embedding", "hidden", "hidden_residual", "head", "norm", "bias", "own"]
Quantity = Literal["init_var", "lr", "weight_decay", "eps", "forward"]
Site = Literal["embedding_output", "logits", "attention_scale", "residual"]
Parameterization = Literal["sp", "mup", "supar", "init_only", "lr_only"]
OptimizerName = Literal["adamw", "sgd"]
DepthRule = Literal["none", "gpt2", "completep"]
SpStart = Literal["mup_dense", "own"]
DecayMode = Literal["scaled", "coupled", "independent"]

ALL_ROLES: tuple[Role, ...] = get_args(Role)
ROLES: tuple[Role, ...] = tuple(role for role in ALL_ROLES if role != "own")
"""The roles whose start the rules write. `own`, of a model of the user's own, keeps its start and is else trained as a bias."""

SITES: tuple[Site, ...] = get_args(Site)
PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
SPARSE_ROLES: tuple[Role, ...] = ("hidden", "hidden_residual")
"""The roles that carry masks. Everything else stays dense, so its m_rho is 1."""


@dataclass(frozen=True)
class Rule:
    """One row: how one quantity of one role scales, in each column.

    Args:
        quantity: what is scaled. `forward` rows are multipliers inside the forward pass.
        where: a role, or for `forward` rows the site.
        sp, mup, supar: the factor on the base value, as a product of powers.
        optimizer: the optimizer that the row holds for; None = any.
        gpt2, completep: the further factor of the depth rule, for parameters inside residual blocks only.
        source: paper, table, row.
    """

    quantity: Quantity
    where: Role | Site
    sp: str
    mup: str
    supar: str
    source: str
    optimizer: OptimizerName | None = None
    gpt2: str = "1"
    completep: str = "1"


_SUPAR_T1 = "SuPar table 1"
_TP5 = "TP5 table 8 (SGD column), with logits multiplier 1/m_d and raw gradients [here]; SuPar app. D.3.1"

# fmt: off
TABLE: tuple[Rule, ...] = (
    #    quantity      where               SP      muP        SuPar
    Rule("init_var", "embedding",         "1",    "1",       "1",               f"{_SUPAR_T1}, embedding init"),
    Rule("init_var", "hidden",            "1",    "m_d^-1",  "m_d^-1 m_rho^-1", f"{_SUPAR_T1}, hidden init"),
    Rule("init_var", "hidden_residual",   "1",    "m_d^-1",  "m_d^-1 m_rho^-1", f"{_SUPAR_T1}, hidden init; depth [code]",
         gpt2="2n_layer^-1"),
    Rule("init_var", "head",              "1",    "1",       "1",               f"{_SUPAR_T1}, unembedding init"),
    Rule("init_var", "norm",              "0",    "0",       "0",               "starts at the constant 1"),
    Rule("init_var", "bias",              "0",    "0",       "0",               "starts at the constant 0"),
    Rule("init_var", "own",               "0",    "0",       "0",               "keeps the values that it has"),

    Rule("lr", "embedding",               "1",    "1",       "1",               f"{_SUPAR_T1}, embedding LR", "adamw"),
    Rule("lr", "hidden",                  "1",    "m_d^-1",  "m_d^-1 m_rho^-1", f"{_SUPAR_T1}, hidden LR; CP table 1", "adamw",
         completep="m_L^(alpha-1)"),
    Rule("lr", "hidden_residual",         "1",    "m_d^-1",  "m_d^-1 m_rho^-1", f"{_SUPAR_T1}, hidden LR; CP table 1", "adamw",
         completep="m_L^(alpha-1)"),
    Rule("lr", "head",                    "1",    "1",       "1",               f"{_SUPAR_T1}, unembedding LR", "adamw"),
    Rule("lr", "norm",                    "1",    "1",       "1",               "CP table 1, pre-LN LR", "adamw",
         completep="m_L^(alpha-1)"),
    Rule("lr", "bias",                    "1",    "1",       "1",               "CP table 1, hidden bias LR", "adamw",
         completep="m_L^(alpha-1)"),
    Rule("lr", "own",                     "1",    "1",       "1",               "as a bias [here]", "adamw",
         completep="m_L^(alpha-1)"),

    Rule("lr", "embedding",               "1",    "m_d",     "m_d",             _TP5, "sgd"),
    Rule("lr", "hidden",                  "1",    "1",       "m_rho^-1",        _TP5, "sgd"),
    Rule("lr", "hidden_residual",         "1",    "1",       "m_rho^-1",        _TP5, "sgd"),
    Rule("lr", "head",                    "1",    "m_d",     "m_d",             _TP5, "sgd"),
    Rule("lr", "norm",                    "1",    "m_d",     "m_d",             _TP5, "sgd"),
    Rule("lr", "bias",                    "1",    "m_d",     "m_d",             _TP5, "sgd"),
    Rule("lr", "own",                     "1",    "m_d",     "m_d",             "as a bias [here]", "sgd"),

    # decay mode `scaled`: lr * weight_decay, the share of a weight that one step removes, is the same at every shape
    Rule("weight_decay", "embedding",       "1",  "1",       "1",               "[here] lr * wd constant", "adamw"),
    Rule("weight_decay", "hidden",          "1",  "m_d",     "m_d m_rho",       "CP table 1 for m_d; m_rho [here]", "adamw"),
    Rule("weight_decay", "hidden_residual", "1",  "m_d",     "m_d m_rho",       "CP table 1 for m_d; m_rho [here]", "adamw"),
    Rule("weight_decay", "head",            "1",  "1",       "1",               "[here] lr * wd constant", "adamw"),
    Rule("weight_decay", "embedding",       "1",  "m_d^-1",  "m_d^-1",          "[here] lr * wd constant", "sgd"),
    Rule("weight_decay", "hidden",          "1",  "1",       "m_rho",           "[here] lr * wd constant", "sgd"),
    Rule("weight_decay", "hidden_residual", "1",  "1",       "m_rho",           "[here] lr * wd constant", "sgd"),
    Rule("weight_decay", "head",            "1",  "m_d^-1",  "m_d^-1",          "[here] lr * wd constant", "sgd"),
    Rule("weight_decay", "norm",            "0",  "0",       "0",               "[code] only weights of >= 2 dimensions decay"),
    Rule("weight_decay", "bias",            "0",  "0",       "0",               "[code] only weights of >= 2 dimensions decay"),
    Rule("weight_decay", "own",             "0",  "0",       "0",               "as a bias [here]"),

    # the logits multiplier makes every gradient fall as 1/m_d, and density leaves gradients alone
    Rule("eps", "embedding",              "1",    "m_d^-1",  "m_d^-1",          "gradients ~ 1/m_d [here]", "adamw"),
    Rule("eps", "hidden",                 "1",    "m_d^-1",  "m_d^-1",          "CP table 1, eps in blocks", "adamw",
         completep="m_L^-alpha"),
    Rule("eps", "hidden_residual",        "1",    "m_d^-1",  "m_d^-1",          "CP table 1, eps in blocks", "adamw",
         completep="m_L^-alpha"),
    Rule("eps", "head",                   "1",    "m_d^-1",  "m_d^-1",          "gradients ~ 1/m_d [here]", "adamw"),
    Rule("eps", "norm",                   "1",    "m_d^-1",  "m_d^-1",          "CP table 1, eps in blocks", "adamw",
         completep="m_L^-alpha"),
    Rule("eps", "bias",                   "1",    "m_d^-1",  "m_d^-1",          "CP table 1, eps in blocks", "adamw",
         completep="m_L^-alpha"),
    Rule("eps", "own",                    "1",    "m_d^-1",  "m_d^-1",          "as a bias [here]", "adamw",
         completep="m_L^-alpha"),

    Rule("forward", "embedding_output",   "1",    "alpha_in",          "alpha_in",          f"{_SUPAR_T1}, embedding forward"),
    Rule("forward", "logits",             "1",    "alpha_out m_d^-1",  "alpha_out m_d^-1",  f"{_SUPAR_T1}, unembedding forward"),
    Rule("forward", "attention_scale",    "d_head^-1/2", "d_head^-1",  "d_head^-1",         f"{_SUPAR_T1}, attention logits"),
    Rule("forward", "residual",           "1",    "1",       "1",               "CP table 1, residual branch",
         completep="m_L^-alpha"),
)

# Which column each parameterization reads. The ablations (SuPar figs 13, 14) mix two columns.
COLUMNS: Mapping[Parameterization, Mapping[Literal["init_var", "rest"], Literal["sp", "mup", "supar"]]] = {
    "sp":        {"init_var": "sp",    "rest": "sp"},
    "mup":       {"init_var": "mup",   "rest": "mup"},
    "supar":     {"init_var": "supar", "rest": "supar"},
    "init_only": {"init_var": "supar", "rest": "mup"},   # muP + SuPar's init correction only
    "lr_only":   {"init_var": "mup",   "rest": "supar"},  # muP + SuPar's LR (and decay) correction only
}
# fmt: on

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "parameterization": PARAMETERIZATIONS,
    "optimizer": get_args(OptimizerName),
    "depth": get_args(DepthRule),
    "sp_start": get_args(SpStart),
    "decay_mode": get_args(DecayMode),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Which rules apply.

    Args:
        parameterization: sp, mup, supar, or an ablation (init_only, lr_only).
        optimizer: adamw or sgd.
        depth: `gpt2` = the extra 1/sqrt(2 n_layer) on the residual projections' init [code]; `completep` = residual
            branches times m_L^-alpha and CompleteP's depth columns; `none` = neither.
        depth_alpha: CompleteP's alpha in [0.5, 1]; read only where depth = completep.
        sp_start: where SP's weights start: `mup_dense` = muP's dense weights at the target's width (the paper's SP:
            .02166 at width 4096 = .08665602 / sqrt(16)), `own` = init_std as it stands.
        lr_density_exponent: a: hidden weights' lr goes as density^-a, and their scaled weight decay as density^a, whatever the
            column says; None = the column (SuPar's is 1, SP's and muP's 0).
        decay_mode: `scaled` (the table), `coupled` (weight_decay as it stands, [code]), `independent` (a weight shrinks by
            weight_decay a step, whatever the learning rate, as in u-muP).

    Raises:
        ConfigError: an unknown name, CompleteP with SGD (nobody has published that rule), or alpha out of range.
    """

    parameterization: Parameterization
    optimizer: OptimizerName = "adamw"
    depth: DepthRule = "gpt2"
    depth_alpha: float = 1.0
    sp_start: SpStart = "mup_dense"
    decay_mode: DecayMode = "scaled"
    lr_density_exponent: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(name, "unknown choice", value=value, allowed=allowed, nearest_to=str(value))
        if self.depth == "completep" and self.optimizer == "sgd":
            raise ConfigError("depth", "completep has no rule for sgd", value=self.depth, allowed=("none", "gpt2"))
        if not 0.5 <= self.depth_alpha <= 1:
            raise ConfigError("depth_alpha", "out of range", value=self.depth_alpha, allowed="0.5 <= alpha <= 1")


def find_rule(quantity: Quantity, where: Role | Site, optimizer: OptimizerName) -> Rule | None:
    """Return the one row for a quantity and a role or site, or None where the optimizer has no such quantity (SGD's eps).

    Args:
        quantity: the quantity.
        where: the role, or the site of a forward multiplier.
        optimizer: the optimizer.
    """
    rows = [
        rule
        for rule in TABLE
        if rule.quantity == quantity and rule.where == where and rule.optimizer in (None, optimizer)
    ]
    assert len(rows) <= 1, f"two rules for {quantity} of {where}"
    return rows[0] if rows else None


def formula(quantity: Quantity, where: Role | Site, method: Method, *, in_block: bool) -> str | None:
    """Return the factor as text, e.g. "m_d^-1 m_rho^-1", or None where the optimizer has no such quantity.

    Args:
        quantity: the quantity.
        where: the role, or the site of a forward multiplier.
        method: the rules in force.
        in_block: whether the parameter sits inside a residual block (depth rules act only there).
    """
    rule = find_rule(quantity, where, method.optimizer)
    if rule is None:
        return None
    column = COLUMNS[method.parameterization]["init_var" if quantity == "init_var" else "rest"]
    if quantity == "init_var" and method.parameterization == "sp" and method.sp_start == "mup_dense":
        column = COLUMNS["mup"]["init_var"]
    text: str = getattr(rule, column)
    if quantity == "weight_decay" and text != "0" and method.decay_mode != "scaled":
        text = "1"
    elif quantity in ("lr", "weight_decay") and where in SPARSE_ROLES and method.lr_density_exponent is not None:
        # lr * weight_decay, the share that a step removes, stays what it is
        text = _with_density(text, method.lr_density_exponent * (-1 if quantity == "lr" else 1))
    factor = getattr(rule, method.depth) if in_block and method.depth != "none" else "1"
    return " ".join(part for part in (text, factor) if part != "1") or "1"


def _with_density(text: str, exponent: float) -> str:
    """Return a factor with its power of m_rho replaced."""
    parts = [part for part in text.split() if part != "1" and not part.startswith("m_rho")]
    if exponent:
        parts.append("m_rho" if exponent == 1 else f"m_rho^{exponent:.12g}")
    return " ".join(parts) or "1"


def multiplier(
    quantity: Quantity,
    where: Role | Site,
    method: Method,
    ratios: Ratios,
    *,
    in_block: bool,
    alpha_in: float = 1.0,
    alpha_out: float = 1.0,
    d_head: int | None = None,
) -> float | None:
    """Return the factor as a number: value at the target = multiplier * base value. None where there is no such quantity.

    Args:
        quantity: init_var (a variance: the standard deviation's factor is its root), lr, weight_decay, eps or forward.
        where: the role, or the site of a forward multiplier.
        method: the rules in force.
        ratios: the layer's own ratios; dense roles ignore m_rho because their rows do not name it.
        in_block: whether the parameter sits inside a residual block.
        alpha_in, alpha_out: the tuned multipliers, for the forward rows that name them.
        d_head: head dimension, >= 1; needed for the attention row, read nowhere else.
    """
    text = formula(quantity, where, method, in_block=in_block)
    if text is None:
        return None
    symbols = {
        "m_d": ratios.m_d,
        "m_rho": ratios.m_rho,
        "m_L": ratios.m_L,
        "2n_layer": 2.0 * ratios.n_layer,
        "alpha_in": alpha_in,
        "alpha_out": alpha_out,
    }
    if d_head is not None:
        symbols["d_head"] = float(d_head)
    value = 1.0
    for symbol, power, per_alpha in parse_factor(text):
        if symbol == "0":
            return 0.0
        exponent = power + per_alpha * method.depth_alpha
        # a root taken by sqrt is exact where pow may be off by one ulp, and the test vectors are exact
        base = symbols[symbol]
        value *= math.sqrt(base) ** round(2 * exponent) if exponent % 1 == 0.5 else base**exponent
    return value


@lru_cache(maxsize=1024)
def parse_factor(text: str) -> tuple[tuple[str, float, float], ...]:
    """Return the powers of a factor as (symbol, constant exponent, exponent per alpha); "0" and "1" stand for themselves.

    Args:
        text: a product of powers separated by blanks: "1", "0", "m_d^-1 m_rho^-1", "d_head^-1/2", "m_L^(alpha-1)".

    Raises:
        ValueError: a symbol or an exponent that the table's language does not have.
    """
    known = {"m_d", "m_rho", "m_L", "2n_layer", "alpha_in", "alpha_out", "d_head"}
    depth_powers = {"-alpha": (0.0, -1.0), "(alpha-1)": (-1.0, 1.0)}
    powers: list[tuple[str, float, float]] = []
    for token in text.split():
        symbol, _, exponent = token.partition("^")
        if token == "1":
            continue
        if token == "0":
            powers.append(("0", 1.0, 0.0))
        elif symbol not in known:
            raise ValueError(f"unknown symbol {symbol!r} in rule {text!r}; known: {sorted(known)}")
        elif exponent in depth_powers:
            powers.append((symbol, *depth_powers[exponent]))
        else:
            numerator, _, denominator = (exponent or "1").partition("/")
            powers.append((symbol, float(numerator) / float(denominator or 1), 0.0))
    return tuple(powers)
