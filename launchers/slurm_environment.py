"""What the user's shell says to SLURM's commands: which variables count, which are dropped. Pure functions of an environment.

For sbatch and squeue a variable wins over the script and over some options. SBATCH_TIMELIMIT would change what the launcher
asked for, and SQUEUE_PARTITION would hide its elements from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supar_sweep.training.slurm_job import OPTION_PREFIXES

DEFAULTS: Mapping[str, str] = {"SBATCH_PARTITION": "partition", "SBATCH_ACCOUNT": "account", "SBATCH_QOS": "qos"}
"""Where a site tells its users' defaults: the variable, and the launcher's setting that it stands in for while that is null."""

CONNECTION = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Where the cluster is, and who asks."""

OF_A_JOB = ("SLURM_", "SLURMD_")
"""Inside a job these describe that job, and sbatch would take them for ours."""


def commands_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that SLURM's commands are called in: without any of their options, and without a job's variables.

    Args:
        environment: of this process.

    >>> commands_environment({"SLURM_CONF": "/etc/slurm.conf", "SLURM_JOB_ID": "7", "SQUEUE_FORMAT": "%i", "HOME": "/root"})
    {'SLURM_CONF': '/etc/slurm.conf', 'HOME': '/root'}
    """
    dropped = (*OPTION_PREFIXES, *OF_A_JOB)
    return {name: value for name, value in environment.items() if name in CONNECTION or not name.startswith(dropped)}


def taken(launcher: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that the environment stands in for, by the launcher's own names.

    Args:
        launcher: the launcher's settings, plain.
        environment: of this process.

    >>> taken({"partition": None, "qos": "long"}, {"SBATCH_PARTITION": "gpu", "SBATCH_QOS": "short"})
    {'partition': 'gpu'}
    """
    return {
        key: environment[variable]
        for variable, key in DEFAULTS.items()
        if environment.get(variable) and launcher.get(key) is None
    }


def ignored(launcher: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Return the names of the options in the environment that do not reach SLURM. Inside a job, SLURM's own variables are not
    among them.

    Args:
        launcher: the launcher's settings, plain, with what was `taken`.
        environment: of this process.
    """
    own = () if "SLURM_JOB_ID" in environment else ("SLURM_",)
    return sorted(
        name
        for name, value in environment.items()
        if name.startswith((*OPTION_PREFIXES, *own))
        and name not in CONNECTION
        and not (name in DEFAULTS and launcher.get(DEFAULTS[name]) == value)
    )


def notes(launcher: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Return what the user is told about the environment, a line each; [] where it says nothing to SLURM.

    Args:
        launcher: the launcher's settings as they were typed, plain.
        environment: of this process.
    """
    values = taken(launcher, environment)
    variables = {key: variable for variable, key in DEFAULTS.items()}
    said = [f"launcher.{key}={value}, from {variables[key]}" for key, value in values.items()]
    if names := ignored({**launcher, **values}, environment):
        said.append(f"ignored: {', '.join(names)}; the settings launcher.* say what SLURM is asked for")
    return said
