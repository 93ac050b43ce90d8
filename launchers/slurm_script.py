"""The batch script of an array: submitit writes it, from the launcher's settings and from what they do not say."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from supar_sweep.errors import ConfigError
from supar_sweep.sweep.arrays import ArrayFolder
from supar_sweep.sweep.code import VERSION_VARIABLE
from supar_sweep.training.environment import LAUNCH_ENV
from supar_sweep.training.slurm_job import command

from .local import THREAD_VARIABLES, search_path
from .slurm_config import SlurmConfig, is_one_line
from .slurm_queue import environment_of_job


def check_folder(folder: Path) -> None:
    """Raise ConfigError where a folder's name cannot stand in a batch script.

    Args:
        folder: of the arrays' files, in the runs folder.
    """
    if not is_one_line(str(folder.absolute())):
        problem = "has a line break or another control character in it, which sbatch would read as something else"
        raise ConfigError("runs_dir", problem, value=str(folder.absolute().parent), allowed="a path of one line")


def submission_script(
    config: SlurmConfig, array: ArrayFolder, *, n: int, at_once: int, threads: int, function: str, code: Path
) -> str:
    """Return the batch script of an array.

    Args:
        config: conf/launcher/slurm.yaml.
        array: its folder.
        n: elements.
        at_once: how many of them may run at once.
        threads: of each process.
        function: what an element calls with its group, "module:name".
        code: the folder that holds the package as it was at submission.
    """
    from submitit import SlurmExecutor

    check_folder(array.path.parent)
    log_options, log_parameters = _logs(array)
    further = {name.replace("_", "-"): value for name, value in config.sbatch.items()}
    wanted = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "gpus_per_node": config.gpus_per_node,
        "mem": f"{round(config.mem_gb * 1024)}M" if config.mem_gb is not None else None,
    }
    executor = SlurmExecutor(array.path)
    executor.update_parameters(
        **{name: value for name, value in wanted.items() if value is not None},
        job_name=array.job_name,
        wckey=None,  # submitit has one of its own, which a site that keeps a list of them refuses
        time=config.timeout_min,
        nodes=config.nodes,
        ntasks_per_node=config.ranks_per_node,
        cpus_per_task=config.cpus,
        array_parallelism=at_once,
        signal_delay_s=config.signal_delay_s,
        stderr_to_stdout=True,
        setup=[*environment_of_job(job_environment(threads, code)), *config.setup],
        srun_args=[*log_options, *_srun_options(config)],
        additional_parameters={"requeue": True, **log_parameters, **further},
    )
    executor.parameters["map_count"] = n
    limits = [str(config.timeout_min * 60), str(config.signal_delay_s), str(config.ranks)]
    return executor._make_submission_file_text(shlex.join(command(str(array.path), function, *limits)), array.key)


def _logs(array: ArrayFolder) -> tuple[list[str], dict[str, str]]:
    """Return srun's and sbatch's options where submitit's own name of the logs (ArrayFolder.log) does not do: SLURM would replace
    a percent sign in the folder's name, which is therefore written twice.
    """
    if "%" not in str(array.path):
        return [], {}
    pattern = str(array.path).replace("%", "%%") + "/%A_%a_%t_log.out"
    return ["--output", pattern], {"output": pattern.replace("%t", "0")}  # srun takes the last of two


def _srun_options(config: SlurmConfig) -> list[str]:
    cores = ["--cpus-per-task", str(config.cpus)]  # srun stopped inheriting it in 22.05
    # ranks that outlive a dead one wait for it, on a GPU for long
    return [*cores, "--kill-on-bad-exit=1"] if config.ranks > 1 else cores


def job_environment(threads: int, code: Path) -> dict[str, str]:
    """Return the variables that an element is started with.

    Args:
        threads: of each process.
        code: the folder that holds the package as it was at submission. The user's own modules are found where they are found
            here.
    """
    variables = {**LAUNCH_ENV, **dict.fromkeys(THREAD_VARIABLES, str(threads)), VERSION_VARIABLE: code.name}
    return {**variables, "PYTHONPATH": os.pathsep.join([str(code), search_path()])}
