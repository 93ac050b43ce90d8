"""Batches as pure functions of (seed, step): the data position of a run is its step, so there is
nothing to save.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supar_sweep.sparse.noise import stream_key, uniform_ints
from supar_sweep.training.corpus import Corpus

DATA_STREAM = "data"


def batch(
    corpus: Corpus,
    *,
    seed: int,
    step: int,
    batch_seqs: int,
    context_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return (x, y), each int64 [batch_seqs / world_size, context_tokens]; y is x one token later.

    Sequence i of step s starts at a uniform position drawn with counter s * batch_seqs + i, with
    replacement.

    Args:
        corpus: at least context_tokens + 1 training tokens.
        seed: of the data order.
        step: >= 0.
        batch_seqs: sequences of the whole batch, over all ranks.
        context_tokens: sequence length.
        rank, world_size: which contiguous share of the batch to return; world_size divides
            batch_seqs.
    """
    share = batch_seqs // world_size
    first = step * batch_seqs + rank * share
    counters = np.arange(first, first + share, dtype=np.uint64)
    key = stream_key(seed, DATA_STREAM, "train")
    starts = uniform_ints(key, counters, len(corpus.train) - context_tokens)
    return _windows(corpus.train, starts, context_tokens)


def val_batches(
    corpus: Corpus, *, eval_seqs: int, context_tokens: int, batch_seqs: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x, y), int64 [<= batch_seqs, context_tokens], over held-out sequences: evenly spaced,
    the same for every cell.

    Args:
        corpus: at least context_tokens + 1 held-out tokens.
        eval_seqs: sequences in all.
        context_tokens: sequence length.
        batch_seqs: sequences at once; decides memory, not which tokens are read.
    """
    last = len(corpus.val) - context_tokens - 1
    starts = np.arange(eval_seqs, dtype=np.int64) * last // max(1, eval_seqs - 1)
    for first in range(0, eval_seqs, batch_seqs):
        yield _windows(corpus.val, starts[first : first + batch_seqs], context_tokens)


def _windows(
    tokens: npt.NDArray[np.generic], starts: npt.NDArray[np.int64], context_tokens: int
) -> tuple[Tensor, Tensor]:
    positions = starts[:, None] + np.arange(context_tokens + 1)
    windows = torch.from_numpy(tokens[positions].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
