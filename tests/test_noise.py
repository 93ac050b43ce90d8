"""Counter-based noise: structure (corners, sub-sets, no ties) and statistics at fixed seeds.

A statistic of n samples is compared with its standard error under the null; 5 of them are allowed.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from supar_sweep.sparse.noise import (
    bits,
    counter_bits,
    normal,
    normal_block,
    row_blocks,
    stream_key,
    uniform_ints,
)

KEY = stream_key(0, "init", "blocks.0.attn.qkv.weight")
COORDINATE = st.integers(0, 2**32 - 1)
SIGMAS = 5.0

PINNED_KEY = 0x41C5F629CED50104
PINNED_BITS = [0x646A46845E85CC73, 0x1FD69977B682BFB4]
PINNED_NORMAL = [-0.9316951177906116, -0.47125478997567244]


def correlation_z(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return the correlation of a and b in standard errors of independence, 1 / sqrt(n)."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(np.corrcoef(a, b)[0, 1]) * math.sqrt(a.size)


def test_key_depends_on_each_of_seed_stream_and_name() -> None:
    keys = [stream_key(*parts) for parts in ((0, "a", "b"), (1, "a", "b"), (0, "b", "a"))]
    keys += [stream_key(0, "a", "bc"), stream_key(0, "ab", "c"), stream_key(-1, "a", "b")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    assert stream_key(0, "a", "b") == keys[0]


def test_numbers_are_pinned() -> None:
    # a change here changes every result of every run: it needs a new NOISE_VERSION, and a reason
    key = stream_key(7, "init", "w")
    assert key == PINNED_KEY
    assert bits(key, [0, 1], [0, 2]).tolist() == PINNED_BITS
    assert np.allclose(normal(key, [0, 1], [0, 2], np.float64), PINNED_NORMAL, rtol=1e-14)


@given(
    positions=st.lists(st.tuples(COORDINATE, COORDINATE), unique=True, min_size=2, max_size=50),
    key=st.integers(0, 2**64 - 1),
)
@settings(max_examples=50, deadline=None)
def test_positions_of_one_key_never_tie(positions: list[tuple[int, int]], key: int) -> None:
    rows, cols = zip(*positions, strict=True)
    assert len(set(bits(key, rows, cols).tolist())) == len(positions)


def test_no_ties_among_a_million_positions() -> None:
    found = bits(KEY, np.arange(1024)[:, None], np.arange(1024))
    assert np.unique(found).size == found.size


def test_close_keys_are_not_shifted_copies() -> None:
    counters = np.arange(1000)
    assert not np.isin(counter_bits(KEY, counters), counter_bits(KEY + 1, counters)).any()


def test_scalars_lists_and_arrays_agree() -> None:
    grid = bits(KEY, np.arange(3)[:, None], np.arange(5))
    assert grid.shape == (3, 5)
    assert bits(KEY, 2, 4).shape == ()
    assert int(bits(KEY, 2, 4)) == int(grid[2, 4])
    assert normal(KEY, 2, 4).shape == ()
    assert uniform_ints(KEY, 3, 10).shape == ()


@pytest.mark.parametrize(("rows", "cols"), [(-1, 0), (0, -1), (2**32, 0), (0, 2**32)])
def test_coordinates_out_of_range_are_refused(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\^32\)"):
        bits(KEY, rows, cols)


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None)
def test_a_smaller_layer_is_the_top_left_corner_of_a_larger_one(shape: tuple[int, int], seed: int) -> None:
    key = stream_key(seed, "init", "w")
    large = normal_block(key, shape[0] + 3, shape[1] + 70)
    assert np.array_equal(normal_block(key, *shape), large[: shape[0], : shape[1]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_at_live_positions_are_those_of_the_dense_layer(dtype: type) -> None:
    n_rows, n_cols = 300, 517  # more than one row block
    assert len(row_blocks(n_rows, n_cols)) > 1
    dense = normal_block(KEY, n_rows, n_cols, dtype)
    rows, cols = np.divmod(np.random.default_rng(0).permutation(n_rows * n_cols)[:1000], n_cols)
    live = normal(KEY, rows, cols, dtype)
    assert live.dtype == dense.dtype == dtype
    assert np.array_equal(live, dense[rows, cols])
    assert np.array_equal(normal(KEY, rows[::7], cols[::7], dtype), live[::7])


@given(n_rows=st.integers(1, 10**5), n_cols=st.integers(1, 10**5))
@settings(max_examples=50, deadline=None)
def test_row_blocks_cover_every_row_once(n_rows: int, n_cols: int) -> None:
    blocks = row_blocks(n_rows, n_cols)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == n_rows
    assert all(a[1] == b[0] for a, b in pairwise(blocks))


def test_moments_are_those_of_a_standard_normal() -> None:
    z = normal_block(KEY, 1000, 1000, np.float64).ravel()
    n = z.size
    # standard errors of the raw moments of N(0, 1): sqrt(E[z^2k] - E[z^k]^2) / sqrt(n)
    for order, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((z**order).mean() - mean) < SIGMAS * math.sqrt(variance / n), order
    assert stats.kstest(z[:100_000], "norm").pvalue > 1e-4
    beyond_4 = 2 * stats.norm.sf(4.0) * n
    assert abs((abs(z) > 4).sum() - beyond_4) < SIGMAS * math.sqrt(beyond_4)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 256, 512])
def test_no_correlation_at_any_lag_of_rows_or_columns(lag: int) -> None:
    z = normal_block(KEY, 640, 640)
    assert abs(correlation_z(z[lag:], z[:-lag])) < SIGMAS
    assert abs(correlation_z(z[:, lag:], z[:, :-lag])) < SIGMAS
    # squares too: numbers may be uncorrelated and yet dependent
    assert abs(correlation_z(z[lag:] ** 2, z[:-lag] ** 2)) < SIGMAS
    assert abs(correlation_z(z[:, lag:] ** 2, z[:, :-lag] ** 2)) < SIGMAS


def test_no_correlation_along_diagonals_or_with_the_transpose() -> None:
    z = normal_block(KEY, 512, 512)
    assert abs(correlation_z(z[1:, 1:], z[:-1, :-1])) < SIGMAS
    upper = np.triu_indices(512, 1)
    assert abs(correlation_z(z[upper], z.T[upper])) < SIGMAS


def test_row_and_column_sums_scatter_like_independent_numbers() -> None:
    z = normal_block(KEY, 512, 512, np.float64)
    for sums in (z.sum(0), z.sum(1)):
        chi2 = (sums**2 / 512).sum()  # chi-square with 512 degrees of freedom
        assert abs(chi2 - 512) < SIGMAS * math.sqrt(2 * 512)


@pytest.mark.parametrize("other", [(0, "init", "v"), (0, "mask", "w"), (1, "init", "w"), (2**32, "init", "w")])
def test_names_streams_and_seeds_are_independent(other: tuple[int, str, str]) -> None:
    a = normal_block(stream_key(0, "init", "w"), 400, 400)
    b = normal_block(stream_key(*other), 400, 400)
    assert (a == b).mean() < 1e-4
    assert abs(correlation_z(a, b)) < SIGMAS
    assert abs(correlation_z(a**2, b**2)) < SIGMAS


def test_every_bit_is_fair_and_flips_with_each_input_bit() -> None:
    counters = np.arange(4096, dtype=np.uint64)
    base = counter_bits(KEY, counters)
    shifts = np.arange(64, dtype=np.uint64)
    tolerance = SIGMAS * math.sqrt(0.25 / counters.size) + 0.01  # 64 * 64 comparisons
    ones = ((base[:, None] >> shifts) & np.uint64(1)).mean(0)
    assert np.abs(ones - 0.5).max() < tolerance
    for bit in range(64):
        flipped = base ^ counter_bits(KEY, counters ^ np.uint64(1 << bit))
        share = ((flipped[:, None] >> shifts) & np.uint64(1)).mean(0)
        assert np.abs(share - 0.5).max() < tolerance, bit


@given(
    high=st.integers(1, 2**63),
    counters=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_uniform_ints_are_the_multiply_shift_of_their_bits(high: int, counters: list[int]) -> None:
    array = np.array(counters, dtype=np.uint64)
    raw = counter_bits(KEY, array).tolist()
    assert uniform_ints(KEY, array, high).tolist() == [(r * high) >> 64 for r in raw]


def test_uniform_ints_are_uniform() -> None:
    counts = np.bincount(uniform_ints(KEY, np.arange(60_000), 12), minlength=12)
    assert counts.size == 12
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("high", [0, -1, 2**63 + 1])
def test_uniform_ints_refuse_an_empty_range(high: int) -> None:
    with pytest.raises(ValueError, match="high"):
        uniform_ints(KEY, [0], high)
