"""The records: whole or absent whatever dies, one worker a cell, and no file that can hide the
others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from supar_sweep.errors import BusyError, RecordError
from supar_sweep.sweep import locks
from supar_sweep.sweep.files import read_json, write_json
from supar_sweep.sweep.records import Attempt, CellFolder, Store
from supar_sweep.sweep.status import cell_state
from tests.full_disk import files_up_to

ID = "0123456789abcdef"


@pytest.fixture
def folder(runs_dir: Path) -> CellFolder:
    return Store(runs_dir / "cells").folder(ID, "label")


def begin(folder: CellFolder) -> Attempt:
    return Attempt(folder, {"seed": 0}, {})


def train(folder: CellFolder, steps: int, *, start: int = 0, then_publish: bool = False) -> None:
    """One attempt, given up after `steps` unless it is to publish."""
    with begin(folder) as attempt:
        attempt.begin(start)
        for step in range(start + 1, steps + 1):
            attempt.log(step=step, loss=1 / step)
        if then_publish:
            attempt.publish({"end": "done"}, keep_checkpoints=False)


def publish(folder: CellFolder, end: str = "done") -> None:
    with begin(folder) as attempt:
        attempt.begin(0)
        attempt.publish({"end": end, "summary": {"train_loss": 1.0}}, keep_checkpoints=False)


# -- files -----------------------------------------------------------------------------------------


def test_json_is_read_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "d"}}
    for indent in (1, None):
        write_json(tmp_path / "deep" / "x.json", value, indent=indent)
        assert read_json(tmp_path / "deep" / "x.json") == value
    assert read_json(tmp_path / "none.json") is None


def test_nan_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b'{"end": "do', b"\0" * 64, b"[1, 2]", b"\xff\xfe{"])
def test_a_torn_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"result\.json is torn"):
        read_json(path)


def test_readers_see_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"n": 0, "pad": "x" * 20_000})
    seen: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            value = read_json(path)
            assert value is not None
            assert len(value["pad"]) == 20_000
            seen.append(value["n"])

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(60):
        write_json(path, {"n": n, "pad": "y" * 20_000})
    stop.set()
    reader.join()
    assert seen
    assert seen == sorted(seen)


def test_two_writers_do_not_tread_on_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    errors: list[BaseException] = []

    def write(n: int) -> None:
        try:
            for _ in range(20):
                write_json(path, {"n": n, "pad": [n] * 500})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    value = read_json(path)
    assert not errors
    assert value is not None
    assert set(value["pad"]) == {value["n"]}
    assert os.listdir(tmp_path) == ["x.json"]


# -- the store -------------------------------------------------------------------------------------


def test_a_folder_is_found_by_its_id_whatever_its_label(runs_dir: Path) -> None:
    store = Store(runs_dir)
    publish(store.folder(ID, "old-label"))
    assert store.folder(ID, "new-label").path.name == f"old-label-{ID}"
    assert store.folder(ID, "new-label").result() is not None
    assert store.index() == {ID: store.folder(ID, "x")}
    assert store.folder("f" * 16, "other").path.name == "other-" + "f" * 16


def test_strays_are_no_cells(runs_dir: Path) -> None:
    assert Store(runs_dir).index() == {}
    publish(Store(runs_dir).folder(ID, "label"))
    (runs_dir / "notes.txt").write_text("mine")
    (runs_dir / ID[:2] / "README").write_text("mine")
    (runs_dir / ID[:2] / "no-cell").mkdir()
    assert set(Store(runs_dir).index()) == {ID}


def test_a_moved_runs_folder_works(runs_dir: Path, tmp_path: Path) -> None:
    publish(Store(runs_dir).folder(ID, "label"))
    moved = tmp_path / "elsewhere"
    runs_dir.rename(moved)
    assert Store(moved).folder(ID, "label").result() is not None
    for path in moved.rglob("*.json"):
        assert str(runs_dir) not in path.read_text()


def test_thousands_of_cells_are_indexed_and_read(runs_dir: Path) -> None:
    store = Store(runs_dir)
    text = json.dumps({"end": "done", "summary": {"train_loss": 1.0}})
    n = 2_000
    for i in range(n):
        cell_id = f"{i * 2654435761 % 2**64:016x}"[::-1]
        path = runs_dir / cell_id[:2] / f"supar-w64-r1-lr2^-7-s0-{cell_id}"
        path.mkdir(parents=True)
        (path / "result.json").write_text(text)
    index = store.index()
    assert len(index) == n
    assert all(cell_state(folder).state == "done" for folder in index.values())


# -- attempts --------------------------------------------------------------------------------------


def test_a_cell_is_held_by_one_attempt_at_a_time(folder: CellFolder) -> None:
    assert not folder.is_locked()
    with begin(folder):
        assert folder.is_locked()
        with pytest.raises(BusyError, match=rf"label-{ID} .* pid {os.getpid()} on"):
            begin(folder)
        assert len(folder.attempts()) == 1
    assert not folder.is_locked()
    with begin(folder) as attempt:
        assert attempt.info["attempt"] == 2


def test_looking_never_turns_a_worker_away(folder: CellFolder) -> None:
    publish(folder)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            folder.is_locked()

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(30):
            locks.hold(folder.path / "lock", "the cell").close()
    finally:
        stop.set()
        for thread in lookers:
            thread.join()


def test_a_lock_ends_with_its_process(folder: CellFolder) -> None:
    code = (
        "import sys, pathlib\n"
        "from supar_sweep.sweep.records import Attempt, CellFolder\n"
        "a = Attempt(CellFolder(pathlib.Path(sys.argv[1])), {}, {})\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert cell_state(folder).state == "running"
        holder.kill()
        holder.wait()
        assert cell_state(folder).state == "stale"
        assert folder.close_dead_attempt(holder.pid + 1, "failed", "another's") is False
        assert folder.close_dead_attempt(holder.pid, "failed", "killed by signal 9") is True
        assert folder.close_dead_attempt(holder.pid, "failed", "told once") is False
    state = cell_state(folder)
    assert (state.state, state.message, state.attempts) == ("failed", "killed by signal 9", 1)


def test_publication_completes_the_cell_and_drops_checkpoints(folder: CellFolder) -> None:
    for keep in (True, False):
        with begin(folder) as attempt:
            attempt.begin(0)
            attempt.checkpoints.mkdir(exist_ok=True)
            (attempt.checkpoints / "step-1.pt").write_bytes(b"x")
            attempt.publish({"end": "diverged"}, keep_checkpoints=keep)
        assert attempt.checkpoints.exists() == keep
    result = folder.result()
    assert result is not None
    assert (result["end"], result["attempt"]) == ("diverged", 2)
    assert read_json(folder.path / "cell.json") == {"seed": 0}
    assert cell_state(folder).state == "diverged"


def test_a_result_without_its_end_file_is_complete(folder: CellFolder) -> None:
    publish(folder)
    (folder.attempts()[-1] / "end.json").unlink()  # killed between the two
    assert cell_state(folder).state == "done"


def test_a_result_that_was_deleted_is_tried_again(folder: CellFolder) -> None:
    publish(folder)
    (folder.path / "result.json").unlink()
    assert cell_state(folder)[:2] == ("stale", "its result.json is gone")


@pytest.mark.parametrize("end", ["failed", "oom", "timeout", "cancelled"])
def test_ends_that_are_no_data_are_told_with_their_message_and_log(folder: CellFolder, end: str) -> None:
    with begin(folder) as attempt:
        attempt.end(end, "why", "Traceback ...")  # type: ignore[arg-type]
    assert cell_state(folder)[:4] == (end, "why", 1, str(attempt.path / "log.txt"))


@pytest.mark.parametrize("content", ["", '{"end": "do', '{"end": "finished"}', "[]", "null"])
def test_a_corrupt_result_is_a_state_and_can_be_set_aside(folder: CellFolder, content: str) -> None:
    publish(folder)
    (folder.path / "result.json").write_text(content)
    state = cell_state(folder)
    assert state.state == "corrupt"
    assert "result.json is torn" in state.message
    assert folder.set_aside_result().read_text() == content
    assert cell_state(folder).state == "stale"


def test_a_corrupt_end_is_a_state_too(folder: CellFolder) -> None:
    train(folder, 3)
    (folder.attempts()[-1] / "end.json").write_text("{")
    assert cell_state(folder).state == "corrupt"


# -- metrics ---------------------------------------------------------------------------------------


def steps(folder: CellFolder) -> list[int]:
    return [line["step"] for line in folder.metrics()]


def test_a_resumed_attempt_begins_with_a_copy_of_its_past(folder: CellFolder) -> None:
    train(folder, 5)
    train(folder, 8, start=4)
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in folder.metrics()] == [1 / s for s in steps(folder)]


def test_the_past_is_the_longest_even_where_a_later_attempt_began_again(folder: CellFolder) -> None:
    train(folder, 8)
    train(folder, 2)  # from scratch, dead below the checkpoint at 6
    train(folder, 7, start=6)
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7]


def test_an_attempt_that_died_before_it_began_hides_no_past(folder: CellFolder) -> None:
    train(folder, 5)
    begin(folder).close()
    train(folder, 6, start=5)
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


def test_non_finite_losses_become_null(folder: CellFolder) -> None:
    with begin(folder) as attempt:
        attempt.begin(0)
        attempt.log(step=1, loss=float("nan"), grad_norm=float("inf"))
    assert folder.metrics() == [{"step": 1, "loss": None, "grad_norm": None}]


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b"\0\0\0\0\n", b"\xff\xff\n"])
def test_what_stands_before_a_torn_line_is_kept(folder: CellFolder, tail: bytes) -> None:
    train(folder, 3)
    with (folder.attempts()[-1] / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert steps(folder) == [1, 2, 3]
    train(folder, 4, start=3)
    assert steps(folder) == [1, 2, 3, 4]


def test_more_attempts_than_the_names_have_digits(folder: CellFolder) -> None:
    (folder.path / "attempts" / "9999").mkdir(parents=True)
    (folder.path / "attempts" / ".nfs0001").mkdir()
    begin(folder).close()
    begin(folder).close()
    assert [path.name for path in folder.attempts()] == ["9999", "10000", "10001"]


def test_leftovers_of_a_killed_writer_are_swept(folder: CellFolder) -> None:
    begin(folder).close()
    leftover = folder.path / ".result.json.12-abcdef.tmp"
    leftover.write_text("{")
    begin(folder).close()
    assert not leftover.exists()


# -- a disk that does not take it ------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows above 4 KiB; Linux answers a write beyond it with an error, as
    a full disk does.
    """
    with files_up_to(4096):
        yield


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"end": "done"})
    with pytest.raises(RecordError, match=r"cannot write .*: File too large"):
        write_json(path, {"pad": "x" * 10_000})
    assert read_json(path) == {"end": "done"}
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.usefixtures("small_files")
def test_metrics_that_do_not_fit_end_the_attempt_and_keep_checkpoints(folder: CellFolder) -> None:
    checkpoints = folder.path / "checkpoints"
    checkpoints.mkdir(parents=True)
    with pytest.raises(RecordError, match="cannot write"):
        train(folder, 1000, then_publish=True)
    assert checkpoints.exists()
    assert not folder.is_locked()
    assert folder.result() is None
    assert steps(folder) == list(range(1, len(steps(folder)) + 1))


