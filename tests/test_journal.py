"""A study's journal after a kill at any moment, and with lines that no tuner wrote."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from supar_sweep.errors import RecordError
from supar_sweep.sweep.journal import mend_journal, read_trials
from supar_sweep.sweep.trials import trial_rows
from tests.studies import Basin, run, study, trials


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of one batch and a part of the second."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, Basin(), study(n_trials=6, batch_trials=3))
    return folder


def at_line(whole: Path, number: int, line: bytes, folder: Path) -> Path:
    """Return a copy of the journal with another line in the place of a line."""
    lines = (whole / "journal.log").read_bytes().splitlines(keepends=True)
    lines[number] = line + b"\n"
    path = folder / "journal.log"
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_a_coordinator_killed_after_any_line_is_taken_over_exactly(tmp_path: Path, sampler: str) -> None:
    config = study(n_trials=6, batch_trials=3, sampler=sampler, confirm_top_k=1)
    winner = run(tmp_path / "whole", Basin(), config)
    lines = (tmp_path / "whole" / "journal.log").read_bytes().splitlines(keepends=True)
    wanted = [(trial.state, trial.params, trial.value) for trial in trials(tmp_path / "whole")]
    for n_lines in range(len(lines)):
        folder = tmp_path / str(n_lines)
        folder.mkdir()
        (folder / "journal.log").write_bytes(b"".join(lines[:n_lines]) + lines[n_lines][:9])
        assert run(folder, Basin(), config) == winner
        assert [(trial.state, trial.params, trial.value) for trial in trials(folder)] == wanted


NONSENSE = (
    *(
        b"{}",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"[[]]",
        b"{",
        b"\xff\xfe",
        b"[" * 20_000,
        b'{"op_code": 4}',
        b'{"op_code": 99}',
    ),
    *(b'{"op_code": null}', b'{"op_code": [1]}', b'{"op_code": 6, "trial_id": 0, "state": "x", "values": [1]}'),
    *(
        b'{"op_code": 5, "trial_id": 1}',
        b'{"op_code": 2, "study_id": 0, "user_attr": 3}',
        b'{"op_code": 4, "study_id": []}',
    ),
    b'{"op_code": 6, "trial_id": 0, "worker_id": "w", "state": 1, "values": "x", "datetime_complete": "2026-01-01T00:00:00"}',
    b'{"op_code": 6, "trial_id": 0, "worker_id": "w", "state": 1, "values": [], "datetime_complete": "2026-01-01T00:00:00"}',
    b'{"op_code": 6, "trial_id": 0, "worker_id": "w", "state": 1, "values": null, "datetime_complete": "2026-01-01T00:00:00"}',
)


@pytest.mark.parametrize("line", NONSENSE, ids=lambda line: repr(line[:60]))
def test_a_line_that_is_no_operation_is_refused(whole: Path, tmp_path: Path, line: bytes) -> None:
    lines = (whole / "journal.log").read_bytes().splitlines()
    # of trial 0: after its numbers and before its value
    number = next(i for i, text in enumerate(lines) if json.loads(text)["op_code"] == 8)
    folder = tmp_path / "studies" / "proxy"
    folder.mkdir(parents=True)
    journal = at_line(whole, number, line, folder)
    for read in (
        lambda: mend_journal(journal, "proxy"),
        lambda: read_trials(journal, "proxy"),
        lambda: trial_rows(tmp_path, "proxy"),
        lambda: run(folder, Basin(), study(n_trials=6, batch_trials=3)),
    ):
        before = journal.read_bytes()
        with pytest.raises(
            RecordError, match=rf"journal\.log is torn (at line {number + 1}|in trial 0) .*move it away"
        ):
            read()
        assert journal.read_bytes() == before


def test_any_line_in_the_place_of_any_other_is_refused_or_read(whole: Path, tmp_path: Path) -> None:
    drawn = random.Random(0)
    lines = (whole / "journal.log").read_bytes().splitlines()
    for case in range(60):
        folder = tmp_path / str(case)
        shutil.copytree(whole, folder)
        at_line(whole, drawn.randrange(len(lines)), drawn.choice([*lines, *NONSENSE]), folder)
        try:
            run(folder, Basin(), study(n_trials=6, batch_trials=3))
        except RecordError as error:
            assert "is torn" in str(error)  # noqa: PT017
