"""The schema of one cell: frozen dataclasses. Values stand in conf/, what may stand there stands here. No torch, no Hydra.

A field without a default must be set by conf/. A field added after the first release carries `later(default)`: at that default
it is left out of a cell's identity, so old hashes stay (sweep/identity.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from supar_sweep.config.fields import check_ranges, later, require_only, setting
from supar_sweep.config.sparsity import STATIC, SparsityConfig
from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import LARGEST, MAX_N_LAYER, MAX_WIDTH, SMALLEST, BaseShape, HParams, Ratios
from supar_sweep.rules.mask_schedule import MaskSchedule
from supar_sweep.rules.parameterization import (
    PARAMETERIZATIONS,
    DecayMode,
    DepthRule,
    Method,
    OptimizerName,
    Parameterization,
    SpStart,
)

MANY = 10**9
"""More steps, sequences, tokens or seconds than any run has: above is a slip, which would cost hours or memory to find."""
MAX_THREADS = 4096
"""Above the cores of any machine; torch fails on what does not fit its own integers."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder's shape."""

    width: int = setting("d_model; a multiple of d_head", ge=1, le=MAX_WIDTH)
    d_head: int = setting("head dimension; held fixed as width grows", ge=1, le=MAX_WIDTH)
    n_layer: int = setting("number of blocks", ge=1, le=MAX_N_LAYER)
    context_tokens: int = setting("sequence length", ge=1, le=MANY)
    position: str = setting("position encoding", choices=("learned", "alibi"))
    activation: str = setting("MLP activation", choices=("gelu", "swiglu"))
    bias: bool = setting("biases in linear layers and norms")
    tied_head: bool = setting("logits reuse the embedding matrix (role embedding)")
    ffn_mult: float = setting("MLP inner width / width", gt=0, le=1000)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.width % self.d_head:
            low = self.width // self.d_head * self.d_head
            raise ConfigError(
                "width",
                f"must be a multiple of d_head = {self.d_head}",
                value=self.width,
                allowed=f"{low} or {low + self.d_head}" if low else f"{self.d_head}, or a multiple of it",
            )
        if (self.width * self.ffn_mult) % 1:
            raise ConfigError(
                "ffn_mult",
                f"width * ffn_mult must be whole at width {self.width}",
                value=self.ffn_mult,
            )

    @property
    def n_head(self) -> int:
        """Number of attention heads: width / d_head."""
        return self.width // self.d_head

    @property
    def d_ffn(self) -> int:
        """MLP inner width: width * ffn_mult."""
        return int(self.width * self.ffn_mult)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    name: str = setting("corpus", choices=("stdlib", "text", "tokens", "hf"))
    val_fraction: float | None = setting("share of the corpus held out, its tail", default=None, gt=0, le=0.5)
    paths: tuple[str, ...] | None = setting("files or globs of text", default=None)
    train_path: str | None = setting("uint16 .bin of training tokens", default=None)
    val_path: str | None = setting("uint16 .bin of held-out tokens", default=None)
    vocab_size: int | None = setting("vocabulary of the token files", default=None, ge=2, le=65536)
    dataset: str | None = setting("name on the Hugging Face hub, or a local folder", default=None)
    dataset_config: str | None = setting("configuration of the dataset; may be null", default=None)
    split: str | None = setting("split of the dataset", default=None)
    column: str | None = setting("column that holds the text", default=None)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.dataset_config is not None and self.name != "hf":
            raise ConfigError("dataset_config", f"has no effect when name is {self.name}", value=self.dataset_config)
        require_only(
            self,
            "name",
            {
                "stdlib": ("val_fraction",),
                "text": ("val_fraction", "paths"),
                "tokens": ("train_path", "val_path", "vocab_size"),
                "hf": ("val_fraction", "dataset", "split", "column"),
            },
        )

    @property
    def is_bytes(self) -> bool:
        """Whether tokens are the bytes of a text: of every corpus but token files."""
        return self.vocab_size is None

    @property
    def n_vocab(self) -> int:
        """Vocabulary: 256 at byte level, else as configured."""
        return self.vocab_size or 256


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and what it decays and clips. Its learning rate is hparams.lr."""

    name: OptimizerName = setting("optimizer", choices=get_args(OptimizerName))
    decay_mode: DecayMode = setting("how weight decay scales with shape", choices=get_args(DecayMode))
    clip_norm: float | None = setting("clip the global gradient norm; null = never", ge=SMALLEST, le=LARGEST)
    beta1: float | None = setting("AdamW", default=None, ge=0, lt=1)
    beta2: float | None = setting("AdamW", default=None, ge=0, lt=1)
    eps: float | None = setting("AdamW, in base units", default=None, ge=SMALLEST, le=LARGEST)
    momentum: float | None = setting("SGD", default=None, ge=0, lt=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        require_only(self, "name", {"adamw": ("beta1", "beta2", "eps"), "sgd": ("momentum",)})


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over steps, as a factor on every group's peak."""

    name: str = setting("shape after warm-up", choices=("linear", "cosine", "constant"))
    warmup_steps: int = setting("linear warm-up from 0", ge=0, le=MANY)
    final_lr_fraction: float | None = setting("factor at the last step (linear, cosine)", default=None, ge=0, le=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        used = ("final_lr_fraction",)
        require_only(self, "name", {"linear": used, "cosine": used, "constant": ()})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run's length, batch, precision, evaluation and ends."""

    steps: int = setting("optimizer steps", ge=1, le=MANY)
    batch_seqs: int = setting("sequences a step, over all accumulation steps", ge=1, le=MANY)
    accumulation_steps: int = setting("micro-batches a step", ge=1, le=MANY)
    precision: str = setting("arithmetic of the model", choices=("float32", "bfloat16", "float64"))
    summary_last_steps: int = setting("train_loss = mean over so many last steps", ge=1, le=MANY)
    eval_every_steps: int | None = setting("held-out loss each so many steps; null = at the end", ge=1, le=MANY)
    eval_seqs: int = setting("held-out sequences, the same for every cell", ge=1, le=MANY)
    divergence_loss_mult: float = setting("diverged = loss above so many times log(vocabulary) ...", gt=1, le=LARGEST)
    divergence_patience_steps: int = setting(
        "... for so many steps in a row; non-finite at once. More than `steps` = never but for that", ge=1, le=MANY
    )
    target: str | None = setting("dotted path of your own training function; null = the GPT", default=None)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.target is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", self.target):
            allowed = "package.module.function, or null for the GPT"
            raise ConfigError("target", "is not a dotted path of a function", value=self.target, allowed=allowed)
        if self.batch_seqs % self.accumulation_steps:
            raise ConfigError(
                "accumulation_steps",
                f"must divide batch_seqs = {self.batch_seqs}",
                value=self.accumulation_steps,
            )
        if self.summary_last_steps > self.steps:
            raise ConfigError(
                "summary_last_steps",
                f"must not exceed steps = {self.steps}",
                value=self.summary_last_steps,
            )


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """Everything that changes the numbers of one run, and nothing else."""

    parameterization: Parameterization = setting("rules", choices=PARAMETERIZATIONS)
    sp_start: SpStart = setting("where SP's weights start", choices=get_args(SpStart))
    depth: DepthRule = setting("depth rule", choices=get_args(DepthRule))
    depth_alpha: float | None = setting("CompleteP's alpha", default=None, ge=0.5, le=1)
    density: float = setting("live share of the sparse layers' weights", gt=0, le=1)
    layer_density: str = setting("how density is shared between layers", choices=("uniform", "er"))
    seed: int = setting("of init noise, masks and data order", ge=0, le=2**63 - 1)
    base: BaseShape | None = setting("shape where every multiplier is 1; null only for SP")
    hparams: HParams = setting("in base units")
    model: ModelConfig = setting("shape of the target")
    data: DataConfig = setting("corpus")
    optimizer: OptimizerConfig = setting("optimizer")
    schedule: ScheduleConfig = setting("learning rate over steps")
    train: TrainConfig = setting("length, batch, precision, ends")
    sparsity: SparsityConfig = later("whether masks change in training", default=STATIC)

    def __post_init__(self) -> None:
        check_ranges(self)
        completep = self.depth == "completep"
        if completep != (self.depth_alpha is not None):
            raise ConfigError(
                "depth_alpha",
                "must be set when depth is completep, and null otherwise",
                value=self.depth_alpha,
                allowed="0.5 .. 1 with depth=completep, else null",
            )
        if self.base is None and (self.parameterization != "sp" or self.sp_start != "own" or completep):
            raise ConfigError(
                "base",
                f"{self.parameterization} with sp_start={self.sp_start}, depth={self.depth} needs a base shape",
                value=None,
                allowed="{width: ..., n_layer: ...}; only sp with sp_start=own goes without",
            )
        if self.schedule.warmup_steps >= self.train.steps and self.schedule.warmup_steps:
            raise ConfigError(
                "schedule.warmup_steps",
                f"must be below train.steps = {self.train.steps}",
                value=self.schedule.warmup_steps,
            )
        schedule = self.mask_schedule()
        if schedule is not None and not schedule.n_updates:
            raise ConfigError(
                "sparsity.update_fraction",
                f"has no effect: in {self.train.steps} steps no update lies before sparsity.stop_fraction",
                value=self.sparsity.update_fraction,
                allowed="a smaller share of the run",
            )
        self.method()  # raises where optimizer and depth rule do not go together

    def method(self) -> Method:
        """Return the rules in force for this cell."""
        return Method(
            parameterization=self.parameterization,
            optimizer=self.optimizer.name,
            depth=self.depth,
            depth_alpha=1.0 if self.depth_alpha is None else self.depth_alpha,
            sp_start=self.sp_start,
            decay_mode=self.optimizer.decay_mode,
            lr_density_exponent=self.sparsity.dynamic_lr_exponent,
        )

    def mask_schedule(self) -> MaskSchedule | None:
        """Return when the masks change; None where they do not, or where there are none (density 1)."""
        return None if self.density == 1 else self.sparsity.schedule(self.train.steps)

    def pruned_for(self) -> Literal["final", "current"] | None:
        """Return the density that init and lr follow where masks start full and are pruned in training; else None."""
        if self.mask_schedule() is None or self.sparsity.method != "gmp":
            return None
        return "current" if self.sparsity.hparams_density == "current" else "final"

    def ratios(self, density: float | None = None) -> Ratios:
        """Return the target's ratios to the base, m_rho from `density` (default: the cell's) in (0, 1]."""
        base_width = self.base.width if self.base else self.model.width
        base_n_layer = self.base.n_layer if self.base else self.model.n_layer
        return Ratios(
            m_d=self.model.width / base_width,
            m_rho=self.density if density is None else density,
            m_L=self.model.n_layer / base_n_layer,
            n_layer=self.model.n_layer,
        )


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a cell is computed: nothing here changes its identity; a resumed run keeps its route, compute and threads."""

    device: str = setting("where to train", choices=("auto", "cpu", "cuda"))
    threads: int | None = setting(
        "torch threads a process; null = 1, or more where cores would stand idle", ge=1, le=MAX_THREADS
    )
    route: str = setting("fp32 matmul on CPU", choices=("auto", "torch", "onednn"))
    compute: str = setting("sparse layers: masked, or live weights only", choices=("auto", "dense", "compact"))
    compile: bool = setting("torch.compile the model")
    cohort: int | None = setting(
        "cells of one shape trained together in a process; null = chosen", default=None, ge=1, le=MANY
    )
    checkpoint_every_s: float | None = setting("seconds between checkpoints; null = by steps", ge=0, le=MANY)
    checkpoint_every_steps: int | None = setting("steps between checkpoints; null = by time", ge=1, le=MANY)
    keep_checkpoints: bool = setting("keep the last checkpoint after the result is published")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.compile and (self.cohort or 1) > 1:
            raise ConfigError(
                "cohort",
                "has no effect with compile=true, which compiles each cell's model",
                value=self.cohort,
                allowed="1 or null",
            )

    @property
    def n_threads(self) -> int:
        """The torch threads of a process: one where nobody chose."""
        return self.threads or 1


def check_compute(cell: CellConfig, runtime: RuntimeConfig) -> None:
    """Raise ConfigError where compact layers are asked for and the masks change in training.

    Args:
        cell: what to train.
        runtime: its `compute`.
    """
    if runtime.compute == "compact" and cell.mask_schedule() is not None:
        raise ConfigError(
            "runtime.compute",
            f"cannot be had with sparsity.method={cell.sparsity.method}: a compact layer keeps its pattern and has no gradients "
            "of dead weights",
            value="compact",
            allowed="auto or dense",
        )


def check_ranks(cell: CellConfig, world_size: int) -> None:
    """Raise ConfigError where several processes cannot share the batches of a cell.

    Args:
        cell: what to train.
        world_size: processes that train it together, >= 1.
    """
    train = cell.train
    if world_size > 1 and train.target is not None:
        raise ConfigError(
            "train.target", f"cannot be trained by {world_size} processes together", value=train.target, allowed="null"
        )
    if train.batch_seqs % (train.accumulation_steps * world_size):
        parts = (
            f" in train.accumulation_steps = {train.accumulation_steps} parts" if train.accumulation_steps > 1 else ""
        )
        raise ConfigError(
            "train.batch_seqs",
            f"cannot be shared by {world_size} processes{parts}",
            value=train.batch_seqs,
            allowed=f"a multiple of {train.accumulation_steps * world_size}",
        )
