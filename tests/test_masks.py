"""Exact-count masks: counts, nesting, the compact form, homogeneity, hash, memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_sweep.errors import ConfigError
from supar_sweep.sparse import masks
from supar_sweep.sparse.masks import (
    MASK_STREAM,
    LivePositions,
    dense_mask,
    live_positions,
    mask_hash,
)
from supar_sweep.sparse.noise import bits, stream_key

KEY = stream_key(0, MASK_STREAM, "blocks.0.mlp.up.weight")


def smallest_by_sorting(key: int, shape: tuple[int, int], count: int) -> npt.NDArray[np.bool_]:
    """Return the mask straight from its definition: the `count` smallest bits."""
    found = bits(key, np.arange(shape[0])[:, None], np.arange(shape[1])).ravel()
    mask = np.zeros(found.size, dtype=bool)
    mask[np.argsort(found)[:count]] = True
    return mask.reshape(shape)


@st.composite
def layers(draw: st.DrawFn) -> tuple[tuple[int, int], int]:
    shape = (draw(st.integers(1, 60)), draw(st.integers(1, 60)))
    return shape, draw(st.integers(1, shape[0] * shape[1]))


@given(layer=layers(), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_live_positions_are_the_smallest_bits(layer: tuple[tuple[int, int], int], seed: int) -> None:
    shape, count = layer
    key = stream_key(seed, MASK_STREAM, "w")
    live = live_positions(key, shape, count)
    assert live.rows.dtype == live.cols.dtype == np.int32
    assert live.shape == shape
    assert live.rows.size == live.cols.size == count
    flat = live.rows.astype(np.int64) * shape[1] + live.cols
    assert np.all(np.diff(flat) > 0)  # row-major, each once
    expected = smallest_by_sorting(key, shape, count)
    assert np.array_equal(np.flatnonzero(expected), flat)
    mask = dense_mask(key, shape, count)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("count", [1, 1000, 150_000, 299_999])
def test_row_blocks_do_not_change_the_mask(count: int) -> None:
    shape = (600, 500)
    assert np.array_equal(dense_mask(KEY, shape, count).numpy(), smallest_by_sorting(KEY, shape, count))


def test_a_window_that_misses_the_threshold_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    slacks: list[float] = []
    smallest = masks._smallest

    def first_far_too_narrow(
        key: int, shape: tuple[int, int], count: int, slack: float
    ) -> tuple[masks.Int32Array, masks.Int32Array] | None:
        slacks.append(slack)
        return smallest(key, shape, count, slack * 1e-6)

    monkeypatch.setattr(masks, "_smallest", first_far_too_narrow)
    mask = dense_mask(KEY, (200, 200), 4000).numpy()
    assert len(slacks) > 1
    assert np.array_equal(mask, smallest_by_sorting(KEY, (200, 200), 4000))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_masks_are_nested_over_densities(data: st.DataObject) -> None:
    shape, count = data.draw(layers())
    fewer = data.draw(st.integers(1, count))
    inner, outer = dense_mask(KEY, shape, fewer), dense_mask(KEY, shape, count)
    assert not (inner & ~outer).any()


def test_full_mask_is_all_live() -> None:
    assert dense_mask(KEY, (7, 5), 35).all()


@pytest.mark.parametrize("count", [0, -1, 36])
@pytest.mark.parametrize("form", [live_positions, dense_mask])
def test_an_impossible_count_is_refused(form: object, count: int) -> None:
    assert callable(form)
    with pytest.raises(ConfigError, match=r"density: .* 7 x 5 .*1 to 35"):
        form(KEY, (7, 5), count)


def test_names_and_seeds_have_masks_of_their_own() -> None:
    shape, count, n = (256, 256), 256 * 256 // 8, 256 * 256
    base = dense_mask(KEY, shape, count)
    for other in (stream_key(1, MASK_STREAM, "w"), stream_key(0, MASK_STREAM, "v")):
        overlap = int((base & dense_mask(other, shape, count)).sum())
        p = count / n
        # hypergeometric: mean count * p, variance count * p (1 - p)^2 for large n
        assert abs(overlap - count * p) < 5 * math.sqrt(count * p) * (1 - p)


@pytest.mark.parametrize("density", [1 / 2, 1 / 16, 1 / 128])
def test_rows_columns_and_blocks_have_the_same_density(density: float) -> None:
    width = 1024
    mask = dense_mask(KEY, (width, width), int(density * width**2)).numpy().astype(np.float64)
    blocks = mask.reshape(32, 32, 32, 32).sum((1, 3)).ravel()
    for counts, n in ((mask.sum(0), width), (mask.sum(1), width), (blocks, 32 * 32)):
        expected, variance = n * density, n * density * (1 - density)
        chi2 = ((counts - expected) ** 2 / variance).sum()  # chi-square, counts.size - 1 degrees
        dof = counts.size - 1
        assert abs(chi2 - dof) < 5 * math.sqrt(2 * dof + dof / expected)


def test_a_corner_of_a_larger_mask_has_its_density() -> None:
    corner = dense_mask(KEY, (1024, 1024), 2**16).numpy()[:256, :256]
    assert abs(corner.sum() - 2**12) < 5 * math.sqrt(2**12)


def test_hash_is_the_same_for_every_form_and_order() -> None:
    shape, count = (40, 30), 100
    live = live_positions(KEY, shape, count)
    dense = dense_mask(KEY, shape, count)
    shuffled = np.random.default_rng(0).permutation(count)
    unsorted = LivePositions(live.rows[shuffled], live.cols[shuffled], shape)
    digests = {
        mask_hash({"a": dense, "b": live}),
        mask_hash({"b": dense, "a": live}),
        mask_hash({"a": dense.numpy(), "b": unsorted}),
    }
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_hash_sees_name_shape_and_every_position() -> None:
    mask = dense_mask(KEY, (6, 4), 10)
    moved = mask.clone()
    live, dead = mask.nonzero()[0], (~mask).nonzero()[0]
    moved[tuple(live)], moved[tuple(dead)] = False, True
    digests = {
        mask_hash({"a": mask}),
        mask_hash({"b": mask}),
        mask_hash({"a": mask.reshape(4, 6)}),
        mask_hash({"a": moved}),
        mask_hash({"a": mask, "b": mask}),
        mask_hash({}),
    }
    assert len(digests) == 6


def test_memory_follows_the_live_weights() -> None:
    width = 4096
    count = width**2 // 1024
    tracemalloc.start()
    try:
        live_positions(KEY, (width, width), count)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < width**2 / 4  # a bit mask alone would take an eighth, a bool mask all of it
