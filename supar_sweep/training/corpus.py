"""Corpora: where tokens come from, split in train and held-out, with a fingerprint of their
content. No torch.

`stdlib` and `text` are bytes (vocabulary 256), `tokens` memory-maps uint16 files, `hf` reads a
dataset's text column as bytes. The fingerprint is a sha256 of content alone, so that moved or
renamed files keep every cell's identity.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_sweep.config.schema import DataConfig
from supar_sweep.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_CHUNK_BYTES = 1 << 24
_CACHE_ENTRIES = 512
_RACY_S = 2.0
"""A file younger than this may change again without a visible change of its mtime: its hash is not
cached.
"""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and tokens held out.

    Args:
        name: data.name.
        n_vocab: vocabulary; every token is below it.
        train: [n_train] uint8 or uint16, perhaps memory-mapped.
        val: [n_val], the same type.
        fingerprint: sha256 (hex) of the content.
        n_bytes: size of the content.
    """

    name: str
    n_vocab: int
    train: TokenArray
    val: TokenArray
    fingerprint: str
    n_bytes: int


def resolve(data: DataConfig) -> DataConfig:
    """Return the same data with relative paths made absolute against the working directory.

    Called once, at submission: a job may run in another folder. Globs stay globs (the fingerprint
    tells if their matches change).

    Args:
        data: as the user wrote it.
    """
    changes: dict[str, Any] = {}
    if data.paths is not None:
        changes["paths"] = tuple(_absolute(path) for path in data.paths)
    for name in ("train_path", "val_path"):
        if (value := getattr(data, name)) is not None:
            changes[name] = _absolute(value)
    if data.dataset is not None and os.path.isdir(os.path.expanduser(data.dataset)):
        changes["dataset"] = _absolute(data.dataset)
    return replace(data, **changes) if changes else data


def load_corpus(data: DataConfig) -> Corpus:
    """Return the corpus, read (or memory-mapped) and checked.

    Args:
        data: what to read.

    Raises:
        DataError: a file that is missing, unreadable or empty, a token outside the vocabulary, no
            `datasets` installed.
    """
    import numpy as np

    if data.name == "tokens":
        digest, n_bytes = _tokens_fingerprint(data)
        train, val = (np.memmap(path, dtype="<u2", mode="r") for _, path in _token_files(data))
        return Corpus(data.name, data.n_vocab, train, val, digest, n_bytes)
    text = _read_hf(data) if data.name == "hf" else b"".join(_chunks(_files(data)))
    if not text:
        raise DataError(f"{_key(data)}: the corpus is empty")
    digest = hashlib.sha256(text).hexdigest()
    tokens = np.frombuffer(text, dtype=np.uint8)
    assert data.val_fraction is not None
    n_val = _n_val(len(tokens), data.val_fraction)
    return Corpus(data.name, data.n_vocab, tokens[:-n_val], tokens[-n_val:], digest, len(text))


def fingerprint(data: DataConfig) -> str:
    """Return the fingerprint that `load_corpus(data)` will have, from a cache where no file's size
    or mtime has changed.

    Args:
        data: what would be read.

    Raises:
        DataError: as `load_corpus`.
    """
    if data.name == "tokens":
        return _tokens_fingerprint(data)[0]
    if data.name == "hf":
        return _hf_fingerprint(data)
    files = _files(data)
    signature = _signature(files, "bytes")
    cached = _Cache().get(signature)
    if isinstance(cached, str):
        return cached
    digest = hashlib.sha256()
    n_bytes = 0
    for chunk in _chunks(files):
        digest.update(chunk)
        n_bytes += len(chunk)
    if not n_bytes:
        raise DataError(f"{_key(data)}: the corpus is empty")
    _remember(files, "bytes", signature, digest.hexdigest())
    return digest.hexdigest()


def _n_val(n_tokens: int, val_fraction: float) -> int:
    return max(1, round(n_tokens * val_fraction))


