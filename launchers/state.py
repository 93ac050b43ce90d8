"""What a launcher can say of a process that ended without a word. What a run says of itself is in
supar_sweep.sweep.status.
"""

from __future__ import annotations

import signal


def describe_exit(code: int) -> str:
    """Return in words how a worker process died.

    Args:
        code: as subprocess gives it: an exit code, or minus the signal's number.
    """
    if code >= 0:
        return f"worker left with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = "unnamed"
    # only the kernel's log knows whether a SIGKILL was its out-of-memory killer: say so, and no
    # more
    guess = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"worker killed by signal {-code} {name}{guess}"
