"""`supar-sweep quickstart`: tune a dense proxy, remap its hyperparameters, sweep the sparse targets, draw, judge."""

from __future__ import annotations

from supar_sweep.cli.reproduce import whole
from supar_sweep.cli.settings import Settings


def quickstart(settings: Settings) -> int:
    """Run the whole main job on this machine; a second call finds all done and only redraws. Returns the exit code.

    What is typed holds for the proxy and the targets alike, so the settings are those of the study too.
    """
    return whole(settings, settings, with_report=False)
