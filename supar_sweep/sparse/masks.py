"""Exact-count random masks from a named seed per layer.

The live positions of a layer are those with the `count` smallest mask bits. So the count is exact,
the masks of one layer are nested over densities, and nothing depends on device, rank or order.
Evaluation streams over row blocks: a 16384 x 16384 layer at density 1/1024 costs its live positions
in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.noise import BLOCK_ELEMENTS, bits, row_blocks

if TYPE_CHECKING:
    import torch

Int32Array = npt.NDArray[np.int32]

MASK_STREAM = "mask"
"""The stream name of mask bits: stream_key(seed, MASK_STREAM, parameter name)."""


class LivePositions(NamedTuple):
    """The compact form of a mask, sorted row-major.

    Args:
        rows: [nnz] int32, the output neuron of each live weight.
        cols: [nnz] int32, its input.
        shape: (fan_out, fan_in).
    """

    rows: Int32Array
    cols: Int32Array
    shape: tuple[int, int]

    def row_starts(self) -> Int32Array:
        """Return [fan_out + 1] where each row begins among the positions, and at last their number, as in CSR."""
        return np.searchsorted(self.rows, np.arange(self.shape[0] + 1)).astype(np.int32)

    def mask(self) -> torch.Tensor:
        """Return the mask as a bool tensor [fan_out, fan_in] on the CPU, True where live."""
        import torch

        mask = np.zeros(self.shape, dtype=np.bool_)
        mask[self.rows, self.cols] = True
        return torch.from_numpy(mask)


def live_positions(key: int, shape: tuple[int, int], count: int) -> LivePositions:
    """Return the positions of the `count` smallest mask bits; no array of the layer's size is made.

    Args:
        key: from `stream_key(seed, MASK_STREAM, name)`.
        shape: (fan_out, fan_in).
        count: live weights, in [1, fan_out * fan_in].

    Raises:
        ConfigError: count is 0 or larger than the layer.
    """
    n_rows, n_cols = shape
    size = n_rows * n_cols
    if not 1 <= count <= size:
        raise ConfigError(
            "density",
            f"gives a {n_rows} x {n_cols} layer an impossible number of live weights",
            value=count,
            allowed=f"1 to {size} of them",
        )
    if count == size:
        rows, cols = np.divmod(np.arange(size, dtype=np.int64), n_cols)
        return LivePositions(rows.astype(np.int32), cols.astype(np.int32), shape)
    # The share of bits below a threshold is binomial: 8 standard deviations (and 8 positions, for
    # tiny counts) nearly always suffice, and the loop makes it always.
    slack = 8.0 * math.sqrt(count * (1.0 - count / size)) + 8.0
    while (found := _smallest(key, shape, count, slack)) is None:
        slack *= 4.0
    return LivePositions(*found, shape)


def dense_mask(key: int, shape: tuple[int, int], count: int) -> torch.Tensor:
    """Return the mask as a bool tensor [fan_out, fan_in] on the CPU, True where live.

    Args:
        key, shape, count: as for `live_positions`.

    Raises:
        ConfigError: count is 0 or larger than the layer.
    """
    return live_positions(key, shape, count).mask()


def mask_hash(masks: Mapping[str, torch.Tensor | npt.NDArray[np.bool_] | LivePositions]) -> str:
    """Return a sha256 over the masks, equal for the dense and the compact form, in any order.

    Args:
        masks: parameter name -> bool tensor or array [fan_out, fan_in], or `LivePositions`.
    """
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        shape, chunks = _compact_chunks(mask) if isinstance(mask, LivePositions) else _chunks(mask)
        count = sum(chunk.size for chunk in chunks)
        digest.update(json.dumps([name, *shape, count]).encode("ascii"))
        for chunk in chunks:
            digest.update(chunk.astype("<i8", copy=False).data)
    return digest.hexdigest()


def _smallest(key: int, shape: tuple[int, int], count: int, slack: float) -> tuple[Int32Array, Int32Array] | None:
    """Return row-major (rows, cols) of the `count` smallest bits, or None if slack was too small.

    Bits under the window [low, high] around the expected threshold are live at once; only those
    inside it are kept and ranked, so the scratch is O(slack) beside the positions themselves.
    """
    n_rows, n_cols = shape
    low = _threshold((count - slack) / (n_rows * n_cols))
    high = _threshold((count + slack) / (n_rows * n_cols))
    all_cols = np.arange(n_cols, dtype=np.uint64)
    rows_parts: list[Int32Array] = []
    cols_parts: list[Int32Array] = []
    window_bits: list[npt.NDArray[np.uint64]] = []
    window_index: list[npt.NDArray[np.int64]] = []
    n_found = 0
    for start, stop in row_blocks(n_rows, n_cols):
        block = bits(key, np.arange(start, stop, dtype=np.uint64)[:, None], all_cols).reshape(-1)
        at = np.flatnonzero(block <= high)
        rows, cols = np.divmod(at, n_cols)
        rows_parts.append((rows + start).astype(np.int32))
        cols_parts.append(cols.astype(np.int32))
        found = block[at]
        undecided = np.flatnonzero(found >= low)
        window_bits.append(found[undecided])
        window_index.append(undecided + n_found)
        n_found += at.size
    ranked = np.concatenate(window_bits)
    surplus = n_found - count
    if not 0 <= surplus <= ranked.size:
        return None
    rows_all, cols_all = np.concatenate(rows_parts), np.concatenate(cols_parts)
    if surplus == 0:
        return rows_all, cols_all
    largest = np.argpartition(ranked, ranked.size - surplus)[ranked.size - surplus :]
    drop = np.concatenate(window_index)[largest]
    return np.delete(rows_all, drop), np.delete(cols_all, drop)


def _threshold(share: float) -> np.uint64:
    return np.uint64(min(max(int(share * 2.0**64), 0), 2**64 - 1))


def _chunks(
    mask: torch.Tensor | npt.NDArray[np.bool_],
) -> tuple[tuple[int, ...], list[npt.NDArray[np.int64]]]:
    """Return (shape, flat live positions in ascending order, in chunks) of a dense mask."""
    dense = mask if isinstance(mask, np.ndarray) else mask.detach().cpu().numpy()
    flat = dense.reshape(-1)
    starts = range(0, flat.size, 16 * BLOCK_ELEMENTS)
    chunks = [np.flatnonzero(flat[s : s + 16 * BLOCK_ELEMENTS]).astype(np.int64) + s for s in starts]
    return dense.shape, chunks


def _compact_chunks(
    live: LivePositions,
) -> tuple[tuple[int, ...], list[npt.NDArray[np.int64]]]:
    flat = live.rows.astype(np.int64) * live.shape[1] + live.cols
    return live.shape, [np.sort(flat)]
