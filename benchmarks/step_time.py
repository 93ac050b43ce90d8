"""Benchmark a: step time, peak memory and the sparse layers' training state of each variant, over width and density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import SHAPE, settings, write_tokens
from benchmarks.machine import MIB
from benchmarks.turns import Effort, Turns
from benchmarks.variants import AS_SHIPPED, OURS, SAME_ROUTE, VARIANTS, Place
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig


@dataclass(frozen=True)
class Setting:
    """What to measure.

    Args:
        widths, one_in: every width at every density 1 / one_in.
        threads: torch threads, each in its turn.
        batch_seqs, context_tokens: of a step.
        device: "cpu" or "cuda".
        precision: train.precision.
        effort: for each width, density and number of threads.
    """

    widths: Sequence[int] = (256, 512, 1024, 2048)
    one_in: Sequence[int] = (1, 4, 16, 64)
    threads: Sequence[int] = (1, 2)
    batch_seqs: int = 8
    context_tokens: int = 128
    device: str = "cpu"
    precision: str = "float32"
    effort: Effort = field(default_factory=lambda: Effort(budget_s=12, min_rounds=3, max_rounds=15))


def measure(setting: Setting, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return a row for each width, density, number of threads and variant.

    Args:
        setting: what to measure.
        folder: an empty one, for the reference's tokens.
        say: told what is measured now.
    """
    words = [*SHAPE, f"model.context_tokens={setting.context_tokens}", f"train.batch_seqs={setting.batch_seqs}"]
    # more steps than are taken: the schedule is at its peak for most of them
    words += ["train.steps=2000", f"train.precision={setting.precision}"]
    composed = settings(words)
    plain, runtime = composed.cell_plain(), composed.plain["runtime"]
    data = write_tokens(decode(CellConfig, plain), folder)
    rows = []
    for width in setting.widths:
        for one_in in setting.one_in:
            cell = {**plain, "density": 1 / one_in, "model": {**plain["model"], "width": width}}
            names = [name for name, variant in VARIANTS.items() if one_in > 1 or not variant.sparse_only]
            with Turns(names, cell) as turns:
                memory: dict[str, dict[str, int]] = {}
                for threads in setting.threads:
                    say(f"width {width}, density 1/{one_in}, {threads} thread(s) on {setting.device}")
                    facts = turns.build(Place(threads, setting.device, data, runtime))
                    step_s, n_rounds = turns.measure(setting.effort)
                    memory = memory or turns.memory()  # of the first build: a second would add to the high-water mark
                    key = {"device": setting.device, "width": width, "one_in": one_in, "threads": threads}
                    rows += [
                        {**key, "variant": name, "step_ms": 1e3 * step_s[name], "rounds": n_rounds}
                        | {**memory[name], **facts[name]}
                        for name in step_s
                    ]
    return rows


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each width, density and number of threads: the references over each of ours.

    Ratios against the reference as shipped, `<variant>_x`, and on ours' matmul route, `<variant>_x_same_route`; the references'
    peak memory and training state over `auto`'s, `peak_x` and `state_x`.

    Args:
        rows: of `measure`.
    """
    keys = ("device", "threads", "width", "one_in")
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["variant"]] = row
    table = []
    for values, of in sorted(groups.items()):
        line: dict[str, Any] = {**dict(zip(keys, values, strict=True)), "reference_ms": of[AS_SHIPPED]["step_ms"]}
        for name in OURS:
            if name in of:
                line[f"{name}_x"] = of[AS_SHIPPED]["step_ms"] / of[name]["step_ms"]
                line[f"{name}_x_same_route"] = of[SAME_ROUTE]["step_ms"] / of[name]["step_ms"]
        for what in ("peak", "state"):
            line[f"{what}_reference_mib"] = of[AS_SHIPPED][f"{what}_bytes"] / MIB
            line[f"{what}_x"] = of[AS_SHIPPED][f"{what}_bytes"] / of["auto"][f"{what}_bytes"]
        table.append(line)
    return table