def check_files(data: DataConfig, *, batch_seqs: int, context_tokens: int, eval_seqs: int) -> None:
    """Raise DataError as `check_length` would, from the files' sizes alone: nothing is read.

    A dataset of the hub has no size before it is loaded: it is checked when a run begins.

    Args:
        data: the corpus.
        batch_seqs, context_tokens, eval_seqs: of the cell.
    """
    if data.name == "hf":
        return
    if data.name == "tokens":
        n_train, n_val = (_n_bytes([path], key) // 2 for key, path in _token_files(data))
    else:
        assert data.val_fraction is not None
        n_tokens = _n_bytes(_files(data), _key(data))
        n_val = _n_val(n_tokens, data.val_fraction)
        n_train = n_tokens - n_val
    _check_lengths(data.name, n_train, n_val, batch_seqs, context_tokens, eval_seqs)


def _n_bytes(files: Sequence[Path], key: str) -> int:
    try:
        return sum(path.stat().st_size for path in files)
    except OSError as error:
        raise DataError(f"{key}: cannot read {error.filename}: {error.strerror}") from error


def check_length(corpus: Corpus, *, batch_seqs: int, context_tokens: int, eval_seqs: int) -> None:
    """Raise DataError where the corpus is shorter than one batch, or its held-out part than one
    evaluation.

    Args:
        corpus: the corpus.
        batch_seqs, context_tokens, eval_seqs: of the cell.
    """
    lengths = len(corpus.train), len(corpus.val)
    _check_lengths(corpus.name, *lengths, batch_seqs, context_tokens, eval_seqs)


def _check_lengths(name: str, n_train: int, n_val: int, batch_seqs: int, context_tokens: int, eval_seqs: int) -> None:
    need = batch_seqs * context_tokens + 1
    if n_train < need:
        raise DataError(
            f"data.name={name}: the training part has {n_train:,} tokens, less "
            f"than one batch (train.batch_seqs * model.context_tokens + 1 = {need:,}); allowed: "
            "a longer corpus or a smaller batch"
        )
    need = eval_seqs * context_tokens + 1
    if n_val < need:
        raise DataError(
            f"data.name={name}: the held-out part has {n_val:,} tokens, less than "
            f"one evaluation (train.eval_seqs * model.context_tokens + 1 = {need:,}); allowed: a "
            "longer one (data.val_fraction) or fewer train.eval_seqs"
        )


def _key(data: DataConfig) -> str:
    keys = {"stdlib": "data.name=stdlib", "text": "data.paths", "tokens": "data.train_path"}
    return keys.get(data.name, "data.dataset")


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


# ---------------------------------------------------------------- files


def _files(data: DataConfig) -> list[Path]:
    """Return the corpus's files in its order: it decides what the tokens are, so it hangs on names
    and nothing else.
    """
    return _stdlib_files() if data.name == "stdlib" else _text_files(data.paths or ())


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, Path]] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise DataError(
            f"data.name=stdlib: no .py files under {root} (a zipped or stripped Python); "
            "use data=text data.paths=[...] instead"
        )
    return [path for _, path in sorted(found)]


def _text_files(patterns: Sequence[str]) -> list[Path]:
    if not patterns:
        raise DataError("data.paths: names no file; allowed: a list of files or globs")
    found: dict[Path, None] = {}
    for pattern in patterns:
        absolute = _absolute(pattern)
        if os.path.lexists(absolute):
            path = Path(absolute)
            if path.is_dir():
                raise DataError(
                    f"data.paths: {absolute} is a folder; allowed: files or globs, such as {absolute}/**/*.txt"
                )
            if path.exists() and not path.is_file():
                raise DataError(f"data.paths: {absolute} is no regular file")
            if path.is_file() and not path.stat().st_size:
                raise DataError(f"data.paths: {absolute} is empty")
            found[path] = None
            continue
        matches = sorted(Path(name) for name in glob.glob(absolute, recursive=True))
        matches = [path for path in matches if path.is_file()]
        if not matches:
            what = "no file matches" if glob.has_magic(absolute) else "no such file:"
            raise DataError(f"data.paths: {what} {absolute}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _token_files(data: DataConfig) -> list[tuple[str, Path]]:
    assert data.train_path is not None and data.val_path is not None
    return [
        ("data.train_path", Path(_absolute(data.train_path))),
        ("data.val_path", Path(_absolute(data.val_path))),
    ]


def _chunks(files: Sequence[Path], key: str = "data") -> Iterator[bytes]:
    for path in files:
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise DataError(f"{key}: cannot read {path}: {error.strerror}") from error


def _read_hf(data: DataConfig) -> bytes:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data.name=hf: needs the package `datasets`; install it with: pip install 'supar-sweep[hf]'"
        ) from None
    assert data.dataset is not None and data.column is not None
    try:
        rows = datasets.load_dataset(data.dataset, data.dataset_config, split=data.split)
    except Exception as error:  # many kinds: no network, unknown name, unknown split, bad files
        reason = str(error).partition("\n")[0]
        raise DataError(f"data.dataset: cannot load {data.dataset!r}: {reason}") from error
    columns = list(rows.column_names)
    if data.column not in columns:
        raise DataError(f"data.column: no such column (got {data.column!r}); allowed: {', '.join(columns)}")
    texts = [text for text in rows[data.column] if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"data.column: {data.column!r} holds no text")
    return "\n".join(texts).encode()


