"""python benchmarks/reference.py --width 256 --density 0.0625 --lr 0.0078125 --steps 100 --seed 0

One point the way public SuPar code trains it, as the baseline of the other benchmarks: a GPT whose dense weights are multiplied
by a dense mask in every forward (torch's parametrize), dense gradients and AdamW moments, torch's own matmul, one process
a point. The rules' factors come from the rule table, so that the problem is the same as ours. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

BEGUN_S = time.perf_counter()  # before torch is imported: the import is part of what a process costs

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

from supar_sweep.rules.hparams import HParams, Ratios  # noqa: E402
from supar_sweep.rules.parameterization import Method, Parameterization, Role  # noqa: E402
from supar_sweep.rules.transfer import RoleHParams, forward_multipliers, role_hparams  # noqa: E402

Tokens = npt.NDArray[np.generic]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run. Each field is an option of the command line; what they mean is as in conf/.

    The defaults are the shipped settings with benchmarks.cells.SHAPE, written out because this script reads no conf/, whose
    loading would count against the reference. A test holds them to it.
    """

    width: int
    density: float
    lr: float
    steps: int
    seed: int
    parameterization: Parameterization = "supar"
    n_layer: int = 2
    d_head: int = 32
    context_tokens: int = 64
    n_vocab: int = 256
    ffn_mult: float = 4.0
    bias: bool = False
    tied_head: bool = True
    batch_seqs: int = 8
    eval_seqs: int = 64
    summary_last_steps: int = 10
    warmup_steps: int = 10
    final_lr_fraction: float = 0.1
    init_std: float = 0.08
    alpha_in: float = 1.0
    alpha_out: float = 1.0
    weight_decay: float = 0.1
    base_width: int = 64
    base_n_layer: int = 2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    device: str = "cpu"
    precision: str = "float32"  # or bfloat16: autocast
    route: str = "torch"  # of the linear layers' matmul; onednn: ours, see supar_sweep.sparse.route
    threads: int = 0  # 0 = torch's default
    data: str = ""  # folder of train.bin and val.bin (uint16); "" = this Python's standard library


def from_command_line(words: Sequence[str] | None = None) -> Point:
    """Return the point that the words describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(Point):
        name, kind = "--" + item.name.replace("_", "-"), str(item.type)
        if kind == "bool":
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=item.default)
            continue
        convert: Callable[[str], Any] = {"int": int, "float": float}.get(kind, str)
        required = item.name in ("width", "density", "lr", "steps", "seed")
        parser.add_argument(name, type=convert, required=required, default=None if required else item.default)
    return Point(**vars(parser.parse_args(words)))


def to_command_line(point: Point) -> list[str]:
    """Return the words that describe the point."""
    words = []
    for name, value in asdict(point).items():
        option = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option}={value}")
    return words


# ---------------------------------------------------------------- model


class Masked(nn.Module):
    """The parametrization of a sparse weight: the product with its mask, made anew at each forward."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return weight * mask."""
        return weight * cast(Tensor, self.mask)


class Linear(nn.Linear):
    """torch's, with the product given."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool, product: Product) -> None:
        super().__init__(fan_in, fan_out, bias=bias)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., fan_out]."""
        return self.product(x, self.weight, self.bias)  # self.weight once: each access multiplies by the mask