AS_NOBODY = """
import os, sys, pathlib
from supar_sweep.errors import RecordError
from supar_sweep.sweep.records import Attempt, CellFolder
from supar_sweep.sweep.status import cell_state
os.setgid(65534); os.setuid(65534)
folder = CellFolder(pathlib.Path(sys.argv[1]))
print(cell_state(folder).state)
try:
    Attempt(folder, {}, {})
except RecordError as error:
    print(error)
"""


@pytest.mark.root
def test_a_folder_that_may_not_be_written_is_read_and_refused() -> None:
    with tempfile.TemporaryDirectory() as top:  # pytest keeps its own folders to their owner
        Path(top).chmod(0o755)
        folder = Store(Path(top)).folder(ID, "label")
        publish(folder)
        child = subprocess.run([sys.executable, "-c", AS_NOBODY, str(folder.path)], capture_output=True, text=True)
    assert child.stderr == ""
    state, error = child.stdout.splitlines()
    assert state == "done"
    assert error == f"cannot write {folder.path}/lock: Permission denied"


@pytest.mark.root
def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    mount = subprocess.run(command, capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no mounts here: {mount.stderr.strip()}")
    try:
        folder = Store(small).folder(ID, "label")
        with pytest.raises(RecordError, match="No space left on device"):
            train(folder, 10_000)
        assert steps(folder)
        assert cell_state(folder).state == "stale"
    finally:
        subprocess.run(["umount", str(small)], check=True)
