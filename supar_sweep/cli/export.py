"""`supar-sweep export`: a checkpoint -> a model folder for transformers and lm-evaluation-harness."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from supar_sweep.cli.early import check_path
from supar_sweep.cli.output import emit, say
from supar_sweep.cli.settings import Settings
from supar_sweep.errors import ConfigError

if TYPE_CHECKING:
    from supar_sweep.training.export import Exported

TABLE_2 = "arc_easy,lambada_openai,race,piqa,boolq"
"""The tasks of SuPar's table 2, by the harness's names."""


def export(settings: Settings) -> int:
    """Write the model folder, print what it holds; return 0."""
    checkpoint, to = (_path(settings, key) for key in ("checkpoint", "to"))
    if checkpoint is None:
        raise ConfigError(
            "checkpoint", "must be set", value=None, allowed="a cell's folder, or one of its files step-*.pt"
        )
    from supar_sweep.training.export import export_checkpoint

    written = export_checkpoint(checkpoint, to, exports=settings.runs_dir / "exports")
    row = {
        "folder": str(written.folder),
        "class": written.architecture,
        "trust_remote_code": written.has_code,
        "tokenizer": "bytes" if written.has_tokenizer else None,
        "step": written.step,
        "params": written.params,
        "density": written.density,
        "logits_error": written.logits_error,
    }
    emit([row], format=settings.format)
    for line in written.warnings:
        say(f"warning: {line}")
    if written.density < 1:
        say(
            "the sparse layers are stored dense, their dead weights as zeros: no smaller and no faster than a dense model"
        )
    if not written.has_tokenizer:
        say(
            "no tokenizer: the corpus was token files, and their tokenizer is not known here; name it where the model is used"
        )
    say(f"evaluate: {harness_command(written)}")
    return 0


def harness_command(written: Exported) -> str:
    """Return the command of lm-evaluation-harness for the tasks of the paper's table 2.

    Args:
        written: the model folder.
    """
    words = [f"pretrained={written.folder}"]
    words += [] if written.has_tokenizer else ["tokenizer=<the one that made the token files>"]
    words += ["trust_remote_code=True"] if written.has_code else []
    return f"lm_eval --model hf --model_args {shlex.quote(','.join(words))} --tasks {TABLE_2}"


def _path(settings: Settings, key: str) -> Path | None:
    value = settings.plain[key]
    check_path(key, value, missing=True)
    return None if value is None else Path(value).expanduser()
