"""What a study hands on: the tuned base hyperparameters, their base shape and lineage, as best.yaml. No torch, no Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supar_sweep.config.decode import decode, encode
from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import BaseShape, HParams
from supar_sweep.sweep.files import write_file


@dataclass(frozen=True)
class Winner:
    """The tuned base hyperparameters and where they come from.

    Args:
        hparams: in base units.
        lineage: study, trial, data, proxy; empty for numbers written by hand.
        base: the shape of these units; None where the file does not name it.
        tuned_at: what is known of the proxy where the lineage does not hold it whole (conf/hparams/paper.yaml).
    """

    hparams: HParams
    lineage: Mapping[str, Any]
    base: BaseShape | None = None
    tuned_at: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write best.yaml: `hparams`, `base` and `lineage`. Raises RecordError where the file cannot be written."""
        import yaml

        plain = {"hparams": encode(self.hparams), "base": encode(self.base), "lineage": encode(self.lineage)}
        write_file(path, yaml.safe_dump(plain, sort_keys=False))


def load_winner(path: Path) -> Winner:
    """Return what a best.yaml holds, or any YAML of `hparams` with, where known, `base`, `lineage`, `tuned_at`.

    Raises:
        ConfigError: no such file, no YAML, keys that are missing or unknown, or a base that is not its proxy's.
    """
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigError("hparams", f"cannot read {path}: {reason}") from None
    if not isinstance(plain, Mapping):
        raise ConfigError("hparams", f"{path} holds no mapping of hyperparameters")
    known = ("base", "lineage", "tuned_at")
    base, lineage, tuned_at = (plain.get(key) or {} for key in known)
    rest = {key: value for key, value in plain.items() if key not in known}
    if unknown := [str(key) for key in rest if "hparams" in rest and key != "hparams"]:
        raise ConfigError(unknown[0], f"unknown key in {path}", allowed=("hparams", *known), nearest_to=unknown[0])
    for key, value in zip(known, (base, lineage, tuned_at), strict=True):
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"must be a mapping in {path}", value=value)
    proxy = lineage.get("proxy") or {}
    if not isinstance(proxy, Mapping):
        raise ConfigError("lineage.proxy", f"must be a mapping in {path}", value=proxy)
    of_proxy = proxy.get("base") or {}
    if base and of_proxy and dict(base) != dict(of_proxy):
        raise ConfigError("base", f"contradicts the lineage's proxy in {path}", value=base, allowed=str(of_proxy))
    base = base or of_proxy
    return Winner(
        decode(HParams, rest.get("hparams", rest), prefix="hparams"),
        lineage,
        decode(BaseShape, base, prefix="base") if base else None,
        tuned_at,
    )
