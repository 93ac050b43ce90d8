"""What one run remembers beside its weights: its loss curve's last window, its divergence count,
where its metrics go.

Apart from the loop, so that a loop may carry several.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from supar_sweep.config.schema import TrainConfig

Stop = Literal["cancelled", "timeout", "preempted"]
ShouldStop = Callable[[], bool | Stop | None]
"""Polled before each step: false = go on; true or "cancelled", "timeout", "preempted" = save a
checkpoint and come back.
"""


class Sink(Protocol):
    """Where a run writes: its metrics and its checkpoints."""

    def begin(self, step: int, **info: Any) -> None:
        """Start the metrics after `step` steps of an earlier attempt (0 = from scratch), with
        facts for the attempt's record.
        """

    def log(self, **values: Any) -> None:
        """Append one line of metrics, with its `step`."""

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Make the metrics durable, then write a checkpoint. A failure is a warning, not the end
        of the run.
        """

    def warn(self, message: str) -> None:
        """Note something that went wrong without ending the run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run came out.

    Args:
        end: done, diverged, or why it was stopped.
        steps_done: optimizer steps, over all attempts; where it diverged, the step whose loss said
            so.
        train_loss: mean over the last summary_last_steps steps; None unless done.
        val_loss: held-out loss after the last step; None unless done.
        last_finite_loss: of training, None where there was none.
        facts: further plain values for the result.
    """

    end: Literal["done", "diverged"] | Stop
    steps_done: int
    train_loss: float | None = None
    val_loss: float | None = None
    last_finite_loss: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Member:
    """One run's state beside its weights.

    Args:
        config: the cell's train settings.
        n_vocab: vocabulary; a model that knows nothing has the loss log(n_vocab).
        tokens_per_step: for the metrics.
        sink: gets one line a step.
        density: steps done -> density of the sparse layers then, where it is to stand in the metrics.
    """

    def __init__(
        self,
        config: TrainConfig,
        n_vocab: int,
        tokens_per_step: int,
        sink: Sink,
        density: Callable[[int], float] | None = None,
    ) -> None:
        self.loss_bound = config.divergence_loss_mult * math.log(n_vocab)
        self.patience_steps = config.divergence_patience_steps
        self.tokens_per_step = tokens_per_step
        self.sink = sink
        self.density = density
        self.window: deque[float] = deque(maxlen=config.summary_last_steps)
        self.steps_above = 0
        self.last_finite_loss: float | None = None
        self.val_loss: float | None = None
        self.diverged_at: int | None = None

    def observe(self, step: int, loss: float, grad_norm: float, lr_factor: float) -> bool:
        """Log one step and return whether the run has diverged with it.

        Args:
            step: steps done, this one included.
            loss: of this step's batch, before its update.
            grad_norm: global, before clipping.
            lr_factor: of the schedule, in [0, 1].
        """
        self.sink.log(
            step=step,
            loss=loss,
            lr_factor=lr_factor,
            grad_norm=grad_norm,
            tokens=step * self.tokens_per_step,
            # of the masks that this loss is of, which the step itself may change
            **({} if self.density is None else {"density": self.density(step - 1)}),
        )
        self.window.append(loss)
        if not math.isfinite(loss):
            self.diverged_at = step
            return True
        self.last_finite_loss = loss
        self.steps_above = self.steps_above + 1 if loss > self.loss_bound else 0
        if self.steps_above >= self.patience_steps:
            self.diverged_at = step
        return self.diverged_at is not None

    def observe_val(self, step: int, val_loss: float) -> bool:
        """Log the held-out loss after `step` steps and return whether the run has diverged with it.

        The last update's damage shows nowhere else: no training loss comes after it.

        Args:
            step: steps done.
            val_loss: the held-out loss, in nats a token.
        """
        self.val_loss = val_loss
        self.sink.log(step=step, val_loss=val_loss)
        if not math.isfinite(val_loss):
            self.diverged_at = step
        return self.diverged_at is not None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "window": list(self.window),
            "steps_above": self.steps_above,
            "last_finite_loss": self.last_finite_loss,
            "val_loss": self.val_loss,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint, as `state` returned it."""
        self.window.extend(state["window"])
        self.steps_above = state["steps_above"]
        self.last_finite_loss = state["last_finite_loss"]
        self.val_loss = state["val_loss"]

    def outcome(self, end: Literal["done"] | Stop, steps_done: int) -> Outcome:
        """Return how the run came out, as plain numbers; a divergence wins over `end`.

        Args:
            end: done, or why it was stopped.
            steps_done: optimizer steps, over all attempts.
        """
        if self.diverged_at is not None:
            return Outcome(
                end="diverged",
                steps_done=self.diverged_at,
                last_finite_loss=self.last_finite_loss,
            )
        done = end == "done"
        return Outcome(
            end=end,
            steps_done=steps_done,
            train_loss=math.fsum(self.window) / len(self.window) if done else None,
            val_loss=self.val_loss if done else None,
            last_finite_loss=self.last_finite_loss,
        )


def stop_reason(answer: bool | Stop | None) -> Stop | None:
    """Return why a run must stop, from what `should_stop` answered; None = go on."""
    if not answer:
        return None
    return "cancelled" if answer is True else answer
