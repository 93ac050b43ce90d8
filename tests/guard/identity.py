"""What tests/guard/identity.json holds: the cells of every preset at every scale that it takes, and the numbers of the rules.

    .venv/bin/python -m tests.guard.identity        adds the rows that are missing, and changes none

One fingerprint stands for every text, so the rows are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from supar_sweep.cli.compose import compose
from supar_sweep.cli.main import main as supar_sweep
from supar_sweep.cli.rooms import conf_dir
from supar_sweep.cli.settings import Settings
from supar_sweep.config.schema import CellConfig
from supar_sweep.sweep.grid import GridSpec, enumerate_grid
from supar_sweep.sweep.identity import canonical, cell_id
from supar_sweep.sweep.tune import proxy_of, study_hash

GOLDEN = Path(__file__).resolve().parent / "identity.json"
FINGERPRINT = "0123456789abcdef" * 4
SCALES = ("paper", "gpu1", "cpu")
PAPERS_TEXT = ("data.train_path=train.bin", "data.val_path=val.bin")
GROUPS = ("model", "optimizer", "schedule", "train", "sparsity", "hparams")
ADD = "if it is new, add it with: .venv/bin/python -m tests.guard.identity"

Row = dict[str, Any]


def presets() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield a name, a command and its words for each preset at each scale, each study, each option of a cell's groups."""
    for path in sorted((conf_dir() / "experiment").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        command = "coord-check" if "figure: coord_check" in text else "plot"
        for scale in SCALES if "${scale}" in text else (None,):
            words = (f"experiment={path.stem}", *of_scale(scale))
            yield " ".join(words[: 2 if scale else 1]), command, words
    for size in ("full", "smoke"):
        yield f"quickstart size={size}", "quickstart", (f"size={size}",)
    for scale in (None, *SCALES):
        words = of_scale(scale)
        yield " ".join(("tune", *words[:1])), "tune", words
    for group in GROUPS:
        for path in sorted((conf_dir() / group).glob("*.yaml")):
            word = f"{group}={path.stem}"
            yield f"cell {word}", "run", (word, "density=0.25")


def of_scale(scale: str | None) -> tuple[str, ...]:
    """Return the words that choose a scale."""
    return (f"scale={scale}", *(PAPERS_TEXT if scale == "paper" else ())) if scale else ()


def cells_of(command: str, words: tuple[str, ...]) -> tuple[list[CellConfig], Row]:
    """Return the cells that a command would train, in its order, and what else is known of it."""
    settings = Settings.read(command, compose(command, words), words)
    if command == "tune":
        return study_of(settings)
    if command == "coord-check":
        check, base = settings.plain["check"], settings.cell_plain()
        common = {"parameterization": check["parameterizations"], "seed": check["seeds"]}
        axes = [{**common, key: check[name]} for key, name in (("density", "densities"), ("width", "widths"))]
        return [
            point.cell for each in axes if all(each.values()) for point in enumerate_grid(base, GridSpec(axes=each))
        ], {}
    cells = [point.cell for point in settings.points()]
    return cells, study_of(settings)[1] if command == "quickstart" else {}


def study_of(settings: Settings) -> tuple[list[CellConfig], Row]:
    """Return a study's proxy and its hash."""
    proxy = proxy_of(settings.cell())
    return [proxy], {"study_hash": study_hash(settings.study(), proxy, FINGERPRINT)}


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return a canonical cell as dotted key -> value."""
    if isinstance(value, dict) and value:
        return {name: found for part, item in value.items() for name, found in flat(item, f"{key}.{part}").items()}
    return {key.removeprefix("."): value}


def digest(lines: list[str]) -> str:
    """Return the sha256 of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def row_of(command: str, words: tuple[str, ...]) -> Row:
    """Return the golden row of a preset.

    `ids` and `canonical` are hashes over all cells. So that a red test can say what has changed, the first and the last id, the
    first cell as a whole, and the values of every setting that varies stand beside them.
    """
    cells, more = cells_of(command, words)
    ids = [cell_id(cell, FINGERPRINT) for cell in cells]
    plain = {found: canonical(cell) for found, cell in dict(zip(ids, cells, strict=True)).items()}
    lines = sorted(json.dumps(each, sort_keys=True) for each in plain.values())
    flats = [flat(each) for each in plain.values()]
    keys = sorted({key for each in flats for key in each})
    values = {key: sorted({json.dumps(each.get(key)) for each in flats}) for key in keys}
    return {
        **{"n_points": len(cells), "n_cells": len(plain), "first_id": ids[0], "last_id": ids[-1]},
        **{"ids": digest(sorted(plain)), "canonical": digest(lines), **more},
        "cell": {key: json.loads(found[0]) for key, found in values.items() if len(found) == 1},
        "varies": {key: [json.loads(text) for text in found] for key, found in values.items() if len(found) > 1},
    }


def rules() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a name and the words of `transfer` for every column of the rules."""
    shape = (
        "target.width=1024",
        "target.density=0.125",
        "target.n_layer=8",
        "hparams.weight_decay=0.1",
        "hparams=paper",
    )
    for parameterization in ("sp", "mup", "supar", "init_only", "lr_only"):
        for optimizer in ("adamw", "sgd"):
            words = (f"parameterization={parameterization}", f"optimizer={optimizer}")
            yield " ".join(words), (*words, *shape)
    for word in ("optimizer.decay_mode=coupled", "optimizer.decay_mode=independent", "depth=none"):
        yield word, (word, *shape)
    words = ("depth=completep", "depth_alpha=0.5")
    yield " ".join(words), (*words, *shape)


def transferred(words: tuple[str, ...]) -> Any:
    """Return what `transfer` prints."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        assert supar_sweep(["transfer", *words, "format=json"]) == 0, words
    return json.loads(out.getvalue())


def golden() -> dict[str, dict[str, Row]]:
    """Return the committed rows."""
    return cast(dict[str, dict[str, Row]], json.loads(GOLDEN.read_text(encoding="utf-8"))) if GOLDEN.exists() else {}


def main() -> None:
    """Add what is missing."""
    known = golden()
    cells, numbers = known.get("cells", {}), known.get("rules", {})
    for name, command, words in presets():
        if name not in cells:
            cells[name] = row_of(command, words)
            print(f"added {name}: {cells[name]['n_cells']} cells")
    for name, words in rules():
        numbers.setdefault(name, transferred(words))
    parts = (
        f" {json.dumps(part)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        + "\n }"
        for part, rows in (("cells", cells), ("rules", numbers))
    )
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
