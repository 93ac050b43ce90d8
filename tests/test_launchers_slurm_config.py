"""The launcher's settings, and how SLURM's answers are read: no SLURM needed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm_arrays import Size, batches, parallelism
from launchers.slurm_config import SlurmConfig, options_in
from launchers.slurm_queue import read_accounts
from launchers.slurm_script import submission_script
from launchers.slurm_submission import Refused
from supar_sweep.cli.compose import register_resolvers
from supar_sweep.cli.rooms import conf_dir
from supar_sweep.config.decode import decode
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.arrays import ArrayFolder

USAGE = """Usage: sbatch [OPTIONS(0)...] [ : [OPTIONS(N)...]] script(0) [args(0)...]

  -A, --account=name          charge job to specified account
      --exclude=nodes         exclude a specific list of hosts, as with --nodelist
      --exclusive[=user]      allocate nodes in exclusive mode
      --nodelist=hosts        request a specific list of hosts
"""


def shipped(name: str, **changes: Any) -> SlurmConfig:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose("run", [f"launcher={name}"]).launcher, resolve=True)
    return decode(SlurmConfig, {**plain, **changes}, prefix="launcher")


@pytest.mark.parametrize("name", ["slurm", "dev_cluster"])
def test_what_is_shipped_is_valid(name: str) -> None:
    assert shipped(name).name == "slurm"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partitoin": "gpu"}, "launcher.partitoin: unknown key; did you mean 'partition'?"),
        ({"cpus": 0}, r"launcher.cpus: out of range \(got 0\); allowed: >= 1"),
        ({"cpus": 100_000}, "launcher.cpus: out of range .* <= 10000"),
        ({"mem_gb": 1e-9}, r"launcher.mem_gb: out of range \(got 1e-09\); allowed: >= 0.001"),
        ({"timeout_min": 10**12}, "launcher.timeout_min: out of range"),
        ({"poll_s": 1e308}, "launcher.poll_s: out of range"),
        ({"poll_s": 1e-308}, "launcher.poll_s: out of range"),
        ({"signal_delay_s": 70_000, "timeout_min": 10_000}, "launcher.signal_delay_s: out of range .* <= 65535"),
        ({"partition": "gpu\nlong"}, r"launcher.partition: has a line break .*\(got 'gpu\\nlong'\)"),
        ({"sbatch": {"comment": "a\nb"}}, r"launcher.sbatch.comment: has a line break .*\(got 'a\\nb'\)"),
        ({"larger": [{"above_gb": 1, "qos": "a\nb"}]}, r"launcher.larger\[0\].qos: has a line break"),
        (
            {"setup": ["module load cuda", "a\x00b"]},
            r"launcher.setup\[1\]: has a line break or another control character",
        ),
        ({"timeout_min": 1.5}, "launcher.timeout_min: must be an integer"),
        ({"timeout_min": 2, "signal_delay_s": 120}, "launcher.signal_delay_s: leaves no time before it"),
        ({"gpus_per_node": None}, r"launcher.gpu_memory_gb: does not go with gpus_per_node \(got 40"),
        ({"sbatch": {"time": 10}}, "launcher.sbatch.time: is set by launcher.timeout_min"),
        ({"sbatch": {"cpus_per_task": 10}}, "launcher.sbatch.cpus_per_task: is set by launcher.cpus"),
        (
            {"gpus_per_node": 4, "tasks_per_node": 2},
            r"launcher.tasks_per_node: does not go with gpus_per_node=4: .* \(got 2\); allowed: null",
        ),
        ({"sbatch": {"nodes": 2}}, "launcher.sbatch.nodes: is set by launcher.nodes"),
        (
            {"nodes": 2, "processes_per_gpu": 2},
            r"launcher.nodes: has all processes .* allowed: 1, or processes_per_gpu=null",
        ),
        ({"tasks_per_node": 1, "processes_per_gpu": 2}, r"launcher.tasks_per_node: has all processes"),
        ({"sbatch": {"requeue": True}}, "launcher.sbatch.requeue: is the launcher's own"),
        ({"sbatch": {"exclusive": False}}, "launcher.sbatch.exclusive: must be text, a number, or true"),
        (
            {"larger": [{"above_bg": 1, "mem_gb": 9}]},
            r"launcher.larger\[0\].above_bg: unknown key .* did you mean 'above_gb'",
        ),
        ({"larger": [{"above_gb": 1, "wait": True}]}, r"launcher.larger\[0\].wait: is the same for all cells"),
        ({"larger": [{"mem_gb": 9}]}, r"launcher.larger\[0\]: needs a bound and a setting"),
        ({"larger": [{"above_gb": 1}]}, r"launcher.larger\[0\]: needs a bound and a setting"),
        ({"larger": [{"above_gb": "many", "mem_gb": 9}]}, r"launcher.larger\[0\].above_gb: must be a number"),
        (
            {"larger": [{"above_gb": 1, "mem_gb": 16}]},
            r"launcher.larger\[0\]: has no effect: it asks for what all cells",
        ),
        ({"larger": [{"above_gb": 1, "mem_gb": -1}]}, r"launcher.larger\[0\].mem_gb: out of range \(got -1.0\)"),
        ({"larger": [{"above_gb": 1, "gpus_per_node": None}]}, r"launcher.larger\[0\].gpu_memory_gb: does not go with"),
        (
            {"larger": [{"above_gb": 9, "mem_gb": 90}, {"above_gb": 5, "above_flops": 0, "mem_gb": 50}]},
            r"launcher.larger\[0\]: has no effect: larger\[1\] is for all of its cells too",
        ),
    ],
)
def test_a_wrong_setting_is_an_error_that_teaches(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shipped("slurm", **changes)


def test_a_further_option_is_one_of_sbatchs_own() -> None:
    known = options_in(USAGE)
    assert known == {"account", "exclude", "exclusive", "nodelist"}
    shipped("slurm", sbatch={"exclude": "n7", "exclusive": True}).check_options(known)
    with pytest.raises(ConfigError, match=r"launcher\.sbatch\.exclud: no such option") as error:
        shipped("slurm", sbatch={"exclud": "n7"}).check_options(known)
    assert str(error.value).endswith("did you mean 'exclude'?; allowed: exclude, exclusive, nodelist")
    of_a_row = shipped("slurm", larger=[{"above_gb": 1, "mem_gb": 90}, {"above_gb": 2, "sbatch": {"exclud": "n7"}}])
    with pytest.raises(ConfigError, match=r"launcher\.larger\[1\]\.sbatch\.exclud: no such option"):
        of_a_row.check_options(known)


ROWS: tuple[dict[str, Any], ...] = (
    {"above_gb": 20, "mem_gb": 64},
    {"above_flops": "1e18", "timeout_min": 1440, "cpus": 16},
    {"above_gb": 20, "above_flops": 1e18, "mem_gb": 64, "timeout_min": 1440, "partition": "huge"},
)


@pytest.mark.parametrize(
    ("memory_gb", "flops", "row"),
    [(20, 1e18, 0), (0, 0, 0), (20.1, 1e18, 1), (1, 1.1e18, 2), (20.1, 1.1e18, 3)],
)
def test_a_cell_asks_by_the_last_row_whose_bounds_it_exceeds(memory_gb: float, flops: float, row: int) -> None:
    config = shipped("slurm", larger=ROWS)
    assert config.row_for(memory_gb, flops) == row
    asked, plain = config.with_row(row), shipped("slurm")
    changed = {key: value for key, value in (ROWS[row - 1] if row else {}).items() if not key.startswith("above")}
    assert asked == replace(plain, **changed)


def job(name: str, memory_gb: float = 1.0) -> dict[str, Any]:
    return {"cell_id": name, "size_gb": memory_gb, "runtime": {"threads": None, "device": "cpu"}}


def test_groups_become_arrays_of_equal_resources_several_an_element_none_too_large() -> None:
    config = shipped(
        "slurm",
        processes_per_gpu=3,
        gpus_per_node=2,
        cpus=12,
        array_parallelism=4,
        larger=[{"above_gb": 20, "cpus": 24}],
    )
    small = [[job(f"s{index}a"), job(f"s{index}b")] for index in range(40)]
    large = [[job("l0", 21)], [job("l1a", 3), job("l1b", 30)]]
    found = batches(
        [large[0], *small, large[1]],
        config,
        size=lambda job: Size(job["size_gb"], 1),
        threads=None,
        max_array_size=4,
    )
    assert [(batch.config.cpus, len(batch.elements), batch.at_once) for batch in found] == [
        (24, 1, 1),  # 2 groups in one element of 6 processes
        (12, 4, 2),
        (12, 3, 1),
    ]
    assert [len(groups) for batch in found for groups in batch.elements] == [2, *([6] * 6), 4]
    ids = [[job["cell_id"] for job in group] for batch in found for groups in batch.elements for group in groups]
    assert ids == [["l0"], ["l1a", "l1b"], *([f"s{index}a", f"s{index}b"] for index in range(40))]
    # each process has its share of its element's cores, where nobody chose
    assert [{job["runtime"]["threads"] for job in batch.jobs} for batch in found] == [{24 // 6}, {12 // 6}, {12 // 6}]
    [batch] = batches(small[:1], config, size=lambda job: Size(), threads=7, max_array_size=4)
    assert {job["runtime"]["threads"] for job in batch.jobs} == {7}
    assert small[0][0]["runtime"]["threads"] is None


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({}, 1),
        ({"gpus_per_node": 4}, 4),
        ({"gpus_per_node": 4, "nodes": 3}, 12),
        ({"gpus_per_node": 4, "processes_per_gpu": 2}, 1),
        ({"gpus_per_node": None, "gpu_memory_gb": None, "nodes": 2}, 2),
        ({"gpus_per_node": None, "gpu_memory_gb": None, "nodes": 2, "tasks_per_node": 5}, 10),
    ],
)
def test_an_element_is_a_process_a_gpu_on_each_node(changes: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    config = shipped("slurm", **changes)
    assert config.ranks == ranks
    script = submission_script(
        config, ArrayFolder.new(tmp_path, [[]]), n=1, at_once=1, threads=1, function="a:b", code=tmp_path
    )
    asked = dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node|gpus-per-node)=(.*)$", script, re.MULTILINE))
    assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == ranks
    assert asked.get("gpus-per-node") == (str(config.gpus_per_node) if config.gpus_per_node else None)
    assert script.rstrip().endswith(f" a:b {config.timeout_min * 60} {config.signal_delay_s} {ranks}")
    # alone, a process that fails has nobody to take with it
    assert ("--kill-on-bad-exit=1" in script) == (ranks > 1)


def script_in(folder: Path) -> str:
    array = ArrayFolder(folder / "slurm" / "KEY")
    return submission_script(shipped("slurm"), array, n=2, at_once=1, threads=1, function="a:b", code=folder)


def test_a_percent_sign_of_the_runs_folder_is_none_of_slurms_to_replace(tmp_path: Path) -> None:
    pattern = f"{tmp_path}/p%%j%%a/slurm/KEY/%A_%a_"
    lines = script_in(tmp_path / "p%j%a").splitlines()
    assert f"#SBATCH --output={pattern}0_log.out" in lines
    [command] = [line for line in lines if line.startswith("srun ")]
    assert re.findall(r"--output (\S+)", command)[-1] == f"{pattern}%t_log.out"
    assert len(re.findall(r"--output ", script_in(tmp_path))) == 1


def test_a_runs_folder_of_two_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs_dir: has a line break"):
        script_in(tmp_path / "a\nb")


@pytest.mark.parametrize("at_once", [1, 7, 64, 5000])
@pytest.mark.parametrize("sizes", [[1], [1000], [1000, 1000, 500], [3, 1, 1, 1]])
def test_arrays_share_the_parallelism_by_size(sizes: list[int], at_once: int) -> None:
    shares = parallelism(sizes, at_once)
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert sum(shares) == max(min(at_once, sum(sizes)), len(sizes))
    fair = [at_once * size / sum(sizes) for size in sizes]
    if at_once > 10 * len(sizes) and at_once <= sum(sizes):
        assert all(abs(share - each) <= 1 for share, each in zip(shares, fair, strict=True))


@pytest.mark.parametrize(
    ("text", "full", "unsure"),
    [
        ("AssocMaxSubmitJobLimit; Batch job submission failed: Job violates accounting/QOS policy", True, False),
        ("QOSMaxSubmitJobPerUserLimit", True, False),
        ("Batch job submission failed: Resource temporarily unavailable", True, False),
        ("Slurm temporarily unable to accept job, sleeping and retrying", True, False),
        ("Slurm job queue full, sleeping and retrying", True, False),
        ("Job creation temporarily disabled, retrying", True, False),
        ("Currently unable to load job state information, retrying: Resource busy", False, True),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", False, True),
        ("Batch job submission failed: Socket timed out on send/recv operation", False, True),
        ("invalid partition specified: nowhere", False, False),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", False, False),
    ],
)
def test_a_refusal_is_for_now_for_good_or_unsure(text: str, full: bool, unsure: bool) -> None:
    refused = Refused(text)
    assert (refused.full, refused.unsure) == (full, unsure)


def test_accounts_of_elements_ranges_and_steps() -> None:
    found = read_accounts(
        "7_0|COMPLETED|0:0\n7_0.batch|COMPLETED|0:0\n7_1|FAILED|9:0\n7_1.0|OUT_OF_MEMORY|0:125\n"
        "7_[2-3,5%4]|PENDING|0:0\n8_0|CANCELLED by 1000|0:15\n"
    )
    assert {element: report.state for element, report in found.items()} == {
        "7_0": "COMPLETED",
        "7_1": "OUT_OF_MEMORY",
        **dict.fromkeys(("7_2", "7_3", "7_5"), "PENDING"),
        "8_0": "CANCELLED",
    }
    assert found["8_0"].code == -15
