"""python -m benchmarks: measures every claim of speed and memory, prints tables and bars, writes a JSON file beside.

a  step time, peak memory, training state over width x density, against the reference way (benchmarks/reference.py)
b  whole grids against the reference way
c  a and b on a GPU, where there is one
d  cost against width at a constant number of live weights, part by part, beside its bound
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import iso_parameter, step_time, whole_grids
from benchmarks.bars import verdicts
from benchmarks.machine import machine_facts
from benchmarks.turns import Effort
from supar_sweep.sweep.tables import render

RESULTS = Path(__file__).with_name("results")
BUSY_LOAD = 0.5


@dataclass(frozen=True)
class Plan:
    """What each benchmark measures."""

    a: step_time.Setting
    b: whole_grids.Setting
    d: iso_parameter.Setting


FULL = Plan(step_time.Setting(), whole_grids.Setting(), iso_parameter.Setting())

_SMALL: dict[str, Any] = {"batch_seqs": 2, "context_tokens": 16}
SMOKE = Plan(
    step_time.Setting(widths=(64,), one_in=(4,), threads=(1,), effort=Effort(0, 1, 1), **_SMALL),
    whole_grids.Setting(
        widths=(64,), parameterizations=("supar",), one_in=(4,), n_lrs=2, seeds=(0,), n_processes=1, steps=3, **_SMALL
    ),
    iso_parameter.Setting(shapes=((64, 1), (128, 4)), rounds=1, **_SMALL),
)


def say(message: str) -> None:
    """Say on stderr what is measured now."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", file=sys.stderr, flush=True)


def run_a(setting: step_time.Setting) -> dict[str, Any]:
    """Return benchmark a's settings, rows and ratios."""
    with tempfile.TemporaryDirectory(prefix="supar-benchmark-") as folder:
        rows = step_time.measure(setting, Path(folder), say)
    return {"settings": asdict(setting), "rows": rows, "table": step_time.ratios(rows)}


def run_b(setting: whole_grids.Setting) -> dict[str, Any]:
    """Return benchmark b's settings and rows."""
    with tempfile.TemporaryDirectory(prefix="supar-benchmark-") as folder:
        return {"settings": asdict(setting), "table": whole_grids.measure(setting, Path(folder), say)}


def run_c(plan: Plan) -> dict[str, Any]:
    """Return a and b on the GPU, or a note that there is none."""
    import torch

    if not torch.cuda.is_available():
        return {"note": "no GPU here"}
    # what GPUs are made for; the reference in the same
    where: dict[str, Any] = {"device": "cuda", "precision": "bfloat16"}
    return {
        "a": run_a(replace(plan.a, threads=(1,), **where)),
        "b": run_b(replace(plan.b, **where)),
        "machine": machine_facts("cuda"),
    }


def run_d(setting: iso_parameter.Setting) -> dict[str, Any]:
    """Return benchmark d's settings and rows."""
    return {"settings": asdict(setting), "table": iso_parameter.measure(setting, say)}


COLUMNS = {
    "a": "device threads width one_in reference_ms dense_x dense_x_same_route compact_x compact_x_same_route auto_x "
    "auto_x_same_route cohort_x cohort_x_same_route peak_reference_mib peak_x state_reference_mib state_x",
    "b": "device width points ours_cells sequential_s packed_s same_route_s ours_s sequential_x x x_same_route "
    "reference_val_loss ours_val_loss ours_diverged",
    "d": "width one_in compact step_ms linear_ms linear_bound_ms linear_of_bound attention_ms attention_bound_ms "
    "attention_of_bound elementwise_ms elementwise_bound_ms elementwise_of_bound rest_ms state_mib state_x",
}
TITLES = {
    "a": "a. A step: the reference's time over ours (x), as shipped and on the same matmul route; memory over auto's",
    "b": "b. A whole grid in seconds of wall time; x = the faster of the reference's two schedules over ours",
    "d": "d. A step at constant live weights, and each part beside its bound",
}


def show(rows: Sequence[Mapping[str, Any]], part: str) -> str:
    """Return a part's table as text, its numbers rounded to what was measured."""
    wanted = [key for key in COLUMNS[part].split() if any(key in row for row in rows)]
    rounded = [{key: _rounded(row.get(key)) for key in wanted} for row in rows]
    return render(rounded, wanted, title=TITLES[part])


def _rounded(value: Any) -> Any:
    if isinstance(value, bool):
        return "met" if value else "NOT MET"
    if not isinstance(value, float):
        return value
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def report(results: Mapping[str, Any]) -> str:
    """Return all tables and bars as text.

    Args:
        results: what the results file holds.
    """
    parts = results["parts"]
    text = [show(parts[part]["table"], part) for part in ("a", "b", "d") if part in parts]
    if gpu := parts.get("c"):
        text.append(f"c. {gpu['note']}\n" if "note" in gpu else "")
        text += [show(gpu[part]["table"], part) for part in ("a", "b") if part in gpu]
    columns = ("benchmark", "claim", "value", "bar", "aim", "met")
    bars = [{key: _rounded(bar[key]) for key in columns} for bar in results["bars"]]
    text.append(render(bars, columns, title="Bars (of what was measured in full)"))
    return "\n".join(text)


def judged(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the bars of the parts that were measured in full: a smoke test or a share of a grid meets none.

    Args:
        parts: of the results file.
    """
    full: dict[str, Any] = {"a": FULL.a, "b": FULL.b, "d": FULL.d}
    names = [name for name, setting in full.items() if name in parts]
    in_full = [name for name in names if finite(parts[name]["settings"]) == finite(asdict(full[name]))]
    return verdicts({name: parts[name]["table"] for name in in_full})


def finite(value: Any) -> Any:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices="abcd", nargs="+", default=list("abcd"), help="which; others keep their results"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="everything once, tiny: shows that it works, measures nothing"
    )
    parser.add_argument("--share", type=float, default=1.0, help="share of b's learning rates, for a first look")
    parser.add_argument("--name", help="of the results file; default: the device's")
    parser.add_argument("--folder", type=Path, default=RESULTS, help=f"of the results file (default: {RESULTS.name}/)")
    asked = parser.parse_args(words)
    plan = SMOKE if asked.smoke else FULL
    plan = replace(plan, b=plan.b.shared(asked.share))
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "a": lambda: run_a(plan.a),
        "b": lambda: run_b(plan.b),
        "c": lambda: run_c(plan),
        "d": lambda: run_d(plan.d),
    }
    machine = machine_facts()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['device']} {machine['cores']} cores".lower()).strip("-")
    file = asked.folder / f"{asked.name or ('smoke' if asked.smoke else slug)}.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"parts": {}}
    file.parent.mkdir(parents=True, exist_ok=True)
    for part in sorted(set(asked.only)):
        begun_s = time.perf_counter()
        load = os.getloadavg()[0]
        if load > BUSY_LOAD:
            say(f"the load of the last minute was {load:.1f}: a busy machine measures its neighbours")
        measured = {
            "machine": machine,
            "measured": datetime.date.today().isoformat(),
            "load_before": load,
            **run[part](),
        }
        results["parts"][part] = {**measured, "wall_s": time.perf_counter() - begun_s}
        results["bars"] = judged(results["parts"])
        # after each part: a later one that fails loses nothing
        file.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(report(results))
    say(f"written: {file}")


if __name__ == "__main__":
    main()
