"""Batches: pure functions of (seed, step), right shapes, right targets, even use of the corpus."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from supar_sweep.training.corpus import Corpus
from supar_sweep.training.data import batch, val_batches


def counting(n_train: int = 1000, n_val: int = 200) -> Corpus:
    """A corpus whose token is its position, so that a window shows where it came from."""
    train, val = np.arange(n_train, dtype=np.uint16), np.arange(n_val, dtype=np.uint16)
    return Corpus("tokens", 65536, train, val, "none", 2 * (n_train + n_val))


def starts(corpus: Corpus, steps: range, seed: int = 0) -> list[int]:
    found: list[int] = []
    for step in steps:
        x, _ = batch(corpus, seed=seed, step=step, batch_seqs=8, context_tokens=4)
        found += x[:, 0].tolist()
    return found


def test_y_is_x_one_token_later() -> None:
    x, y = batch(counting(), seed=1, step=7, batch_seqs=3, context_tokens=5)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (3, 5)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(5))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    corpus = counting()
    forward = [starts(corpus, range(s, s + 1)) for s in range(5)]
    assert [starts(corpus, range(s, s + 1)) for s in reversed(range(5))] == forward[::-1]
    assert len({tuple(s) for s in forward}) == 5
    assert starts(corpus, range(5), seed=1) != starts(corpus, range(5))


def test_positions_reach_both_ends_and_none_beyond() -> None:
    # the last window [n - T - 1, n) is the last with a target for each of its T tokens
    corpus = counting(n_train=12)
    assert set(starts(corpus, range(200))) == set(range(12 - 4))


def test_positions_are_uniform() -> None:
    n, draws = 1004, 8 * 2000
    counts, _ = np.histogram(starts(counting(n), range(2000)), bins=10, range=(0, n - 4))
    # each decile: binomial(16000, 1/10), standard deviation sqrt(16000 * .1 * .9) = 38; 5 of them
    assert np.abs(counts - draws / 10).max() < 5 * np.sqrt(draws * 0.09)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_one_batch(world_size: int) -> None:
    corpus = counting()
    whole = batch(corpus, seed=3, step=11, batch_seqs=8, context_tokens=6)
    parts = [
        batch(
            corpus,
            seed=3,
            step=11,
            batch_seqs=8,
            context_tokens=6,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for index in (0, 1):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_held_out_sequences_are_spread_evenly_whatever_the_batch_size() -> None:
    corpus = counting(n_val=101)
    reads = [
        [x for x, _ in val_batches(corpus, eval_seqs=5, context_tokens=4, batch_seqs=size)] for size in (1, 2, 5, 64)
    ]
    assert all(torch.equal(torch.cat(read), torch.cat(reads[0])) for read in reads)
    # 5 windows of 4 + 1 tokens over 101: starts 0, 24, 48, 72, 96
    assert torch.cat(reads[0])[:, 0].tolist() == [96 * i // 4 for i in range(5)]
    (x, y), *_ = val_batches(corpus, eval_seqs=1, context_tokens=4, batch_seqs=1)
    assert torch.equal(y, x + 1)
