"""Masks of a model that two real processes share: FSDP2, DDP and tensor parallelism, over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing.spawn import spawn

from tests import sharded_masks
from tests.masked_nets import WIDTH, planned

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(sharded_masks.run, (str(folder),), nprocs=sharded_masks.N_RANKS)  # type: ignore[no-untyped-call]
    return {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in sharded_masks.CASES}


TRAINED = [name for name in sharded_masks.CASES if name.startswith(("fsdp", "ddp", "tensor"))]


@pytest.mark.parametrize("name", TRAINED)
def test_live_weights_move_and_dead_ones_do_not(name: str, results: dict[str, Any]) -> None:
    n_live = sum(plan.live for plan in planned()[1] if plan.density < 1)
    assert results[name] == {"dead": 0, "still": 0, "moved": n_live}


def test_hold_masks_holds_shards_and_refuses_what_fully_shard_replaced(results: dict[str, Any]) -> None:
    result = results["held by hand"]
    assert (result["dead"], result["still"]) == (0, 0)
    assert "no longer blocks.0.fc.weight: fully_shard" in result["refused"]


def test_one_dead_weight_in_one_shard_is_found_by_all_ranks(results: dict[str, Any]) -> None:
    n_dead = WIDTH * WIDTH - planned()[1][1].live
    for said in results["one moved"]["said"]:
        assert said.startswith(f"blocks.1.fc.weight: 1 of {n_dead} dead weights are not 0.")


def test_dense_weights_loaded_into_shards_are_masked(results: dict[str, Any]) -> None:
    assert results["loaded"] == {"dead": 0, "still": 0}
