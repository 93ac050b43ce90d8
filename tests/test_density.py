"""Layer densities: exact totals, the ER law, full layers, and bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.density import (
    METHODS,
    MIN_LIVE_PER_NEURON,
    er_counts,
    live_counts,
    live_per_neuron,
    uniform_counts,
)

GPT_WIDTH_256 = {
    "qkv": (768, 256),
    "attn_out": (256, 256),
    "mlp_in": (1024, 256),
    "mlp_out": (256, 1024),
}
SHAPES = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    min_size=1,
)
DENSITIES = st.floats(1e-3, 1.0)


def sizes(shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    return {name: rows * cols for name, (rows, cols) in shapes.items()}


@pytest.mark.parametrize("method", METHODS)
def test_density_1_is_all_full(method: str) -> None:
    assert live_counts(method, GPT_WIDTH_256, 1.0) == sizes(GPT_WIDTH_256)


@given(shapes=SHAPES, density=DENSITIES)
@settings(max_examples=100, deadline=None)
def test_uniform_rounds_each_layer_to_the_nearest_count(shapes: dict[str, tuple[int, int]], density: float) -> None:
    assume(all(density * n >= 0.5 for n in sizes(shapes).values()))
    counts = uniform_counts(shapes, density)
    assert list(counts) == list(shapes)
    for name, n in sizes(shapes).items():
        assert abs(counts[name] - density * n) <= 0.5 + 1e-9


@given(shapes=SHAPES, density=DENSITIES)
@settings(max_examples=200, deadline=None)
def test_er_matches_the_total_and_its_law(shapes: dict[str, tuple[int, int]], density: float) -> None:
    total = sum(sizes(shapes).values())
    try:
        counts = er_counts(shapes, density)
    except ConfigError:
        assume(False)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == math.floor(density * total + 0.5)
    assert all(1 <= counts[name] <= n for name, n in sizes(shapes).items())
    partial = [name for name, n in sizes(shapes).items() if counts[name] < n]
    if partial:
        # eps = live / (fan_in + fan_out), the same for all layers that are not full, up to rounding
        budget = sum(counts[name] for name in partial)
        eps = Fraction(budget, sum(sum(shapes[name]) for name in partial))
        for name in partial:
            assert abs(counts[name] - eps * sum(shapes[name])) <= 2
        # and a full layer is full because eps would have given it more
        for name, n in sizes(shapes).items():
            if name not in partial:
                assert eps * sum(shapes[name]) >= n - 2


def test_er_gives_small_layers_the_higher_density_in_the_ratio_of_the_law() -> None:
    density = 1 / 8
    counts = er_counts(GPT_WIDTH_256, density)
    for name, (rows, cols) in GPT_WIDTH_256.items():
        expected = counts["attn_out"] * (rows + cols) / (256 + 256)
        assert abs(counts[name] - expected) <= 3, name
    assert counts["attn_out"] / 256**2 > density > counts["mlp_in"] / (256 * 1024)


def test_er_fills_a_layer_that_would_exceed_1_and_solves_eps_again() -> None:
    shapes = {"tiny": (4, 4), "large": (400, 400)}
    n_live = round(0.6 * (16 + 160_000))
    assert er_counts(shapes, 0.6) == {"tiny": 16, "large": n_live - 16}


def test_er_of_equal_layers_is_uniform() -> None:
    shapes = {"a": (64, 32), "b": (64, 32)}
    assert er_counts(shapes, 0.25) == uniform_counts(shapes, 0.25) == {"a": 512, "b": 512}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.0, -0.5, 1.0000001, math.nan, math.inf])
def test_density_out_of_range_is_refused(method: str, density: float) -> None:
    with pytest.raises(ConfigError, match=r"density: .*0 < density <= 1"):
        live_counts(method, GPT_WIDTH_256, density)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_a_live_weight_is_refused_by_name(method: str) -> None:
    with pytest.raises(ConfigError, match=r"layer small \(1 x 2\)"):
        live_counts(method, {"small": (1, 2), "large": (4000, 4000)}, 1e-5)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"layer_density: .*did you mean 'uniform'"):
        live_counts("unifrom", GPT_WIDTH_256, 0.5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_layer_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="a layer of no weights"):
        uniform_counts({"w": shape}, 0.5)


def test_live_per_neuron_is_fan_in_times_density() -> None:
    assert live_per_neuron(256, 1 / 16) == 16 >= MIN_LIVE_PER_NEURON
    assert live_per_neuron(128, 1 / 16) == 8 < MIN_LIVE_PER_NEURON
