"""What a study hands on: the tuned base hyperparameters and their lineage, as best.yaml. No torch, no Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supar_sweep.config.decode import decode, encode
from supar_sweep.errors import ConfigError, RecordError
from supar_sweep.rules.hparams import HParams


@dataclass(frozen=True)
class Winner:
    """The tuned base hyperparameters and where they come from."""

    hparams: HParams
    lineage: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write best.yaml: `hparams` and `lineage`. Raises RecordError where the file cannot be written."""
        import yaml

        text = yaml.safe_dump({"hparams": encode(self.hparams), "lineage": encode(self.lineage)}, sort_keys=False)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise RecordError(f"cannot write {path}: {error.strerror}") from error


def load_winner(path: Path) -> Winner:
    """Return what a best.yaml (or any YAML with a mapping `hparams`) holds.

    Raises:
        ConfigError: no such file, no YAML, or hyperparameters that are missing or unknown.
    """
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("hparams", f"cannot read {path}: {error}") from None
    if not isinstance(plain, Mapping):
        raise ConfigError("hparams", f"{path} holds no mapping of hyperparameters")
    values = plain.get("hparams", {k: v for k, v in plain.items() if k != "lineage"})
    return Winner(decode(HParams, values, prefix="hparams"), plain.get("lineage") or {})
