"""A checkpoint -> a model folder that transformers loads, and lm-evaluation-harness with it.

    config.json, model.safetensors
    tokenizer.json, tokenizer_config.json   where the corpus was bytes
    modeling_supar.py, decoder_supar.py     where no class of transformers fits

Sparse layers are written dense, dead weights as zeros. What was written is loaded by transformers and its logits compared
before the folder takes its name. Nothing is asked of a network.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import CheckpointError, ConfigError
from supar_sweep.sweep.files import cannot_write, read_json, write_file, write_json
from supar_sweep.sweep.identity import DATA_LOCATIONS
from supar_sweep.training.cost import sparse_shapes
from supar_sweep.training.fold import fold
from supar_sweep.training.hf_classes import HFModel, hf_model
from supar_sweep.training.restore import Trained, find_checkpoints, read_trained

PACKAGES = ("transformers", "tokenizers", "safetensors")
MARK = "supar_sweep"
"""The entry of config.json that says where a model comes from, and that a folder is an export."""

LARGEST_ERROR = 1e-5
"""Of the logits, relative to the largest one, in float64: float32 weights folded and stored are good to about 1e-6; a
forgotten factor, or the other GELU, is off by 1e-4 and more."""

LARGEST_FLOAT32_ERROR = 1e-4
"""The same of MPT, which transformers computes in float32 only."""

BYTE_END_OF_TEXT = 0
"""NUL, which no text holds: its logit is low wherever a model was trained, so it pads and ends without taking a byte away."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        folder: the model folder.
        architecture: the class of transformers, or the shipped one.
        has_code: whether loading it needs trust_remote_code.
        has_tokenizer: whether a tokenizer lies beside it.
        step: optimizer steps of the checkpoint.
        params: parameters, a tied head once.
        density: live share of the sparse layers' weights.
        logits_error: largest difference to the trained model's logits, relative to the largest logit.
        warnings: what the user should know, in words.
    """

    folder: Path
    architecture: str
    has_code: bool
    has_tokenizer: bool
    step: int
    params: int
    density: float
    logits_error: float
    warnings: tuple[str, ...]


def export_checkpoint(checkpoint: Path, to: Path | None, *, exports: Path) -> Exported:
    """Write the model folder of a checkpoint and return what was written; an earlier export there is replaced.

    Args:
        checkpoint: a cell's folder (its newest whole checkpoint), or one of its files step-*.pt.
        to: the folder to write; None = below `exports`, named as the cell's folder, with _ for signs.
        exports: see `to`.

    Raises:
        ConfigError: no such checkpoint, none was kept, a folder that holds something else, missing packages.
        CheckpointError: a checkpoint that is torn, of another cell, or whose export does not compute the same logits.
        RecordError: the folder cannot be written.
    """
    files = find_checkpoints(checkpoint)
    # transformers makes a module's name of the folder's, where it holds code
    name = re.sub(r"\W", "_", files[0].parent.parent.name)
    target = (to or exports / name).absolute()
    _refuse_target(target)
    _need_packages()
    trained = read_trained(files)
    cell = trained.cell
    model = hf_model(cell.model, cell.data.n_vocab, fold(trained.model))
    has_tokenizer = cell.data.is_bytes
    tokens_BT = _check_tokens(cell)
    with torch.no_grad():
        wanted_BTV = trained.model.double()(tokens_BT)
    if not bool(wanted_BTV.isfinite().all()):
        raise CheckpointError(
            f"the weights of step {trained.step} give logits that are no numbers; export an earlier step"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        written = scratch / target.name
        _write(written, model, _config(model, trained, has_tokenizer))
        if has_tokenizer:
            _write_byte_tokenizer(written, cell.model.context_tokens)
        off_by = logits_error(written, wanted_BTV, tokens_BT)
        allowed = LARGEST_FLOAT32_ERROR if model.architecture == "MptForCausalLM" else LARGEST_ERROR
        if not off_by <= allowed:
            raise CheckpointError(
                f"{target} is not written: transformers computes other logits from it (relative difference {off_by:.2g}, "
                f"at most {allowed:g} is rounding); this is a bug, please report it with the cell's cell.json"
            )
        if target.exists():
            target.replace(scratch / "replaced")
        written.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(
        folder=target,
        architecture=model.architecture,
        has_code=bool(model.code),
        has_tokenizer=has_tokenizer,
        step=trained.step,
        params=sum(parameter.numel() for parameter in trained.model.parameters()),
        density=density_of(trained),
        logits_error=off_by,
        warnings=trained.warnings,
    )


def density_of(trained: Trained) -> float:
    """Return the live share of all sparse layers' weights together.

    Args:
        trained: the model.
    """
    sizes = {name: math.prod(shape) for name, shape in sparse_shapes(trained.cell).items()}
    density = trained.layer_density()
    return sum(size * density.get(name, 1.0) for name, size in sizes.items()) / sum(sizes.values())


def logits_error(folder: Path, wanted_BTV: Tensor, tokens_BT: Tensor) -> float:
    """Return how far the logits of a model folder lie off: the largest difference, relative to the largest logit.

    In float64; MPT's in float32.

    Args:
        folder: loaded by transformers, without a network.
        wanted_BTV: float64.
        tokens_BT: int64.

    Raises:
        CheckpointError: transformers cannot load or run it.
    """
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        # trust_remote_code: the folder is the one that was written a moment ago
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), trust_remote_code=True, local_files_only=True
        )
        with torch.no_grad():
            # MPT's causal mask overflows in float64, in releases up to some 5.x
            dtype = torch.float32 if model.config.model_type == "mpt" else torch.float64
            found_BTV = model.to(dtype).eval()(tokens_BT).logits
    except Exception as error:  # of any kind, from a release that reads folders in another way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot use what was exported: {reason}"
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return float((found_BTV - wanted_BTV).abs().max() / wanted_BTV.abs().max())


def _check_tokens(cell: CellConfig) -> Tensor:
    """Return [2, context] random tokens: every position and much of the vocabulary is in the check."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(cell.data.n_vocab, (2, cell.model.context_tokens), generator=generator)


