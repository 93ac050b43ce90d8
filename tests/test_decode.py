"""The strict decoder: what the schema has no place for is an error that names key and choice."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import is_dataclass, replace
from typing import Any

import pytest

from supar_sweep.config.decode import Once, decode, encode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.errors import ConfigError
from tests.tiny import CELL, RUNTIME, tiny_plain


def changed(key: str, value: Any) -> dict[str, Any]:
    return tiny_plain(**{key: value})


def test_encode_undoes_decode() -> None:
    cell = decode(CellConfig, CELL)
    assert decode(CellConfig, encode(cell)) == cell


def test_the_plain_form_of_a_shared_section_is_computed_once() -> None:
    cell, n_calls = decode(CellConfig, CELL), 0

    def counted(value: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        return encode(value)

    once = Once(counted)
    plain = [encode(replace(cell, seed=seed), once) for seed in range(5)]
    assert plain == [encode(replace(cell, seed=seed)) for seed in range(5)]
    assert n_calls == sum(map(is_dataclass, vars(cell).values()))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.widht", 16, "did you mean 'width'"),
        ("densty", 0.5, "did you mean 'density'"),
        ("parameterization", "mpu", "did you mean 'mup'"),
        ("model.width", "wide", "must be an integer"),
        ("model.width", 16.5, "must be an integer"),
        ("model.width", True, "must be an integer"),
        ("model.bias", 1, "must be true or false"),
        ("density", "half", "must be a number"),
        ("density", math.nan, "must be a number"),
        ("density", "nan", "must be a number"),
        ("optimizer.beta2", 1, ">= 0 and < 1"),
        ("density", 0, "> 0 and <= 1"),
        ("density", 1.5, "> 0 and <= 1"),
        ("density", -0.5, "> 0 and <= 1"),
        ("seed", None, "must be an integer"),
        ("hparams.lr", -1, "a number > 0"),
        ("hparams.lr", math.inf, "a number > 0"),
        ("model", 3, "must be a mapping"),
        ("data.paths", "one.txt", "must be a list"),
        ("base", None, "needs a base shape"),
    ],
)
def test_wrong_settings_name_key_and_what_is_allowed(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(CellConfig, changed(key, value))
    assert caught.value.key == key
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_width_that_heads_do_not_divide_names_its_neighbours() -> None:
    d_head = CELL["model"]["d_head"]
    width = 3 * d_head + 1
    with pytest.raises(ConfigError) as caught:
        decode(CellConfig, changed("model.width", width))
    assert caught.value.allowed == f"{3 * d_head} or {4 * d_head}"


def test_a_missing_setting_is_named() -> None:
    plain = deepcopy(CELL)
    del plain["model"]["d_head"]
    with pytest.raises(ConfigError, match=r"model\.d_head: is missing"):
        decode(CellConfig, plain)


@pytest.mark.parametrize("written", [1, 1.0, "1e-0"])
def test_numbers_have_one_form(written: Any) -> None:
    density = decode(CellConfig, changed("density", written)).density
    assert density == 1.0
    assert isinstance(density, float)


def test_no_setting_without_effect() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.momentum: has no effect when name is adamw"):
        decode(CellConfig, changed("optimizer.momentum", 0.9))


def test_a_prefix_leads_every_key() -> None:
    with pytest.raises(ConfigError, match=r"^runtime\.threads: out of range"):
        decode(RuntimeConfig, {**RUNTIME, "threads": 0}, prefix="runtime")
