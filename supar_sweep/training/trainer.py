"""One cell's model, optimizer and schedule on a device, and one step of them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.config.schema import CellConfig, RuntimeConfig, check_ranks
from supar_sweep.errors import CheckpointError, ConfigError
from supar_sweep.rules.parameterization import SPARSE_ROLES
from supar_sweep.sparse.compact import named_live, set_kernel
from supar_sweep.sparse.convert import to_form_of
from supar_sweep.sparse.kernel import choose_kernel
from supar_sweep.sparse.linear import set_route
from supar_sweep.sparse.masks import mask_hash
from supar_sweep.sparse.route import choose_route
from supar_sweep.training.corpus import Corpus
from supar_sweep.training.cost import flops_per_token
from supar_sweep.training.data import batch, val_batches
from supar_sweep.training.forms import DTYPES, choose_forms
from supar_sweep.training.mask_updates import MaskUpdates, live_now
from supar_sweep.training.model import build
from supar_sweep.training.optim import make_optimizer, make_scheduler
from supar_sweep.training.ranks import ALONE, Ranks
from supar_sweep.training.roles import parameter_rows


class Trainer:
    """One cell's model, optimizer and schedule on a device, and one step of them.

    Args:
        cell: what to train.
        runtime: how to compute it.
        device: where.
        resume: a checkpoint's state, or None.
        ranks: the processes that train the cell together.

    Raises:
        ConfigError: a route without effect here, a model that does not start as the rules say, or a batch that the ranks cannot
            share.
        CheckpointError: a checkpoint of other masks or another model.
        RankError: the ranks do not start alike, or another one has failed.
    """

    def __init__(
        self,
        cell: CellConfig,
        runtime: RuntimeConfig,
        device: torch.device,
        resume: Mapping[str, Any] | None,
        ranks: Ranks = ALONE,
    ) -> None:
        check_ranks(cell, ranks.world_size)
        self.cell, self.device, self.ranks = cell, device, ranks
        self.micro_seqs = cell.train.batch_seqs // (cell.train.accumulation_steps * ranks.world_size)
        self.warnings: list[str] = []
        self.threads = int(resume["threads"]) if resume else runtime.n_threads
        torch.set_num_threads(self.threads)
        # nothing of ours draws from it, but a module of the user's may
        torch.manual_seed(cell.seed)
        self.route, route_reason = ranks.from_first(lambda: self._choose_route(runtime, resume))
        self.kernel, kernel_reason = self._choose_kernel(resume)
        self.forms = ranks.from_first(
            lambda: choose_forms(cell, runtime, device, self.route, resume, micro_seqs=self.micro_seqs)
        )
        self.model, self.plans = build(cell, self.forms.compact)
        self.model.to(device)
        self.first_mask_hash = mask_hash(named_live(self.model))
        set_route(self.model, self.route)
        set_kernel(self.model, self.kernel)
        self.optimizer = make_optimizer(cell, self.plans, device)
        self.scheduler = make_scheduler(self.optimizer, cell.schedule, cell.train.steps)
        self.parameters = [plan.parameter for plan in self.plans]
        self.base_lr = float(self.scheduler.base_lrs[0])
        self.masks: MaskUpdates | None = None
        if schedule := cell.mask_schedule():
            self.masks = MaskUpdates(cell, schedule, self.model, self.plans, self.optimizer, self.scheduler)
        if resume:
            self._restore(resume)
        if ranks.world_size > 1:
            ranks.check_same(**{"hash of the masks": self.mask_hash, "device": device.type})
            # noise is a function of a position, but its last bits are the machine's
            ranks.copy_from_first(self.parameters)
        self.forward = self._compiled() if runtime.compile else self.model
        self.info = {
            "device": device.type,
            "threads": self.threads,
            "route": self.route,
            "route_reason": route_reason,
            "compute": dict(self.forms.of_layer),
            "compute_reason": self.forms.reason,
            "kernel": self.kernel and bool(self.forms.compact),
            "kernel_reason": kernel_reason,
            "compiled": self.forward is not self.model,
            "ranks": ranks.world_size,
        }

    def _choose_route(self, runtime: RuntimeConfig, resume: Mapping[str, Any] | None) -> tuple[str, str]:
        if resume:
            return str(resume["route"]), "the checkpoint's"
        torch_only = self._torch_only(runtime)
        if runtime.route == "onednn" and torch_only:
            raise ConfigError(
                "runtime.route",
                f"has no effect {torch_only}",
                value=runtime.route,
                allowed="auto or torch",
            )
        if runtime.route != "auto":
            return runtime.route, "set by runtime.route"
        if torch_only:
            return "torch", f"oneDNN's route has no effect {torch_only}"
        model = self.cell.model
        choice = choose_route(self.device, self.micro_seqs * model.context_tokens, model.width, model.d_ffn)
        return choice.route, choice.reason

    def _choose_kernel(self, resume: Mapping[str, Any] | None) -> tuple[bool, str]:
        """Return whether compact layers run the compiled kernel, and why."""
        choice = choose_kernel(self.device, DTYPES[self.cell.train.precision])
        if not resume or bool(resume.get("kernel")) == choice.used:
            return choice.used, choice.reason
        if choice.used:
            return False, "the checkpoint's"
        if "compact" in resume["compute"].values():
            self.warnings.append(
                f"goes on without the compiled kernel it began with, equal to rounding only ({choice.reason})"
            )
        return False, choice.reason

    def _torch_only(self, runtime: RuntimeConfig) -> str:
        """Return why the linear layers run torch's matmul whatever the route; "" if they do not."""
        if self.device.type != "cpu":
            return f"on {self.device.type}"
        if self.cell.train.precision != "float32":
            return f"with train.precision={self.cell.train.precision}"
        return "with runtime.compile" if runtime.compile else ""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the forward pass runs."""
        if self.cell.train.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            logits = model(x)
        if logits.dtype == torch.bfloat16:  # the loss itself is never of low precision
            logits = logits.float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))

    def _compiled(self) -> nn.Module:
        """Return the compiled model, or the model itself, with a warning, where it does not
        compile here.
        """
        x = torch.zeros(self.micro_seqs, self.cell.model.context_tokens, dtype=torch.int64, device=self.device)
        compiled = cast(nn.Module, torch.compile(self.model, dynamic=False))
        try:
            # compilation happens at the first forward and backward, and that is where a missing
            # compiler shows
            self._loss(compiled, x, x).backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            self.warnings.append(f"runtime.compile: torch.compile failed here, training without it ({reason})")
            compiled = self.model
        self.optimizer.zero_grad(set_to_none=True)
        return compiled

    def batch(self, corpus: Corpus, step: int) -> tuple[Tensor, Tensor]:
        """Return (x, y) of optimizer step number `step` (from 0), int64 [batch_seqs / world_size, context_tokens] on the CPU."""
        return batch(
            corpus,
            seed=self.cell.seed,
            step=step,
            batch_seqs=self.cell.train.batch_seqs,
            context_tokens=self.cell.model.context_tokens,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    def step(self, corpus: Corpus, step: int) -> tuple[Tensor, Tensor, float]:
        """Take optimizer step number `step` (from 0); return its loss over all ranks and gradient norm as 0-d
        tensors, and the lr factor.

        Args:
            corpus: where the batch is read.
            step: 0-based.
        """
        x, y = (self.to_device(part) for part in self.batch(corpus, step))
        parts = self.cell.train.accumulation_steps
        if parts == 1:
            loss = self._loss(self.forward, x, y)
            loss.backward()  # type: ignore[no-untyped-call]
            return self._over_ranks(loss.detach()), *self.update()
        losses = []
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            part = self._loss(self.forward, x_part, y_part) / parts
            part.backward()  # type: ignore[no-untyped-call]
            losses.append(part.detach())
        return self._over_ranks(torch.stack(losses).sum()), *self.update()

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """Average the gradients over the ranks, and return the average loss."""
        return self.ranks.average([p.grad for p in self.parameters if p.grad is not None], loss)

    def to_device(self, tokens: Tensor) -> Tensor:
        """Return tokens on the device of the model, without waiting for them to arrive."""
        return tokens if self.device.type == "cpu" else tokens.pin_memory().to(self.device, non_blocking=True)

    def update(self) -> tuple[Tensor, float]:
        """Clip the gradients, move the weights, update the masks if they are to change now, forget the gradients; return the
        gradient norm (0-d) and the lr factor.
        """
        steps_done = int(self.scheduler.last_epoch) + 1
        if self.masks is not None:
            self.masks.before_step(steps_done)
        grad_norm = self._clip()
        lr_factor = float(self.scheduler.get_last_lr()[0]) / self.base_lr
        self.optimizer.step()
        if self.masks is not None:
            self.masks.after_step(steps_done)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, lr_factor

    def _clip(self) -> Tensor:
        """Return the global gradient norm over live entries (dead ones are 0 by now), after
        clipping to it if asked.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        limit = self.cell.optimizer.clip_norm
        # on a GPU the comparison would wait for the device; multiplying by 1 does not
        if limit is not None and (self.device.type != "cpu" or not norm.item() <= limit - 1e-6):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    @torch.no_grad()
    def evaluate(self, corpus: Corpus) -> float:
        """Return the mean held-out loss, over the same sequences for every cell."""
        config = self.cell.train
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = val_batches(
            corpus,
            eval_seqs=config.eval_seqs,
            context_tokens=self.cell.model.context_tokens,
            batch_seqs=self.micro_seqs,
        )
        for x, y in itertools.islice(batches, self.ranks.rank, None, self.ranks.world_size):
            # the plain model: other batch sizes would compile again
            total += self._loss(self.model, x.to(self.device), y.to(self.device)).double() * len(x)
        return float(self.ranks.total(total).item()) / config.eval_seqs

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors and plain values only."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "first_mask_hash": self.first_mask_hash,
            "mask_hash": self.mask_hash,
            "rng": torch.get_rng_state(),
            "route": self.route,
            "compute": dict(self.forms.of_layer),
            "kernel": self.kernel,
            "threads": self.threads,
        }
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state()
        return state

    @property
    def mask_hash(self) -> str:
        """The hash of the masks as they stand."""
        return self.first_mask_hash if self.masks is None else mask_hash(named_live(self.model))

    def _restore(self, state: Mapping[str, Any]) -> None:
        # a checkpoint from before masks could change has one hash
        began_with = state.get("first_mask_hash", state["mask_hash"])
        if began_with != self.first_mask_hash:
            raise CheckpointError(
                f"the checkpoint at step {state['step']} has other masks (hash "
                f"{began_with[:12]}) than this cell ({self.first_mask_hash[:12]}): it is of "
                "another seed, density or program version; delete the cell's checkpoints folder to "
                "start it again"
            )
        try:
            model_state, optimizer_state = to_form_of(self.model, self.optimizer, state["model"], state["optimizer"])
            self.model.load_state_dict(model_state)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint at step {state['step']} is of another model: {error}") from error
        if mask_hash(named_live(self.model)) != state["mask_hash"]:
            raise CheckpointError(
                f"the masks stored in the checkpoint at step {state['step']} are not those of its "
                f"mask hash {state['mask_hash'][:12]}; delete the cell's checkpoints folder to start "
                "it again"
            )
        if self.masks is not None:
            self.masks.restored(int(state["step"]))
        self.optimizer.load_state_dict(optimizer_state)
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"])

    def facts(self, steps_done: int) -> dict[str, Any]:
        """Return what the result says of the model and its cost, as plain values."""
        live = (
            live_now(self.plans, self.model)
            if self.masks is not None
            else {plan.name: plan.live for plan in self.plans}
        )
        plans = [
            replace(plan, live=live[plan.name], density=live[plan.name] / math.prod(plan.shape)) for plan in self.plans
        ]
        layers = parameter_rows(plans)
        sparse = [plan for plan in plans if plan.role in SPARSE_ROLES]
        n_sparse = sum(math.prod(plan.shape) for plan in sparse)
        density = sum(plan.live for plan in sparse) / n_sparse
        tokens = steps_done * self.cell.train.batch_seqs * self.cell.model.context_tokens
        ratios = self.cell.ratios(density)
        return {
            **self.info,
            "params": {
                "total": sum(math.prod(plan.shape) for plan in plans),
                "live": sum(plan.live for plan in plans),
            },
            "m_d": ratios.m_d,
            "m_rho": ratios.m_rho,
            "m_L": ratios.m_L,
            "layers": layers,
            "mask_hash": self.mask_hash,
            "tokens": tokens,
            "flops": tokens * flops_per_token(self.cell, steps_done=steps_done),
            **({} if self.masks is None else {"mask_updates": self.masks.schedule.updates_done(steps_done)}),
        }


def pick_device(wanted: str) -> torch.device:
    """Return the device to train on: `auto` takes a GPU where torch sees one.

    Args:
        wanted: auto, cpu or cuda.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("runtime.device", "torch sees no CUDA device here", value=wanted, allowed="auto or cpu")
    return torch.device("cuda" if has_cuda and wanted != "cpu" else "cpu")
