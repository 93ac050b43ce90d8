"""A process group of this process alone, for what torch.distributed does to a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


@contextmanager
def one_process() -> Iterator[None]:
    """Within, torch.distributed is initialised: gloo, rank 0 of 1."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
