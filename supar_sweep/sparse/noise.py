"""Counter-based random numbers: pure functions of (seed, stream, parameter name, row, column).

No state and no order of evaluation: a layer that stores only its live weights draws at their
positions and gets the numbers of the dense layer; a smaller layer is the top-left corner of a
larger one with the same name; every rank, device and process agrees. Changing anything here changes
every result, which is why a version is part of each key.

1-d parameters (biases, norm gains) are row 0.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.floating]

NOISE_VERSION = b"supar-noise-1"

BLOCK_ELEMENTS = 1 << 16
"""Positions evaluated at once by the block functions: the scratch stays near a core's L2 cache."""

_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_TWO_POW_MINUS_32 = 2.0**-32


def stream_key(seed: int, stream: str, name: str) -> int:
    """Return the 64-bit key of one stream of random numbers.

    Args:
        seed: any integer.
        stream: what the numbers are for, such as "init" or "mask"; streams are independent.
        name: the parameter's name (or any label), so that no two layers share numbers.

    Source: BLAKE2b (RFC 7693), 8-byte digest of an unambiguous encoding of the three.
    """
    encoded = json.dumps([int(seed), stream, name]).encode("ascii")
    digest = hashlib.blake2b(encoded, digest_size=8, person=NOISE_VERSION).digest()
    return int.from_bytes(digest, "little")


def bits(key: int, rows: npt.ArrayLike, cols: npt.ArrayLike) -> UInt64Array:
    """Return 64 random bits a position, shape = rows and cols broadcast together.

    The position row * 2^32 + col is mapped by a bijection of the 64-bit integers that depends on
    the key: no two positions of one key tie, so "the k smallest" is always exactly k positions.

    Args:
        key: from `stream_key`.
        rows: integers in [0, 2^32).
        cols: integers in [0, 2^32), broadcastable with rows.

    Raises:
        ValueError: a row or column is out of range.
    """
    position = (_coordinates(rows, "rows") << _SHIFT_32) | _coordinates(cols, "cols")
    return counter_bits(key, position)


def counter_bits(key: int, counters: npt.ArrayLike) -> UInt64Array:
    """Return 64 random bits a counter, shape as `counters`; no two counters of one key tie.

    The key enters twice, added before and xored between two mixers: were it only added, two keys
    that happen to lie close would give the same numbers, shifted.

    Args:
        key: from `stream_key`.
        counters: integers in [0, 2^64).

    Source: the finalizers of SplitMix64 (Steele, Lea, Flood 2014) and MurmurHash3 (A. Appleby).
    """
    counters = np.asarray(counters)
    # a copy of one dimension: 0-d arrays would turn into scalars, whose overflow warns
    x = np.array(counters, dtype=np.uint64).reshape(-1)
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    x ^= np.uint64(_second_key(key))
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x.reshape(counters.shape)


def normal(key: int, rows: npt.ArrayLike, cols: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> FloatArray:
    """Return a standard normal number a position, shape = rows and cols broadcast together.

    Computed in float64 and rounded once, so float32 values agree between machines unless their
    math libraries differ by an ulp of float64 right at a rounding boundary. The largest possible
    magnitude is sqrt(2 ln 2^33) = 6.76.

    Args:
        key: from `stream_key`.
        rows, cols: as for `bits`.
        dtype: float32 or float64.

    Source: Box and Muller (1958): z = sqrt(-2 ln u1) cos(2 pi u2), u1, u2 from the 32-bit halves.
    """
    raw = bits(key, rows, cols)
    # contiguous: a strided loop may use another code path of the math library, an ulp away
    flat = raw.reshape(-1)
    u1 = ((flat >> _SHIFT_32).astype(np.float64) + 0.5) * _TWO_POW_MINUS_32
    u2 = ((flat & _LOW_32).astype(np.float64) + 0.5) * _TWO_POW_MINUS_32
    z: FloatArray = np.sqrt(-2.0 * np.log(u1)) * np.cos((2.0 * np.pi) * u2)
    return z.astype(dtype).reshape(raw.shape)


def normal_block(key: int, n_rows: int, n_cols: int, dtype: npt.DTypeLike = np.float32) -> FloatArray:
    """Return `normal` at every position of an [n_rows, n_cols] layer, with a few MB of scratch.

    Args:
        key: from `stream_key`.
        n_rows, n_cols: the layer's shape; a 1-d parameter of n elements is (1, n).
        dtype: float32 or float64.
    """
    out: FloatArray = np.empty((n_rows, n_cols), dtype=dtype)
    cols = np.arange(n_cols, dtype=np.uint64)
    for start, stop in row_blocks(n_rows, n_cols):
        rows = np.arange(start, stop, dtype=np.uint64)[:, None]
        out[start:stop] = normal(key, rows, cols, dtype)
    return out


def uniform_ints(key: int, counters: npt.ArrayLike, high: int) -> npt.NDArray[np.int64]:
    """Return an integer in [0, high) a counter, shape as `counters`.

    Each value's probability is off by less than 2^-64 (relatively: high / 2^64).

    Args:
        key: from `stream_key`.
        counters: integers in [0, 2^64), such as step * batch + index.
        high: exclusive upper end, in [1, 2^63].

    Raises:
        ValueError: high is out of range.

    Source: multiply-shift, floor(bits * high / 2^64); the 128-bit product from four 32-bit ones.
    """
    if not 1 <= high <= 1 << 63:
        raise ValueError(f"high must lie in [1, 2^63], got {high}")
    raw = counter_bits(key, counters)
    flat = raw.reshape(-1)
    a1, a0 = flat >> _SHIFT_32, flat & _LOW_32
    b1, b0 = np.uint64(high >> 32), np.uint64(high & 0xFFFFFFFF)
    mid = a1 * b0 + ((a0 * b0) >> _SHIFT_32)
    cross = a0 * b1 + (mid & _LOW_32)
    product: UInt64Array = a1 * b1 + (mid >> _SHIFT_32) + (cross >> _SHIFT_32)
    return product.astype(np.int64).reshape(raw.shape)


def row_blocks(n_rows: int, n_cols: int) -> list[tuple[int, int]]:
    """Return [start, stop) row ranges that cover n_rows, of about BLOCK_ELEMENTS positions each.

    Args:
        n_rows, n_cols: the layer's shape, >= 0.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, n_cols))
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _second_key(key: int) -> int:
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=8, person=NOISE_VERSION)
    return int.from_bytes(digest.digest(), "little")


def _coordinates(values: npt.ArrayLike, what: str) -> UInt64Array:
    array = np.asarray(values)
    if array.size and (array.min() < 0 or array.max() >= 1 << 32):
        raise ValueError(f"{what} must lie in [0, 2^32)")
    return array.astype(np.uint64)
