"""A cell's id: what changes it, what does not, and one pinned value."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest

from supar_sweep.config.decode import decode
from supar_sweep.config.fields import later, setting
from supar_sweep.config.schema import CellConfig, DataConfig, OptimizerConfig, RuntimeConfig
from supar_sweep.config.sparsity import SparsityConfig
from supar_sweep.rules.parameterization import PARAMETERIZATIONS, RULES_VERSION
from supar_sweep.sweep import identity
from supar_sweep.sweep.identity import canonical, cell_id, label
from tests.tiny import tiny_cell, tiny_plain

DATA = "data-fingerprint"

# One other legal value for every setting of the tiny cell (muP rules, adamw, stdlib data).
CHANGES: dict[str, Any] = {
    "parameterization": "mup",
    "depth": "none",
    "density": 0.5,
    "layer_density": "er",
    "seed": 1,
    "base.width": 8,
    "hparams.lr": 0.02,
    "hparams.init_std": 0.09,
    "hparams.alpha_in": 2.0,
    "hparams.alpha_out": 2.0,
    "hparams.weight_decay": 0.2,
    "model.width": 64,
    "model.d_head": 16,
    "model.n_layer": 3,
    "model.context_tokens": 32,
    "model.position": "alibi",
    "model.activation": "swiglu",
    "model.bias": True,
    "model.tied_head": True,
    "model.ffn_mult": 2.0,
    "data.name": "text",
    "data.val_fraction": 0.2,
    "optimizer.name": "sgd",
    "optimizer.decay_mode": "coupled",
    "optimizer.clip_norm": None,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.eps": 1e-7,
    "schedule.name": "cosine",
    "schedule.warmup_steps": 3,
    "schedule.final_lr_fraction": 0.0,
    "train.steps": 13,
    "train.batch_seqs": 8,
    "train.accumulation_steps": 2,
    "train.precision": "float64",
    "train.summary_last_steps": 5,
    "train.eval_every_steps": 6,
    "train.eval_seqs": 9,
    "train.divergence_loss_mult": 4.0,
    "train.divergence_patience_steps": 4,
    "train.target": "my.module.train",
}
# Settings that stand elsewhere, or that no rule reads where the tiny cell stands; each has its own
# test below.
NOT_IN_THE_TINY_CELL = {
    *("sp_start", "depth_alpha", "base.n_layer", "optimizer.momentum"),
    *("data.paths", "data.train_path", "data.val_path", "data.vocab_size"),
    *("data.dataset", "data.dataset_config", "data.split", "data.column"),
    *(f"sparsity.{item.name}" for item in fields(SparsityConfig)),
}
WITH: dict[str, dict[str, Any]] = {
    "data.name": {"data": DataConfig(name="text", val_fraction=0.1, paths=("a.txt",))},
    "optimizer.name": {"optimizer": OptimizerConfig(name="sgd", decay_mode="scaled", clip_norm=1.0, momentum=0.9)},
}


def every_setting(config: Any, prefix: str = "") -> set[str]:
    found = set()
    for item in fields(config):
        value = getattr(config, item.name)
        deeper = is_dataclass(value)
        found |= every_setting(value, f"{prefix}{item.name}.") if deeper else {prefix + item.name}
    return found


def changed(name: str) -> CellConfig:
    if name in WITH:
        return replace(tiny_cell(), **WITH[name])
    return tiny_cell(**{name: CHANGES[name]})


def test_every_setting_is_accounted_for() -> None:
    # a new setting must be put into CHANGES (or named beside it), or it escapes the next test
    assert every_setting(tiny_cell()) == CHANGES.keys() | NOT_IN_THE_TINY_CELL


@pytest.mark.parametrize("name", CHANGES)
def test_each_setting_that_has_an_effect_changes_the_id(name: str) -> None:
    assert cell_id(changed(name), DATA) != cell_id(tiny_cell(), DATA)


def test_all_these_ids_differ_from_each_other() -> None:
    ids = {cell_id(changed(name), DATA) for name in CHANGES}
    assert len(ids) == len(CHANGES)


def test_data_and_rules_are_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell_id(tiny_cell(), DATA)
    assert cell_id(tiny_cell(), "another corpus") != before
    monkeypatch.setattr(identity, "RULES_VERSION", RULES_VERSION + 1)
    assert cell_id(tiny_cell(), DATA) != before


def test_how_a_cell_is_computed_has_no_way_in() -> None:
    runtime = {item.name for item in fields(RuntimeConfig)}
    assert not {name.rpartition(".")[2] for name in every_setting(tiny_cell())} & runtime


def test_pinned() -> None:
    # Changes only with a reason to call all existing records void: a rule of the table
    # (RULES_VERSION), the meaning of a setting. A new setting must not change it: give it
    # `later(...)` with the default that keeps the old behaviour.
    assert cell_id(tiny_cell(), DATA) == "d1a608ae0488d165"


def same(**overrides: Any) -> None:
    one, other = (tiny_cell(**{k: v[i] for k, v in overrides.items()}) for i in (0, 1))
    assert one != other
    assert cell_id(one, DATA) == cell_id(other, DATA)


def differ(**overrides: Any) -> None:
    one, other = (tiny_cell(**{k: v[i] for k, v in overrides.items()}) for i in (0, 1))
    assert cell_id(one, DATA) != cell_id(other, DATA)


def test_dense_mup_supar_and_ablations_are_one_cell_and_sp_another() -> None:
    ids = {name: cell_id(tiny_cell(parameterization=name, density=1.0), DATA) for name in PARAMETERIZATIONS}
    assert len({ids[name] for name in ids if name != "sp"}) == 1
    assert len(set(ids.values())) == 2
    sparse = {cell_id(tiny_cell(parameterization=name, density=0.5), DATA) for name in PARAMETERIZATIONS}
    assert len(sparse) == len(PARAMETERIZATIONS)


def test_layer_densities_of_a_dense_cell_have_no_effect() -> None:
    same(density=(1.0, 1.0), layer_density=("uniform", "er"))


def test_sp_has_no_alphas() -> None:
    sp = ("sp", "sp")
    same(**{"parameterization": sp, "hparams.alpha_in": (1.0, 5.0), "hparams.alpha_out": (1.0, 2.0)})


def test_sps_start_is_sps_alone() -> None:
    same(sp_start=("mup_dense", "own"))
    differ(parameterization=("sp", "sp"), sp_start=("mup_dense", "own"))


def test_the_base_counts_where_a_rule_reads_it() -> None:
    same(**{"base.n_layer": (2, 4)})
    completep = {"depth": ("completep",) * 2, "depth_alpha": (1.0,) * 2}
    differ(**completep, **{"base.n_layer": (2, 4)})
    sp = {"parameterization": ("sp", "sp")}
    differ(**sp, **{"base.width": (8, 16)})
    own = {**sp, "sp_start": ("own", "own")}
    same(**own, **{"base.width": (8, 16)})
    same(**own, base=(None, {"width": 16, "n_layer": 2}))


def test_the_decay_mode_counts_where_something_decays() -> None:
    mode = ("scaled", "independent")
    differ(**{"optimizer.decay_mode": mode})
    same(**{"optimizer.decay_mode": mode, "hparams.weight_decay": (0.0, 0.0)})


def test_completeps_alpha_counts() -> None:
    differ(depth=("completep", "completep"), depth_alpha=(0.5, 1.0))


def test_a_users_function_may_read_anything() -> None:
    target = {"train.target": ("my.train", "my.train")}
    differ(**target, sp_start=("mup_dense", "own"))
    differ(**target, density=(1.0, 1.0), parameterization=("mup", "supar"))


def test_where_data_lies_is_out() -> None:
    here, there = (
        replace(
            tiny_cell(),
            data=DataConfig(name="tokens", train_path=f"{at}/t.bin", val_path=f"{at}/v.bin", vocab_size=300),
        )
        for at in ("/here", "/there")
    )
    assert cell_id(here, DATA) == cell_id(there, DATA)
    larger = replace(here, data=replace(here.data, vocab_size=301))
    assert cell_id(larger, DATA) != cell_id(here, DATA)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (2**-7, 0.0078125), (0.1 + 0.2, 0.3), (1e-3, 0.001)])
def test_numbers_have_one_form(one: float, other: float) -> None:
    cells = [replace(tiny_cell(), hparams=replace(tiny_cell().hparams, lr=lr)) for lr in (one, other)]
    assert cell_id(cells[0], DATA) == cell_id(cells[1], DATA)


def test_neighbouring_values_of_a_fine_grid_and_large_seeds_stay_apart() -> None:
    differ(**{"hparams.lr": (0.01, 0.01 * (1 + 1e-9))})
    differ(seed=(2**63 - 1, 2**63 - 2))


@dataclass(frozen=True, kw_only=True)
class _Old:
    a: int = setting("of the first release")


FIRST = _Old(a=1)


@dataclass(frozen=True, kw_only=True)
class _New:
    a: int = setting("of the first release")
    b: int = later("added afterwards", default=0)
    inner: _Old | None = later("added afterwards, a group", default=FIRST)  # noqa: RUF009


def test_settings_added_later_are_left_out_at_their_default() -> None:
    assert identity.plain_value(_New(a=5)) == identity.plain_value(_Old(a=5)) == {"a": 5}
    assert identity.plain_value(_New(a=5, b=1)) == {"a": 5, "b": 1}
    assert identity.plain_value(_New(a=5, inner=_Old(a=2))) == {"a": 5, "inner": {"a": 2}}


SWAPS = {"update_fraction": 0.1, "stop_fraction": 0.75, "drop_fraction": 0.3}
RIGL = {"method": "rigl", **SWAPS}
GMP = {
    "method": "gmp",
    "update_fraction": 0.1,
    "start_fraction": 0.1,
    "stop_fraction": 0.75,
    "hparams_density": "final",
}
SPARSITY_CHANGES: dict[str, list[dict[str, Any]]] = {
    "method": [RIGL, {**RIGL, "method": "set"}],
    "update_fraction": [RIGL, {**RIGL, "update_fraction": 0.2}],
    "stop_fraction": [RIGL, {**RIGL, "stop_fraction": 0.5}],
    "drop_fraction": [RIGL, {**RIGL, "drop_fraction": 0.2}],
    "dynamic_lr_exponent": [RIGL, {**RIGL, "dynamic_lr_exponent": 0.5}],
    "start_fraction": [GMP, {**GMP, "start_fraction": 0.2}],
    "hparams_density": [GMP, {**GMP, "hparams_density": "current"}],
}


def test_each_setting_of_changing_masks_changes_the_id() -> None:
    assert SPARSITY_CHANGES.keys() == {item.name for item in fields(SparsityConfig)}
    for pair in SPARSITY_CHANGES.values():
        differ(sparsity=pair)
    differ(sparsity=[{"method": "static"}, RIGL])


def test_static_masks_have_the_id_from_before_masks_could_change() -> None:
    plain = tiny_plain(sparsity={"method": "static"})
    before = {name: value for name, value in plain.items() if name != "sparsity"}
    assert cell_id(decode(CellConfig, plain), DATA) == cell_id(decode(CellConfig, before), DATA)
    assert "sparsity" not in canonical(tiny_cell())


def test_masks_of_a_dense_cell_do_not_change() -> None:
    dense = {"density": (1.0, 1.0)}
    same(**dense, sparsity=[{"method": "static"}, RIGL])
    differ(**dense, sparsity=[{"method": "static"}, RIGL], **{"train.target": ("my.train", "my.train")})
    assert label(tiny_cell(density=1.0, sparsity=RIGL)) == label(tiny_cell(density=1.0))
    assert "-rigl-" in label(tiny_cell(sparsity=RIGL))


@pytest.mark.parametrize(("parameterization", "own"), [("supar", 1.0), ("mup", 0.0), ("sp", 0.0)])
def test_an_exponent_that_is_the_rules_own_is_no_other_cell(parameterization: str, own: float) -> None:
    both = {"parameterization": (parameterization, parameterization)}
    same(**both, sparsity=[RIGL, {**RIGL, "dynamic_lr_exponent": own}])
    differ(**both, sparsity=[RIGL, {**RIGL, "dynamic_lr_exponent": 1 - own}])


def test_rules_without_density_read_neither_the_final_nor_the_current_one() -> None:
    pair = [GMP, {**GMP, "hparams_density": "current"}]
    same(parameterization=("mup", "mup"), sparsity=pair)
    differ(parameterization=("mup", "mup"), sparsity=[{**each, "dynamic_lr_exponent": 0.5} for each in pair])
    differ(parameterization=("init_only", "init_only"), sparsity=pair)


def test_label_is_for_people() -> None:
    cell = tiny_cell(
        **{
            "hparams.lr": 2.0**-7,
            "density": 1 / 16,
            "model.width": 256,
            "parameterization": "supar",
        }
    )
    assert label(cell) == "supar-w256-r0.0625-lr2^-7-s0"
    assert label(replace(cell, density=1.0)).startswith("mup-")
    assert label(tiny_cell(**{"hparams.lr": 0.01})) == "supar-w32-r0.25-lr2^-6.644-s0"


def test_canonical_does_not_touch_the_cell() -> None:
    cell = tiny_cell(parameterization="sp")
    canonical(cell)
    assert cell == tiny_cell(parameterization="sp")
