"""The rule table against the published numbers, and the properties that define it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import BaseShape, HParams, Ratios
from supar_sweep.rules.parameterization import (
    PARAMETERIZATIONS,
    ROLES,
    SITES,
    SPARSE_ROLES,
    TABLE,
    Method,
    find_rule,
    formula,
    multiplier,
    parse_factor,
)

OPTIMIZERS: tuple[Any, ...] = ("adamw", "sgd")
QUANTITIES: tuple[Any, ...] = ("init_var", "lr", "weight_decay", "eps")
DENSE_ROLES = tuple(role for role in ROLES if role not in SPARSE_ROLES)
ratio = st.floats(2**-6, 2**6)
density = st.floats(2**-10, 1)


def factor(quantity: Any, where: Any, method: Any, ratios: Any, *, in_block: Any = True, **more: Any) -> Any:
    return multiplier(quantity, where, method, ratios, in_block=in_block, **more)


def methods(**fixed: Any) -> Iterator[Method]:
    """Every combination of rules that may stand together."""
    axes = {
        "parameterization": PARAMETERIZATIONS,
        "optimizer": OPTIMIZERS,
        "depth": ("none", "gpt2", "completep"),
        "decay_mode": ("scaled", "coupled", "independent"),
    }
    for values in product(*axes.values()):
        chosen = {**dict(zip(axes, values, strict=True)), **fixed}
        if not (chosen["depth"] == "completep" and chosen["optimizer"] == "sgd"):
            yield Method(**chosen)


# ---------------------------------------------------------------- published numbers
@pytest.mark.parametrize(
    ("width", "rho", "m_d_m_rho", "init_std", "lr"),
    [
        (256, 1, 1, 0.08665602, 0.0162),
        (4096, 1, 16, 0.02166400, 0.0010125),
        (4096, 1 / 64, 0.25, 0.17331204, 0.0648),
        (2048, 1, 8, 0.03063753, 0.002025),
        (2048, 1 / 128, 0.0625, 0.34662408, 0.2592),
    ],
)
def test_the_papers_hidden_layers(width: int, rho: float, m_d_m_rho: float, init_std: float, lr: float) -> None:
    method = Method(parameterization="supar", depth="none")
    ratios = Ratios(m_d=width / 256, m_rho=rho)
    variance, rate = (factor(q, "hidden", method, ratios) for q in ("init_var", "lr"))
    assert variance == 1 / m_d_m_rho
    assert rate == 1 / m_d_m_rho
    assert 1.62e-2 * rate == 1.62e-2 / m_d_m_rho
    assert math.isclose(1.62e-2 * rate, lr, rel_tol=1e-12)
    # printed with 8 decimals; 0.08665602 / 4 = 0.021664005 lies right between two of them
    assert math.isclose(0.08665602 * math.sqrt(variance), init_std, rel_tol=0, abs_tol=5.001e-9)
    assert math.isclose(0.08665602 * math.sqrt(variance), 0.08665602 / math.sqrt(m_d_m_rho))


def test_sp_starts_from_mup_dense_at_the_targets_width() -> None:
    wide_sparse = Ratios(m_d=16, m_rho=1 / 64)
    start = {
        name: factor("init_var", "hidden", Method(parameterization="sp", sp_start=name), wide_sparse)
        for name in ("mup_dense", "own")
    }
    assert start == {"mup_dense": 1 / 16, "own": 1.0}
    assert round(0.08665602 * math.sqrt(start["mup_dense"]), 5) == 0.02166
    for quantity in ("lr", "weight_decay", "eps"):  # only the start is muP's
        assert factor(quantity, "hidden", Method(parameterization="sp"), wide_sparse) == 1.0


@pytest.mark.parametrize(
    ("quantity", "where", "sp", "mup", "supar"),
    [
        ("init_var", "embedding", 1, 1, 1),
        ("lr", "embedding", 1, 1, 1),
        ("forward", "embedding_output", 1, 9, 9),
        ("init_var", "hidden", 1, 1 / 8, 1 / (8 / 4)),
        ("lr", "hidden", 1, 1 / 8, 1 / (8 / 4)),
        ("weight_decay", "hidden", 1, 8, 8 / 4),
        ("forward", "logits", 1, 3 / 8, 3 / 8),
        ("forward", "attention_scale", 1 / math.sqrt(64), 1 / 64, 1 / 64),
        ("lr", "norm", 1, 1, 1),
        ("lr", "bias", 1, 1, 1),
        ("lr", "head", 1, 1, 1),
        ("eps", "embedding", 1, 1 / 8, 1 / 8),
        ("eps", "hidden", 1, 1 / 8, 1 / 8),
    ],
)
def test_adamw_rules_at_width_8x_density_quarter(
    quantity: Any, where: Any, sp: float, mup: float, supar: float
) -> None:
    ratios = Ratios(m_d=8, m_rho=1 / 4)
    columns: dict[Any, float] = {"sp": sp, "mup": mup, "supar": supar}
    for name, wanted in columns.items():
        method = Method(parameterization=name, depth="none", sp_start="own")
        got = factor(quantity, where, method, ratios, alpha_in=9, alpha_out=3, d_head=64)
        assert got == wanted, name


def test_sgd_rules_at_width_8x_density_quarter() -> None:
    ratios = Ratios(m_d=8, m_rho=1 / 4)
    for role in ROLES:
        hidden = role in SPARSE_ROLES
        columns: dict[Any, float] = {
            "sp": 1,
            "mup": 1 if hidden else 8,
            "supar": 4 if hidden else 8,
        }
        for name, value in columns.items():
            method = Method(parameterization=name, optimizer="sgd")
            assert factor("lr", role, method, ratios) == value, (role, name)
            assert factor("eps", role, method, ratios) is None


# ---------------------------------------------------------------- properties
@given(m_d=ratio, m_L=ratio, n_layer=st.integers(1, 64))
def test_supar_is_mup_at_density_1(m_d: float, m_L: float, n_layer: int) -> None:
    ratios = Ratios(m_d=m_d, m_L=m_L, n_layer=n_layer)
    for method in methods(parameterization="supar"):
        mup = Method(**{**vars(method), "parameterization": "mup"})
        for quantity, role, block in product(QUANTITIES, ROLES, (True, False)):
            both = [factor(quantity, role, m, ratios, in_block=block) for m in (method, mup)]
            assert both[0] == both[1], (quantity, role)
        for site in SITES:
            more = {"alpha_in": 3.0, "alpha_out": 2.0, "d_head": 32}
            assert factor("forward", site, method, ratios, **more) == factor("forward", site, mup, ratios, **more)


@pytest.mark.parametrize("n_layer", [1, 2, 24])
def test_everything_is_the_base_at_the_base_shape(n_layer: int) -> None:
    for method in methods():
        for quantity, role in product(QUANTITIES, ROLES):
            wanted: float | None = 1.0
            if find_rule(quantity, role, method.optimizer) is None:
                wanted = None  # SGD has no eps
            elif role in ("norm", "bias") and quantity in ("init_var", "weight_decay"):
                wanted = 0.0
            elif (quantity, role, method.depth) == ("init_var", "hidden_residual", "gpt2"):
                wanted = 1 / (2 * n_layer)  # the GPT-2 rule is absolute: the base has it too
            assert factor(quantity, role, method, Ratios(m_d=1, n_layer=n_layer)) == wanted
        scale = "-1/2" if method.parameterization == "sp" else "-1"
        for site in SITES:
            wanted = 64.0 ** float(-0.5 if scale == "-1/2" else -1)
            got = factor("forward", site, method, Ratios(m_d=1, n_layer=n_layer), d_head=64)
            assert got == (wanted if site == "attention_scale" else 1.0)


@given(a=st.tuples(ratio, density, ratio), b=st.tuples(ratio, density, ratio))
def test_base_to_a_to_b_is_base_to_b(a: tuple[float, float, float], b: tuple[float, float, float]) -> None:
    def at(triple: tuple[float, float, float]) -> Ratios:
        m_d, m_rho, m_L = triple
        return Ratios(m_d=m_d, m_rho=m_rho, m_L=m_L)

    # from a to b as if a were the base; its density ratio may exceed 1, so it is taken apart
    step_width = Ratios(m_d=b[0] / a[0], m_L=b[2] / a[2])
    for method in methods(decay_mode="scaled", depth_alpha=0.75):
        for quantity, role in product(QUANTITIES, ROLES):
            to_a, to_b = (factor(quantity, role, method, at(x)) for x in (a, b))
            if not to_a:
                assert to_a == to_b
                continue
            depth_constant = factor(quantity, role, method, Ratios(m_d=1))  # gpt2's, in every factor once
            by_shape = factor(quantity, role, method, step_width) / depth_constant
            dense_a, dense_b = (factor(quantity, role, method, Ratios(m_d=1, m_rho=x[1])) for x in (a, b))
            assert math.isclose(to_a * by_shape * dense_b / dense_a, to_b, rel_tol=1e-9)


@given(m_rho=density)
def test_density_moves_no_dense_role_and_no_forward_factor(m_rho: float) -> None:
    for method in methods():
        for quantity, role in product(QUANTITIES, DENSE_ROLES):
            sparse, dense = Ratios(m_d=1, m_rho=m_rho), Ratios(m_d=1)
            assert factor(quantity, role, method, sparse) == factor(quantity, role, method, dense)
        for site in SITES:
            got = [factor("forward", site, method, r, d_head=8) for r in (sparse, dense)]
            assert got[0] == got[1]


@given(m_d=ratio, m_rho=density, m_L=ratio)
def test_ablations_mix_the_columns(m_d: float, m_rho: float, m_L: float) -> None:
    ratios = Ratios(m_d=m_d, m_rho=m_rho, m_L=m_L, n_layer=2)
    for optimizer, role, quantity in product(OPTIMIZERS, ROLES, QUANTITIES):
        got = {
            name: factor(quantity, role, Method(parameterization=name, optimizer=optimizer), ratios)
            for name in PARAMETERIZATIONS
        }
        is_init = quantity == "init_var"
        assert got["init_only"] == got["supar" if is_init else "mup"]
        assert got["lr_only"] == got["mup" if is_init else "supar"]


@given(m_d=ratio, m_rho=density)
def test_scaled_decay_shrinks_weights_alike_at_every_shape(m_d: float, m_rho: float) -> None:
    for optimizer, role in product(OPTIMIZERS, ROLES):
        for name in ("sp", "mup", "supar", "init_only", "lr_only"):
            method = Method(parameterization=name, optimizer=optimizer)
            ratios = Ratios(m_d=m_d, m_rho=m_rho)
            lr, decay = (factor(q, role, method, ratios) for q in ("lr", "weight_decay"))
            wanted = 0.0 if role in ("norm", "bias") else 1.0
            assert math.isclose(lr * decay, wanted, rel_tol=1e-12)


@pytest.mark.parametrize("mode", ["coupled", "independent"])
def test_other_decay_modes_leave_weight_decay_as_it_stands(mode: Any) -> None:
    ratios = Ratios(m_d=8, m_rho=1 / 4)
    for optimizer, role in product(OPTIMIZERS, ROLES):
        method = Method(parameterization="supar", optimizer=optimizer, decay_mode=mode)
        wanted = 0.0 if role in ("norm", "bias") else 1.0  # 1-d parameters never decay
        assert factor("weight_decay", role, method, ratios) == wanted


# ---------------------------------------------------------------- depth
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("a", [0.0, 1 / 3, 0.5, 1.0])
def test_an_exponent_of_density_replaces_the_columns_own(parameterization: Any, optimizer: Any, a: float) -> None:
    own = Method(parameterization=parameterization, optimizer=optimizer)
    method = replace(own, lr_density_exponent=a)
    dense, sparse = Ratios(m_d=8, m_rho=1.0), Ratios(m_d=8, m_rho=0.25)
    for role, quantity in product(ROLES, QUANTITIES):
        with_a, without = (factor(quantity, role, each, sparse) for each in (method, own))
        power = {"lr": -a, "weight_decay": a}.get(quantity)
        if role not in SPARSE_ROLES or power is None:
            assert with_a == without
        else:
            assert with_a == pytest.approx(factor(quantity, role, own, dense) * 0.25**power, rel=1e-11)


def test_the_exponent_of_supar_is_1_to_the_bit() -> None:
    for optimizer, quantity in product(OPTIMIZERS, QUANTITIES):
        supar = Method(parameterization="supar", optimizer=optimizer)
        same = replace(supar, lr_density_exponent=1.0)
        assert formula(quantity, "hidden", same, in_block=False) == formula(quantity, "hidden", supar, in_block=False)


def test_decay_that_is_not_scaled_follows_no_exponent() -> None:
    modes: tuple[Any, ...] = ("coupled", "independent")
    for mode in modes:
        kept = Method(parameterization="supar", decay_mode=mode, lr_density_exponent=0.5)
        assert formula("weight_decay", "hidden", kept, in_block=False) == "1"


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_completep_columns(alpha: float) -> None:
    m_d, m_L = 8.0, 4.0
    ratios = Ratios(m_d=m_d, m_L=m_L, n_layer=8)
    method = Method(parameterization="mup", depth="completep", depth_alpha=alpha)

    def close(got: Any, wanted: float) -> bool:
        return math.isclose(got, wanted, rel_tol=1e-14)

    assert close(factor("forward", "residual", method, ratios), m_L**-alpha)
    for role in ("hidden", "hidden_residual"):
        assert close(factor("lr", role, method, ratios), m_L ** (alpha - 1) / m_d)
        assert factor("weight_decay", role, method, ratios) == m_d
        assert factor("init_var", role, method, ratios) == 1 / m_d  # no 1/(2 n_layer) on top
        assert close(factor("eps", role, method, ratios), m_L**-alpha / m_d)
    for role in ("norm", "bias"):
        assert close(factor("lr", role, method, ratios), m_L ** (alpha - 1))
        assert close(factor("eps", role, method, ratios), m_L**-alpha / m_d)
        # the final norm is in no block
        assert factor("lr", role, method, ratios, in_block=False) == 1.0
        assert factor("eps", role, method, ratios, in_block=False) == 1 / m_d


def test_completep_at_alpha_1_needs_no_lr_change_in_depth() -> None:
    method = Method(parameterization="supar", depth="completep", depth_alpha=1.0)
    for role in ROLES:
        shallow, deep = (factor("lr", role, method, Ratios(m_d=4, m_rho=1 / 8, m_L=m_L)) for m_L in (1, 32))
        assert shallow == deep
    assert factor("forward", "residual", method, Ratios(m_d=1, m_L=32)) == 1 / 32


def test_gpt2_depth_touches_the_residual_projections_start_alone() -> None:
    ratios = Ratios(m_d=4, m_rho=1 / 8, m_L=6, n_layer=12)
    for name, optimizer in product(PARAMETERIZATIONS, OPTIMIZERS):
        gpt2, none = (Method(parameterization=name, optimizer=optimizer, depth=depth) for depth in ("gpt2", "none"))
        for quantity, role in product(QUANTITIES, ROLES):
            by_gpt2, plain = (factor(quantity, role, m, ratios) for m in (gpt2, none))
            if (quantity, role) == ("init_var", "hidden_residual"):
                assert math.isclose(by_gpt2, plain / (2 * 12), rel_tol=1e-15)
            else:
                assert by_gpt2 == plain


# ---------------------------------------------------------------- the table itself
def test_every_role_has_every_quantity() -> None:
    for optimizer in OPTIMIZERS:
        for quantity, role in product(QUANTITIES, ROLES):
            rule = find_rule(quantity, role, optimizer)
            assert (rule is None) == (quantity == "eps" and optimizer == "sgd"), (quantity, role)
        for site in SITES:
            assert find_rule("forward", site, optimizer) is not None


def test_every_row_is_reachable_readable_and_has_a_source() -> None:
    for rule in TABLE:
        assert rule.source.strip()
        assert find_rule(rule.quantity, rule.where, rule.optimizer or "adamw") is rule
        for text in (rule.sp, rule.mup, rule.supar, rule.gpt2, rule.completep):
            parse_factor(text)


def test_formulas_read_as_in_the_paper() -> None:
    method = Method(parameterization="supar", depth="gpt2")
    assert formula("lr", "hidden", method, in_block=True) == "m_d^-1 m_rho^-1"
    assert formula("init_var", "hidden_residual", method, in_block=True) == "m_d^-1 m_rho^-1 2n_layer^-1"
    assert formula("init_var", "embedding", method, in_block=False) == "1"
    assert formula("eps", "hidden", Method(parameterization="sp", optimizer="sgd"), in_block=True) is None


@pytest.mark.parametrize(
    ("text", "powers"),
    [
        ("1", ()),
        ("0", (("0", 1.0, 0.0),)),
        ("m_d^-1 m_rho^-1", (("m_d", -1.0, 0.0), ("m_rho", -1.0, 0.0))),
        ("m_d", (("m_d", 1.0, 0.0),)),
        ("d_head^-1/2", (("d_head", -0.5, 0.0),)),
        ("m_L^-alpha", (("m_L", 0.0, -1.0),)),
        ("m_L^(alpha-1)", (("m_L", -1.0, 1.0),)),
    ],
)
def test_parse_factor(text: str, powers: object) -> None:
    assert parse_factor(text) == powers


@pytest.mark.parametrize("text", ["m_x", "m_d^two", "width^-1", "m_d*m_rho", "2"])
def test_parse_factor_refuses_what_the_language_lacks(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown symbol|could not convert"):
        parse_factor(text)


# ---------------------------------------------------------------- bad input
def test_completep_with_sgd_has_no_rule() -> None:
    with pytest.raises(ConfigError, match=r"depth: completep has no rule for sgd"):
        Method(parameterization="supar", optimizer="sgd", depth="completep")


@pytest.mark.parametrize("alpha", [0.49, 1.01, math.nan])
def test_depth_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match="depth_alpha"):
        Method(parameterization="mup", depth="completep", depth_alpha=alpha)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"m_d": 0}, "m_d"),
        ({"m_L": -1}, "m_L"),
        ({"m_d": math.nan}, "m_d"),
        ({"m_rho": 0}, "density"),
        ({"m_rho": 1.5}, "density"),
        ({"m_rho": math.nan}, "density"),
        ({"n_layer": 0}, "n_layer"),
    ],
)
def test_ratios_out_of_range(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        Ratios(**{"m_d": 1, **wrong})


def test_a_width_ratio_is_never_taken_for_granted() -> None:
    with pytest.raises(TypeError, match="m_d"):
        Ratios(n_layer=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("init_std", math.inf),
        ("alpha_in", -1.0),
        ("alpha_out", math.nan),
        ("weight_decay", -0.1),
    ],
)
def test_hparams_out_of_range(key: str, value: Any) -> None:
    good = {"lr": 0.01, "init_std": 0.1, "alpha_in": 1.0, "alpha_out": 1.0, "weight_decay": 0.0}
    HParams(**good)
    with pytest.raises(ConfigError, match=f"^{key}: "):
        HParams(**{**good, key: value})


@pytest.mark.parametrize("key", ["width", "n_layer"])
def test_base_shape_out_of_range(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        BaseShape(**{"width": 64, "n_layer": 2, key: 0})


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameterization": "supr"},
        {"optimizer": "adam"},
        {"depth": "complete"},
        {"sp_start": "mup_dens"},
        {"decay_mode": "scale"},
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong: dict[str, str]) -> None:
    names: Any = {"parameterization": "supar", **wrong}
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: unknown choice.*did you mean"):
        Method(**names)