def _write(folder: Path, model: HFModel, config: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    write_json(folder / "config.json", config, indent=2)
    weights = {name: weight.contiguous() for name, weight in model.weights.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    # safetensors lets nobody but the user read it, whatever the umask says
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    for name, text in model.code.items():
        write_file(folder / name, text)


def _config(model: HFModel, trained: Trained, has_tokenizer: bool) -> dict[str, Any]:
    """Return config.json: what the class reads, and where the model comes from."""
    cell = trained.cell
    summary = trained.result.get("summary") if trained.step == cell.train.steps else None
    end_of_text = BYTE_END_OF_TEXT if has_tokenizer else None
    return {
        "architectures": [model.architecture],
        "torch_dtype": "float64" if cell.train.precision == "float64" else "float32",
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        **model.config,
        MARK: {
            "cell_id": trained.cell_id,
            "step": trained.step,
            "summary": summary,
            "cell": _without_paths(cell),
            "folded_multipliers": asdict(trained.model.multipliers),
            "density": density_of(trained),
            "layer_density": trained.layer_density(),
            "corpus_fingerprint": trained.result.get("fingerprint"),
        },
    }


def _without_paths(cell: CellConfig) -> dict[str, Any]:
    """Return the cell as plain values; where its corpus lay is nobody's business but this machine's."""
    plain: dict[str, Any] = encode(cell)
    return {**plain, "data": {key: value for key, value in plain["data"].items() if key not in DATA_LOCATIONS}}


def _write_byte_tokenizer(folder: Path, context_tokens: int) -> None:
    """Write the tokenizer whose token ids are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models

    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    # without merges and letters, the fallback takes every character apart into its bytes
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    end_of_text = f"<0x{BYTE_END_OF_TEXT:02X}>"
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_tokens,
            "clean_up_tokenization_spaces": False,
            "eos_token": end_of_text,
            "pad_token": end_of_text,
        },
    )


def _refuse_target(target: Path) -> None:
    if not target.exists():
        return
    if target.is_dir() and (not any(target.iterdir()) or MARK in (read_json(target / "config.json") or {})):
        return
    raise ConfigError(
        "to",
        "is there already and holds no export",
        value=str(target),
        allowed="a new folder, an empty one, an earlier export",
    )


def _need_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "checkpoint",
            f"cannot be exported without {', '.join(missing)}",
            allowed="pip install 'supar-sweep[hf]', then the same command",
        )
