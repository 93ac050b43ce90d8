"""Corpora: content, split, fingerprints, and every way in which they can be bad."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supar_sweep.config.schema import DataConfig
from supar_sweep.errors import DataError
from supar_sweep.training import corpus as corpus_module
from supar_sweep.training.corpus import check_length, fingerprint, load_corpus, resolve

LONG_AGO = 1_000_000_000


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def text(*paths: Path | str, val_fraction: float = 0.2) -> DataConfig:
    return DataConfig(name="text", val_fraction=val_fraction, paths=tuple(map(str, paths)))


def tokens(train: Path, val: Path, vocab_size: int = 100) -> DataConfig:
    return DataConfig(name="tokens", train_path=str(train), val_path=str(val), vocab_size=vocab_size)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (LONG_AGO, LONG_AGO))  # as a file that has long been there
    return path


def write_tokens(path: Path, values: list[int]) -> Path:
    return write(path, np.array(values, dtype="<u2").tobytes())


def test_stdlib_is_the_sorted_library_without_tests_and_packages() -> None:
    data = DataConfig(name="stdlib", val_fraction=0.1)
    corpus = load_corpus(data)
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root).as_posix() for p in corpus_module._files(data)]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert not [n for n in names if skipped & set(n.split("/"))]
    everything = b"".join((root / n).read_bytes() for n in names)
    assert bytes(corpus.train) + bytes(corpus.val) == everything
    assert corpus.fingerprint == hashlib.sha256(everything).hexdigest() == fingerprint(data)
    assert corpus.n_bytes == len(everything) > 5e6
    assert (corpus.name, corpus.n_vocab) == ("stdlib", 256)


def test_held_out_is_the_tail(tmp_path: Path) -> None:
    corpus = load_corpus(text(write(tmp_path / "a", bytes(range(100))), val_fraction=0.25))
    assert bytes(corpus.train) == bytes(range(75))
    assert bytes(corpus.val) == bytes(range(75, 100))


def test_text_takes_files_in_the_order_given_and_globs_sorted_each_file_once(
    tmp_path: Path,
) -> None:
    a, b = write(tmp_path / "d/a.txt", b"A" * 8), write(tmp_path / "d/e/b.txt", b"B" * 8)
    write(tmp_path / "d/none.txt", b"")  # an empty file among a glob's is no mistake
    corpus = load_corpus(text(b, tmp_path / "d/**/*.txt", a))
    assert bytes(corpus.train) + bytes(corpus.val) == b"B" * 8 + b"A" * 8


def test_relative_paths_become_absolute_at_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.txt", b"some text")
    monkeypatch.chdir(tmp_path)
    resolved = resolve(text("x.txt", "*.txt"))
    assert resolved.paths == (str(tmp_path / "x.txt"), str(tmp_path / "*.txt"))
    monkeypatch.chdir("/")
    assert load_corpus(resolved).n_bytes == 9
    stdlib = DataConfig(name="stdlib", val_fraction=0.1)
    assert resolve(stdlib) == stdlib


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    data = tokens(write_tokens(tmp_path / "t.bin", [1, 99, 3]), write_tokens(tmp_path / "v.bin", [4, 5]))
    corpus = load_corpus(data)
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.tolist() == [1, 99, 3]
    assert corpus.val.tolist() == [4, 5]
    assert (corpus.n_vocab, corpus.n_bytes) == (100, 10)
    assert corpus.fingerprint == fingerprint(data)


def test_fingerprint_is_of_content_not_of_names(tmp_path: Path) -> None:
    one = fingerprint(text(write(tmp_path / "a", b"same content")))
    assert fingerprint(text(write(tmp_path / "elsewhere/b", b"same content"))) == one
    assert fingerprint(text(write(tmp_path / "c", b"same contenu"))) != one
    # what is train and what is held out matters
    t, v = write_tokens(tmp_path / "t", [1, 2, 3]), write_tokens(tmp_path / "v", [4, 5, 6])
    assert fingerprint(tokens(t, v)) != fingerprint(tokens(v, t))
    merged = write_tokens(tmp_path / "m", [1, 2, 3, 4]), write_tokens(tmp_path / "n", [5, 6])
    assert fingerprint(tokens(t, v)) != fingerprint(tokens(*merged))


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_unchanged_files_are_not_read_again(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_tokens(tmp_path / "a", [1, 2]), write_tokens(tmp_path / "b", [3])
    data = text(a, b) if kind == "text" else tokens(a, b)
    first = fingerprint(data)

    def no_reading(*_: object) -> Any:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_chunks", no_reading)
        assert fingerprint(data) == first
        os.utime(a, (LONG_AGO + 1, LONG_AGO + 1))
        with pytest.raises(AssertionError, match="read again"):
            fingerprint(data)
    assert fingerprint(data) == first


def test_a_file_that_was_just_written_is_not_cached(tmp_path: Path, cache_home: Path) -> None:
    path = tmp_path / "young"
    path.write_bytes(b"one")
    fingerprint(text(path))
    assert not list(cache_home.rglob("*.json"))


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"a": 1}', "\x00"])
def test_a_broken_cache_is_ignored(content: str, tmp_path: Path, cache_home: Path) -> None:
    data = text(write(tmp_path / "a", b"text"))
    cache = cache_home / "supar-sweep" / "fingerprints.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert fingerprint(data) == hashlib.sha256(b"text").hexdigest()
    assert hashlib.sha256(b"text").hexdigest() in json.loads(cache.read_text()).values()


@pytest.mark.parametrize("junk", [5, [], ["x"], None, {"a": 1}])
def test_a_cache_entry_that_is_none_is_ignored(junk: object, tmp_path: Path, cache_home: Path) -> None:
    data = tokens(write_tokens(tmp_path / "a", [1]), write_tokens(tmp_path / "b", [2]))
    want = fingerprint(data)
    cache = cache_home / "supar-sweep" / "fingerprints.json"
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), junk)))
    assert fingerprint(data) == want


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    data = text(write(tmp_path / "a", b"text"))
    assert fingerprint(data) == hashlib.sha256(b"text").hexdigest()


BAD: dict[str, tuple[Callable[[Path], DataConfig], str]] = {
    "no such file": (lambda d: text(d / "gone.txt"), r"data\.paths: no such file: .*gone\.txt"),
    "no match": (lambda d: text(d / "*.none"), r"data\.paths: no file matches .*\*\.none"),
    "no path": (lambda _: text(), r"data\.paths: names no file"),
    "folder": (lambda d: text(d), r"data\.paths: .* is a folder; .*\*\*/\*\.txt"),
    "device": (lambda _: text("/dev/zero"), r"data\.paths: /dev/zero is no regular file"),
    "empty": (lambda d: text(write(d / "e", b"")), r"data\.paths: .*/e is empty"),
    "all empty": (
        lambda d: text(write(d / "e.x", b"").parent / "*.x"),
        r"data\.paths: the corpus is empty",
    ),
    "dangling link": (lambda d: text(link(d / "l")), r"data.*cannot read .*/l: No such file"),
    "no token file": (
        lambda d: tokens(d / "t", d / "v"),
        r"data\.train_path: cannot read .*/t: No such file",
    ),
    "no held-out token file": (
        lambda d: tokens(write_tokens(d / "t", [1]), d / "v"),
        r"data\.val_path: cannot read .*/v: No such file",
    ),
    "empty token file": (
        lambda d: tokens(write(d / "t", b""), write_tokens(d / "v", [1])),
        r"data\.train_path: .*/t is empty",
    ),
    "odd bytes": (
        lambda d: tokens(write(d / "t", b"abc"), write_tokens(d / "v", [1])),
        r"data\.train_path: .* 3 bytes, an odd number",
    ),
    "held-out tokens that are trained on": (
        lambda d: tokens(write_tokens(d / "t", [5, 6]), write_tokens(d / "v", [5, 6])),
        r"data\.val_path: .*/v holds the training tokens",
    ),
    "token too large": (
        lambda d: tokens(write_tokens(d / "t", [5]), write_tokens(d / "v", [7, 100])),
        r"data\.val_path: .* token 100; allowed: below data\.vocab_size = 100",
    ),
}


def link(path: Path) -> Path:
    path.symlink_to(path.parent / "gone")
    return path


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", [fingerprint, load_corpus])
def test_bad_corpora_say_what_is_wrong(case: str, call: Callable[[DataConfig], object], tmp_path: Path) -> None:
    make, message = BAD[case]
    with pytest.raises(DataError, match=message):
        call(make(tmp_path))


def test_the_vocabulary_is_checked_against_a_cached_file_too(tmp_path: Path) -> None:
    t, v = write_tokens(tmp_path / "t", [60]), write_tokens(tmp_path / "v", [1])
    fingerprint(tokens(t, v, vocab_size=61))
    with pytest.raises(DataError, match=r"token 60; allowed: below data\.vocab_size = 60"):
        fingerprint(tokens(t, v, vocab_size=60))


def test_an_unreadable_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", b"text")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("the superuser reads everything")
    with pytest.raises(DataError, match=r"cannot read .*secret: Permission denied"):
        load_corpus(text(path))


def test_a_corpus_shorter_than_a_batch_or_an_evaluation_is_refused(tmp_path: Path) -> None:
    # 100 bytes: 80 to train on, 20 held out
    corpus = load_corpus(text(write(tmp_path / "a", b"x" * 100), val_fraction=0.2))
    check_length(corpus, batch_seqs=4, context_tokens=19, eval_seqs=1)
    with pytest.raises(DataError, match=r"training part has 80 tokens.*batch_seqs.* = 81"):
        check_length(corpus, batch_seqs=4, context_tokens=20, eval_seqs=1)
    with pytest.raises(DataError, match=r"held-out part has 20 tokens.*eval_seqs.* = 21"):
        check_length(corpus, batch_seqs=1, context_tokens=10, eval_seqs=2)
    tiny = load_corpus(text(write(tmp_path / "b", b"x")))
    with pytest.raises(DataError, match="training part has 0 tokens"):
        check_length(tiny, batch_seqs=1, context_tokens=1, eval_seqs=1)


def hf(dataset: Path | str, column: str = "text") -> DataConfig:
    return DataConfig(name="hf", val_fraction=0.1, dataset=str(dataset), split="train", column=column)


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_hf_without_datasets_says_how_to_get_it() -> None:
    with pytest.raises(DataError, match=r"pip install 'supar-sweep\[hf\]'"):
        load_corpus(hf("any"))


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets (extra hf) is not installed")
def test_hf_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    write(folder / "train.jsonl", b'{"text": "one", "n": 1}\n{"text": null, "n": 2}\n{"text": "two", "n": 3}\n')
    corpus = load_corpus(hf(folder))
    assert bytes(corpus.train) + bytes(corpus.val) == b"one\ntwo"
    with pytest.raises(DataError, match=r"data\.column: no such column .*body.* allowed: text"):
        load_corpus(hf(folder, column="body"))
    with pytest.raises(DataError, match=r"data\.column: 'n' holds no text"):
        load_corpus(hf(folder, column="n"))
    with pytest.raises(DataError, match=r"data\.dataset: cannot load"):
        load_corpus(hf(tmp_path / "gone"))