@lru_cache(maxsize=8)
def _hf_fingerprint(data: DataConfig) -> str:
    """Return the fingerprint of a dataset, which is loaded once a process for it."""
    return load_corpus(data).fingerprint


def _tokens_fingerprint(data: DataConfig) -> tuple[str, int]:
    """Return (fingerprint, bytes) of the two token files; one pass over them also finds the
    largest token.
    """
    import numpy as np

    digest = hashlib.sha256()
    n_bytes = 0
    contents: list[str] = []
    for key, path in _token_files(data):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{key}: cannot read {path}: {error.strerror}") from error
        if not size:
            raise DataError(f"{key}: {path} is empty")
        if size % 2:
            raise DataError(f"{key}: {path} has {size} bytes, an odd number: not a file of uint16")
        signature = _signature([path], "uint16")
        cached = _Cache().get(signature)
        if isinstance(cached, list) and [type(item) for item in cached] == [str, int]:
            content, largest = cached
        else:
            hasher, largest = hashlib.sha256(), 0
            for chunk in _chunks([path], key):
                hasher.update(chunk)
                largest = max(largest, int(np.frombuffer(chunk, dtype="<u2").max()))
            content = hasher.hexdigest()
            _remember([path], "uint16", signature, [content, largest])
        if largest >= data.n_vocab:
            raise DataError(f"{key}: {path} holds token {largest}; allowed: below data.vocab_size = {data.n_vocab}")
        if content in contents:
            raise DataError(f"{key}: {path} holds the training tokens; allowed: tokens that are not trained on")
        contents.append(content)
        digest.update(f"{size}:{content}\n".encode())
        n_bytes += size
    return digest.hexdigest(), n_bytes


# ---------------------------------------------------------------- cache of fingerprints


def _signature(files: Sequence[Path], kind: str) -> str:
    """Return a key that changes with any file's path, size or mtime."""
    entries: list[tuple[str, int, int]] = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"data: cannot read {path}: {error.strerror}") from error
        entries.append((str(path), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps([kind, entries]).encode()).hexdigest()


def _remember(files: Sequence[Path], kind: str, signature: str, value: Any) -> None:
    newest_s = max(path.stat().st_mtime for path in files)
    if time.time() - newest_s > _RACY_S and signature == _signature(files, kind):
        _Cache().put(signature, value)


class _Cache:
    """A small JSON file in the user's cache folder. Whatever is wrong with it, it is only a cache:
    then nothing is cached.
    """

    def __init__(self) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.path = Path(base, "supar-sweep", "fingerprints.json")

    def _read(self) -> dict[str, Any]:
        try:
            value = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def get(self, signature: str) -> Any:
        return self._read().get(signature)

    def put(self, signature: str, value: Any) -> None:
        entries = {**self._read(), signature: value}
        newest = dict(list(entries.items())[-_CACHE_ENTRIES:])
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(newest), encoding="utf-8")
            temporary.replace(self.path)
        except OSError:
            return
