"""Whether, when and how the masks of a cell change in training. No torch, no Hydra."""

from __future__ import annotations

from dataclasses import dataclass

from supar_sweep.config.fields import check_ranges, require_only, setting
from supar_sweep.errors import ConfigError
from supar_sweep.rules.mask_schedule import DYNAMIC_METHODS, MaskSchedule, mask_schedule


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Whether the masks change in training, when, and which density the rules then read. Times are shares of the run."""

    method: str = setting("how masks change in training", choices=("static", *DYNAMIC_METHODS))
    update_fraction: float | None = setting("set, rigl, gmp: between two updates", default=None, gt=0, lt=1)
    stop_fraction: float | None = setting("set, rigl, gmp: masks stay from here on", default=None, gt=0, le=1)
    start_fraction: float | None = setting("gmp: pruning begins", default=None, ge=0, lt=1)
    drop_fraction: float | None = setting("set, rigl: share replaced at first; decays", default=None, gt=0, le=1)
    hparams_density: str | None = setting(
        "gmp: init and lr follow the density at the end, or the current one", default=None, choices=("final", "current")
    )
    dynamic_lr_exponent: float | None = setting(
        "set, rigl, gmp: hidden lr ~ density^-this; null = as parameterized", default=None, ge=0, le=2
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        every = ("update_fraction", "stop_fraction")
        swaps = (*every, "drop_fraction")
        used = {"static": (), "set": swaps, "rigl": swaps, "gmp": (*every, "start_fraction", "hparams_density")}
        require_only(self, "method", used)
        if self.method == "static" and self.dynamic_lr_exponent is not None:
            raise ConfigError(
                "dynamic_lr_exponent",
                "has no effect when method is static: parameterization says how lr goes with density",
                value=self.dynamic_lr_exponent,
                allowed=f"null, or method one of {', '.join(DYNAMIC_METHODS)}",
            )
        if self.method == "gmp" and not (self.start_fraction or 0.0) < (self.stop_fraction or 0.0):
            raise ConfigError(
                "start_fraction",
                f"must lie before stop_fraction = {self.stop_fraction}",
                value=self.start_fraction,
                allowed=f"0 <= start_fraction < {self.stop_fraction}",
            )

    def check_coordinates(self) -> None:
        """Raise ConfigError where masks change: what a coordinate check expects holds for masks as they were drawn."""
        if self.method != "static":
            raise ConfigError(
                "sparsity.method",
                "has no effect on a coordinate check, whose few steps keep their masks: its slopes are expected of those",
                value=self.method,
                allowed="static; how the best lr moves where masks change is what experiment=dynamic is for",
            )

    def schedule(self, steps: int) -> MaskSchedule | None:
        """Return when the masks of a run of so many steps change; None where they do not."""
        if self.method == "static":
            return None
        assert self.update_fraction is not None and self.stop_fraction is not None  # checked above
        return mask_schedule(
            self.method,  # type: ignore[arg-type]  # its choices are the methods
            steps,
            update_fraction=self.update_fraction,
            stop_fraction=self.stop_fraction,
            start_fraction=self.start_fraction or 0.0,
            drop_fraction=self.drop_fraction or 0.0,
        )


STATIC = SparsityConfig(method="static")
