"""Ctrl-C as a count that a loop looks at, instead of an exception in the middle of anything. No
torch.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

CANCEL = signal.SIGUSR1
SIGNALS = (signal.SIGINT, CANCEL, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; `supar-sweep cancel`; a machine that shuts down; a terminal that was closed."""

ONE_PRESS_S = 0.5
"""Signals this close are one: a wrapper (make, uv) may pass on the Ctrl-C that the terminal sent to
all.
"""


class Interrupts:
    """Counts the signals that ask this process to stop, while the block runs.

    Also where a shell started the process with SIGINT ignored (a script's background job). In a thread
    other than the main one, where Python hands out no signals, the count stays 0.

    Attributes:
        count: how often.
        last: which signal it was lately; None = none yet.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last: signal.Signals | None = None
        self._last_s = float("-inf")
        self._before: dict[signal.Signals, Any] = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        self.count += now_s - self._last_s > ONE_PRESS_S
        self._last_s = now_s
        self.last = signal.Signals(number)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for each in SIGNALS:
                # nohup's word stands: a terminal that goes is no reason to stop
                if each == signal.SIGHUP and signal.getsignal(each) == signal.SIG_IGN:
                    continue
                self._before[each] = signal.signal(each, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
