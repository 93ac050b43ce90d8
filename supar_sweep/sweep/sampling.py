"""Optuna's samplers as the tuner uses them, and its journal made whole. Optuna is imported when asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from supar_sweep.errors import ConfigError, RecordError

if TYPE_CHECKING:
    import optuna


def make_sampler(name: str, seed: int, n_asked: int) -> optuna.samplers.BaseSampler:
    """Return a sampler reseeded from (seed, trials asked so far): a resumed study never repeats its random start.

    Args:
        name: tpe, random, qmc, gp or cma.
        seed: of the study.
        n_asked: trials in the study before this one.

    Raises:
        ConfigError: cma without the cmaes package.
    """
    import optuna.samplers as samplers

    digest = hashlib.sha256(f"{seed}/{n_asked}".encode()).digest()
    fresh = int.from_bytes(digest[:4], "little")
    if name == "random":
        return samplers.RandomSampler(seed=fresh)
    if name == "qmc":
        # a low-discrepancy sequence is one sequence: its position is kept in the study, its scrambling must not change
        return samplers.QMCSampler(
            scramble=True, seed=seed, warn_asynchronous_seeding=False, warn_independent_sampling=False
        )
    if name == "gp":
        return samplers.GPSampler(seed=fresh)
    if name == "cma":
        from importlib.util import find_spec

        if find_spec("cmaes") is None:
            raise ConfigError("study.sampler", "needs the package cmaes: pip install 'supar-sweep[cma]'", value=name)
        return samplers.CmaEsSampler(seed=fresh, warn_independent_sampling=False)
    return samplers.TPESampler(seed=fresh)


def mend_journal(journal: Path) -> None:
    """Cut a torn last line and drop a left lock: a coordinator killed in mid-write leaves them.

    The next append would be glued to the one and wait half a minute for the other. For the holder of the study's lock
    only: nobody else's lock on the journal is alive then.

    Raises:
        RecordError: a journal that cannot be read, or is torn elsewhere, which no killed writer does.
    """
    if not journal.exists():
        return
    try:
        Path(f"{journal}.lock").unlink(missing_ok=True)  # JournalFileOpenLock's
        raw = journal.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {journal}: {error.strerror}") from error
    whole = raw[: raw.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise RecordError(
                f"{journal} is torn at line {number} ({error}); move it away and tune again: the study begins anew, "
                "and trials whose cells are done are not trained twice"
            ) from error
    if whole != raw:
        with journal.open("r+b") as file:
            file.truncate(len(whole))