class Block(nn.Module):
    """Pre-LN attention and MLP."""

    def __init__(self, point: Point, attention_scale: float, product: Product) -> None:
        super().__init__()
        width, inner, bias = point.width, int(point.width * point.ffn_mult), point.bias
        self.n_head, self.scale = width // point.d_head, attention_scale
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.qkv = Linear(width, 3 * width, bias, product)
        self.attention_out = Linear(width, width, bias, product)
        self.up = Linear(width, inner, bias, product)
        self.gelu = nn.GELU()
        self.down = Linear(inner, width, bias, product)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, D]."""
        n_seqs, n_tokens, width = x.shape
        q, k, v = (
            part.view(n_seqs, n_tokens, self.n_head, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.attention_out(attended.transpose(1, 2).contiguous().view(n_seqs, n_tokens, width))
        return x + cast(Tensor, self.down(self.gelu(self.up(self.norm_2(x)))))


class ReferenceGPT(nn.Module):
    """The GPT with learned positions.

    Args:
        point: its shape.
        product: of the linear layers.
    """

    def __init__(self, point: Point, product: Product) -> None:
        super().__init__()
        method, ratios, hparams = _rules(point)
        self.mults = forward_multipliers(method, ratios, hparams, d_head=point.d_head)
        self.tokens = nn.Embedding(point.n_vocab, point.width)
        self.positions = nn.Embedding(point.context_tokens, point.width)
        self.blocks = nn.ModuleList(Block(point, self.mults.attention_scale, product) for _ in range(point.n_layer))
        self.norm = nn.LayerNorm(point.width, bias=point.bias)
        self.head = Linear(point.width, point.n_vocab, False, product)
        if point.tied_head:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, T, V]."""
        positions = torch.arange(x.shape[1], device=x.device)
        hidden = (self.tokens(x) + self.positions(positions)) * self.mults.embedding_output
        for block in self.blocks:
            hidden = block(hidden)
        return cast(Tensor, self.head(self.norm(hidden) * self.mults.logits))


def sparse_layers(model: ReferenceGPT) -> list[nn.Linear]:
    """Return the layers that carry masks, block by block: qkv, attention output, MLP up, MLP down."""
    blocks = cast("list[Block]", list(model.blocks))
    return [layer for block in blocks for layer in (block.qkv, block.attention_out, block.up, block.down)]


def _rules(point: Point) -> tuple[Method, Ratios, HParams]:
    method = Method(parameterization=point.parameterization, depth="gpt2")
    names = ("lr", "init_std", "alpha_in", "alpha_out", "weight_decay")
    ratios = Ratios(
        m_d=point.width / point.base_width,
        m_rho=point.density,
        m_L=point.n_layer / point.base_n_layer,
        n_layer=point.n_layer,
    )
    return method, ratios, HParams(**{name: getattr(point, name) for name in names})


