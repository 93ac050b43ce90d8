"""Elements that SLURM stops in the middle: time limit, preemption, requeue, lost nodes. All side by side on one cluster, each
with nodes of its own where it does something to a node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm import SlurmLauncher
from supar_sweep.sweep.jobs import Event, folder_of
from tests import cluster_cells
from tests.clusters import Cluster, cluster
from tests.stories import Stories
from tests.test_launchers_slurm import assert_whole_curve, begun, element_of, job_of, launcher, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

NODES = 8
TIMED_STEPS = 400
"""More than fit into half a minute, when the time limit's signal comes; no more than into a minute."""
Job = Mapping[str, Any]
Told = tuple[Job, Event]
Ask = Callable[[Callable[[Cluster, Path], Told]], Told]
story: Stories[Told] = Stories()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=NODES, cpus=4, mem_mb=4000, grace_s=10) as made,
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def told(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with story.told(slurm, tmp_path_factory) as ask:
        yield ask


def on(*numbers: int) -> dict[str, Any]:
    """Settings that keep an element to these nodes."""
    others = [f"n{number}" for number in range(1, NODES + 1) if number not in numbers]
    return {"sbatch": {"exclude": ",".join(others)}}


def submitted(slurm: Cluster, made: SlurmLauncher, job: Job) -> str:
    """Submit a job alone, and return its element when it has begun and has something to lose."""
    made.submit([job])
    made.events(0)
    slurm.wait_for(lambda: begun(job, steps=3))
    return element_of(job)


def hurry(slurm: Cluster, element: str) -> None:
    """Wait until the element is requeued, and no longer than that."""
    slurm.wait_for(lambda: slurm.field(element, "Restarts") not in ("0", ""))
    slurm.wait_for_state(element, "PENDING", "RUNNING")
    slurm.start_now(element)


def starts(job: Job) -> list[dict[str, Any]]:
    """The attempts' facts, oldest first."""
    return [json.loads((attempt / "attempt.json").read_text()) for attempt in folder_of(job).attempts()]


def ends(job: Job) -> list[dict[str, Any]]:
    """The attempts' ends, oldest first."""
    return [json.loads((attempt / "end.json").read_text()) for attempt in folder_of(job).attempts()]


# -- the stories ---------------------------------------------------------------------------------


@story
def time_limit(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, 1, steps=TIMED_STEPS)
    with launcher(runs, timeout_min=1, **on(1)) as made:
        element = submitted(slurm, made, job)
        hurry(slurm, element)
        (event,) = until(made, [job]).values()
    return job, event


@story
def time_limit_where_the_site_forbids_requeue(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, 7, steps=1000)
    with launcher(runs, timeout_min=1, **on(1)) as made:
        slurm.ask("scontrol", "update", f"jobid={submitted(slurm, made, job)}", "Requeue=0")
        (event,) = until(made, [job]).values()
    return job, event


@story
def time_limit_without_a_step(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, cluster_cells.STUCK)
    with launcher(runs, timeout_min=1, **on(1)) as made:
        made.submit([job])
        (event,) = until(made, [job]).values()
    return job, event


@story
def preempted(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, 2, steps=100)
    with launcher(runs, **on(2)) as made:
        element = submitted(slurm, made, job)
        slurm.batch("sleep 1", "-p", "urgent", "--nodelist=n2", "--exclusive")
        hurry(slurm, element)
        (event,) = until(made, [job]).values()
    return job, event


@story
def preempted_where_that_cancels(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, 3, steps=100)
    with launcher(runs, partition="cancelling", **on(3)) as made:
        element = submitted(slurm, made, job)
        slurm.batch("sleep 1", "-p", "urgent", "--nodelist=n3", "--exclusive")
        hurry(slurm, element)
        (event,) = until(made, [job]).values()
    return job, event


@story
def requeued_by_hand(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, 4, steps=60)
    with launcher(runs, **on(1)) as made:
        element = submitted(slurm, made, job)
        slurm.ask("scontrol", "requeue", element)
        hurry(slurm, element)
        (event,) = until(made, [job]).values()
    return job, event


@story
def node_lost(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, 5, steps=100)
    with launcher(runs, **on(5, 6)) as made:
        element = submitted(slurm, made, job)
        node = starts(job)[0]["provenance"]["slurm"]["node"]
        slurm.kill_node(node, with_jobs=True)
        hurry(slurm, element)
        (event,) = until(made, [job]).values()
    slurm.start_node(node)
    return job, event


@story
def node_given_up_that_works_on(slurm: Cluster, runs: Path) -> tuple[Job, Event]:
    job = job_of(runs, 6, steps=500)
    with launcher(runs, **on(7, 8)) as made:
        element = submitted(slurm, made, job)
        node = starts(job)[0]["provenance"]["slurm"]["node"]
        slurm.kill_node(node, with_jobs=False)
        hurry(slurm, element)
        (event,) = until(made, [job]).values()
    slurm.start_node(node)
    return job, event


# -- what came of them ---------------------------------------------------------------------------


def test_a_time_limit_saves_and_continues_in_a_new_start(told: Ask) -> None:
    job, event = told(time_limit)
    assert event.end == "done", event
    assert_whole_curve(job, TIMED_STEPS)
    *saved, last = ends(job)
    assert saved
    assert last["end"] == "done"
    for end, start in zip(saved, starts(job)[1:], strict=True):
        assert end["end"] == "timeout"
        assert end["message"].startswith("timeout after ")
        assert start["resumed_from_step"] == int(end["message"].split()[2]) > 0
    assert [start["provenance"]["slurm"]["restarts"] for start in starts(job)] == [*range(len(saved) + 1)]


@pytest.mark.parametrize(
    ("tell", "reason"),
    [
        (time_limit_where_the_site_forbids_requeue, "; not requeued: .*(disabled|denied|[Rr]equeue)"),
        (time_limit_without_a_step, "timeout after 0 of 6 steps; not requeued: no step was saved since this start"),
    ],
)
def test_a_time_limit_without_a_requeue_says_why(told: Ask, tell: Any, reason: str) -> None:
    job, event = told(tell)
    assert (event.end, event.died) == ("timeout", False)
    assert re.search(reason, event.message)
    assert [end["end"] for end in ends(job)] == ["timeout"]
    assert ends(job)[0]["message"] == event.message


@pytest.mark.parametrize(
    ("tell", "steps", "why"),
    [
        (preempted, 100, "preempted"),
        (preempted_where_that_cancels, 100, "preempted"),
        (requeued_by_hand, 60, "cancelled"),
    ],
)
def test_a_preemption_and_a_requeue_save_and_continue(told: Ask, tell: Any, steps: int, why: str) -> None:
    job, event = told(tell)
    assert event.end == "done", event
    assert_whole_curve(job, steps)
    first, second = ends(job)
    assert (first["end"], second["end"]) == ("cancelled", "done")
    assert first["message"].startswith(f"{why} after ")
    assert starts(job)[1]["resumed_from_step"] == int(first["message"].split()[2]) > 0


def test_a_lost_nodes_cell_starts_again_elsewhere(told: Ask) -> None:
    job, event = told(node_lost)
    assert event.end == "done", event
    assert_whole_curve(job, 100)
    first, second = starts(job)
    assert first["provenance"]["slurm"]["node"] != second["provenance"]["slurm"]["node"]
    assert second["resumed_from_step"] > 0


def test_a_process_that_works_on_is_waited_for(told: Ask) -> None:
    job, event = told(node_given_up_that_works_on)
    assert event.end == "done", event
    assert_whole_curve(job, 500)
    assert len(starts(job)) == 1, "nobody trained the cell beside its living process"