def _roles(model: ReferenceGPT) -> Iterator[tuple[nn.Parameter, Role, bool]]:
    """Yield each parameter once, with its role and whether it stands in a block."""
    blocks = cast("list[Block]", list(model.blocks))
    outputs = {id(layer.weight) for block in blocks for layer in (block.attention_out, block.down)}
    norms = {id(child.weight) for child in model.modules() if isinstance(child, nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        in_block = name.startswith("blocks.")
        role: Role
        if parameter.dim() < 2:
            role = "norm" if id(parameter) in norms else "bias"
        elif in_block:
            role = "hidden_residual" if id(parameter) in outputs else "hidden"
        else:
            role = "head" if name.startswith("head") else "embedding"
        yield parameter, role, in_block


# ---------------------------------------------------------------- training


class Reference:
    """The model, its optimizer and one step of them.

    Args:
        point: what to train.
    """

    def __init__(self, point: Point) -> None:
        self.point, self.device = point, torch.device(point.device)
        torch.manual_seed(point.seed)
        self.model = ReferenceGPT(point, _product(point.route))
        method, ratios, hparams = _rules(point)
        groups: dict[RoleHParams, list[nn.Parameter]] = {}
        for parameter, role, in_block in _roles(self.model):
            found = role_hparams(role, method, ratios, hparams, in_block=in_block, eps=point.eps)
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=found.init_std)
            groups.setdefault(found, []).append(parameter)
        if point.density < 1:
            for layer in sparse_layers(self.model):
                mask = torch.bernoulli(torch.full_like(layer.weight, point.density))
                parametrize.register_parametrization(layer, "weight", Masked(mask))
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "lr": found.lr, "weight_decay": found.weight_decay, "eps": found.eps}
                for found, group in groups.items()
            ],
            betas=(point.beta1, point.beta2),
            fused=self.device.type == "cuda",
        )
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of x, y [B, T]."""
        low = self.point.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if low else contextlib.nullcontext():
            logits = self.model(x)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))

    def step(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """Take step number `step` (from 0) on one batch; return its loss."""
        factor = lr_factor(self.point, step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        if self.device.type == "cuda":
            x, y = (part.pin_memory().to(self.device, non_blocking=True) for part in (x, y))
        loss = self.loss(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.point.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, tokens: Tokens) -> float:
        """Return the mean loss over eval_seqs evenly spaced sequences."""
        point, last = self.point, len(tokens) - self.point.context_tokens - 1
        starts = np.arange(point.eval_seqs) * last // max(1, point.eval_seqs - 1)
        total = 0.0
        for first in range(0, point.eval_seqs, point.batch_seqs):
            x, y = windows(tokens, starts[first : first + point.batch_seqs].tolist(), point.context_tokens)
            total += float(self.loss(x.to(self.device), y.to(self.device))) * len(x)
        return total / point.eval_seqs


def _product(route: str) -> Product:
    if route == "torch":
        return F.linear
    from supar_sweep.sparse.route import onednn_linear

    return onednn_linear


def lr_factor(point: Point, step: int) -> float:
    """Return the schedule's factor: linear warm-up, then linear to final_lr_fraction."""
    if step < point.warmup_steps:
        return (step + 1) / point.warmup_steps
    last = point.steps - 1 - point.warmup_steps
    done = min(1.0, (step - point.warmup_steps) / last) if last > 0 else 1.0
    return 1 + (point.final_lr_fraction - 1) * done


def windows(tokens: Tokens, starts: Sequence[int], context_tokens: int) -> tuple[Tensor, Tensor]:
    """Return x and y [B, T] int64 that begin at `starts`; y is one token later."""
    x, y = (
        torch.stack([torch.from_numpy(tokens[s + later : s + later + context_tokens].astype(np.int64)) for s in starts])
        for later in (0, 1)
    )
    return x, y


def random_batch(point: Point, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return x, y [B, T] at random places."""
    starts = torch.randint(len(tokens) - point.context_tokens, (point.batch_seqs,))
    return windows(tokens, starts.tolist(), point.context_tokens)


def read_tokens(point: Point) -> tuple[Tokens, Tokens]:
    """Return the training and the held-out tokens."""
    if point.data:
        train, val = (np.memmap(Path(point.data, f"{name}.bin"), np.uint16, "r") for name in ("train", "val"))
        return train, val
    from supar_sweep.config.schema import DataConfig
    from supar_sweep.training.corpus import load_corpus

    corpus = load_corpus(DataConfig(name="stdlib", val_fraction=0.1))
    return corpus.train, corpus.val


def main(words: Sequence[str] | None = None) -> None:
    """Train one point and print what came of it, as JSON."""
    import_s = time.perf_counter() - BEGUN_S
    point = from_command_line(words)
    if point.threads:
        torch.set_num_threads(point.threads)
    train, val = read_tokens(point)
    run = Reference(point)
    begun_s = time.perf_counter()
    losses = [run.step(*random_batch(point, train), step) for step in range(point.steps)]
    last = [float(loss) for loss in losses[-point.summary_last_steps :]]
    train_s = time.perf_counter() - begun_s
    val_loss = run.evaluate(val)
    facts = {"train_loss": math.fsum(last) / len(last), "val_loss": val_loss, "threads": torch.get_num_threads()}
    times = {"import_s": import_s, "train_s": train_s, "process_s": time.perf_counter() - BEGUN_S}
    print(json.dumps({**asdict(point), **facts, **times}))


if __name__ == "__main__":
    main()
