"""Hydra's part: words -> composed config -> Settings, and Hydra's errors -> ours."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supar_sweep.cli.rooms import conf_dir
from supar_sweep.cli.settings import Settings
from supar_sweep.cli.teach import teach
from supar_sweep.errors import ConfigError, SuparError

# Hydra makes no folders, changes none, configures no logging: records have folders of their own.
_QUIET = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra/help=supar",
)

# Hydra's flags that take a word of their own
_VALUED = (
    *("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-path", "-cp"),
    *("--config-name", "-cn", "--info", "-i", "--experimental-rerun"),
)

_REPLACED = re.compile(
    r"(experiment\.(?:axes|by|zipped|plot)\b[^=]*|study\.space(?:\.\w+)?|where(?:\.[\w.]+)?|launcher\.sbatch(?:\.[\w-]+)?)=(.*)",
    re.DOTALL,
)


def hydra_words(word: str, does: str, words: Sequence[str]) -> list[str]:
    """Return what Hydra is to parse: flags, the user's overrides (some respelled), our defaults.

    - `hparams=path/to/best.yaml` loads a file, where Hydra knows groups only;
    - `experiment.axes.lr=[...]` adds the axis or replaces it, where Hydra would merge or refuse;
      so do `study.space={...}`, `where.density=0.25` and `launcher.sbatch.exclude=n7`;
    - `logs CELL` is `logs cell=CELL`;
    - `reproduce fig6` is `reproduce experiment=fig6`;
    - cells, and the paths of `export`, are quoted: a cell's folder has a ^ in its name, which Hydra cannot read;
      so are paths with a tilde that the shell has left.

    Args:
        word: the command.
        does: its one-line description, shown by `--help`.
        words: the user's words after the command.
    """
    flags: list[str] = []
    told: list[str] = []
    waiting = iter(words)
    for each in waiting:
        if each.startswith("-"):
            # Hydra's parser wants all overrides in one piece, so the flags go first
            flags += [each, *([next(waiting, "")] if each in _VALUED else [])]
            continue
        key, equals, value = each.partition("=")
        if key == "hparams" and equals and (value.endswith((".yaml", ".yml")) or "/" in value):
            told.append(f"hparams_file={_quoted(value)}")
        elif word == "logs" and not equals:
            told.append(f"cell={_quoted(each)}")
        elif word in ("logs", "cancel") and key == "cell" and value not in ("", "null"):
            told.append(f"cell={_quoted(value)}")
        elif (word == "export" and key in ("checkpoint", "to") and value not in ("", "null")) or (
            equals and value.startswith("~")
        ):
            told.append(f"{key}={_quoted(value)}")
        elif word == "reproduce" and not equals and each.isidentifier():
            told.append(f"experiment={each}")
        elif match := _REPLACED.fullmatch(each):
            told += [f"++{match[1]}=null", f"++{match[1]}={match[2]}"]
        else:
            told.append(each)
    header = f"hydra.help.header={_quoted(f'supar-sweep {word}: {does}')}"
    return [*flags, *told, *_QUIET, header]


def _quoted(text: str) -> str:
    if text[:1] == text[-1:] and text[:1] in ("'", '"'):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def from_hydra(word: str, task: Callable[[Settings], int]) -> int:
    """Return the exit code of `task`, called with the settings that Hydra composes from sys.argv.

    Args:
        word: the command; conf/<word>.yaml is its root.
        task: what to do; not called for --help, --cfg, -sc.

    Raises:
        SuparError: a request that Hydra or the schema refuses.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    codes: list[int] = []
    stopped: list[Exception] = []

    entered = False

    def call(config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        nonlocal entered
        entered = True
        try:
            chosen = HydraConfig.get()
            own = tuple(each.path for each in chosen.runtime.config_sources if each.provider == "command-line")
            # as text: a list of a config would resolve the references in it
            typed: Any = OmegaConf.to_container(chosen.overrides.task, resolve=False)
            settings = Settings.read(word, config, tuple(typed), own)
            codes.append(task(settings))
        except (SuparError, OSError, OmegaConfBaseException) as error:
            stopped.append(error)  # Hydra would print "Error executing job" above it

    try:
        with _raising():
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=word)(call)()
        if stopped:
            raise stopped[0]
    except Exception as error:
        # before the task, whatever it is comes of the words or of a file of settings
        if entered and not isinstance(error, (HydraException, OmegaConfBaseException)):
            raise
        raise teach(error, word, sys.argv[1:], lambda chosen: known_keys(word, chosen)) from None
    except SystemExit as end:  # --help, --cfg, or a flag that does not exist
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return codes[0] if codes else 0


def register_resolvers() -> None:
    """Make what configs may compute known to them.

    - `${share:fraction,count,minimum}`: fraction * count, rounded down;
    - `${row:name}`: the entry of the chosen scale's row, `scales.<scale>.<name>`.
    """
    from omegaconf import OmegaConf

    def share(fraction: float, count: int, minimum: int = 0) -> int:
        return max(int(fraction * count + 1e-9), minimum)

    def row(name: str, *, _root_: Any) -> Any:
        found = OmegaConf.select(_root_, f"scales.{_root_.scale}.{name}")
        if found is None:
            raise ConfigError(f"scales.{_root_.scale}.{name}", "is missing: the experiment reads it")
        return found

    OmegaConf.register_new_resolver("share", share, replace=True)
    OmegaConf.register_new_resolver("row", row, replace=True)


@contextmanager
def _raising() -> Iterator[None]:
    """Let Hydra raise its errors, for `teach` to word, instead of printing many lines."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def known_keys(word: str, chosen: Sequence[str] = ()) -> list[str]:
    """Return every dotted setting of a command, sections included.

    Args:
        word: the command.
        chosen: words that choose options of groups, which have keys of their own.
    """
    from hydra.errors import HydraException
    from omegaconf import DictConfig

    try:
        config = compose(word, chosen)
    except HydraException:  # not all of them are groups of this command
        config = compose(word)

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in map(str, node):
            yield f"{prefix}{name}"
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from walk(child, f"{prefix}{name}.")

    return list(walk(config, ""))


def compose(
    word: str, overrides: Sequence[str] = (), *, folder: Path | None = None, folders: Sequence[str] = ()
) -> Any:
    """Return a command's composed config without running it (a DictConfig).

    Args:
        word: the command.
        overrides: Hydra overrides.
        folder: of the groups; default: the shipped ones.
        folders: the user's own, which win over those.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    GlobalHydra.instance().clear()
    first, *rest = [*folders, str(folder or conf_dir())]
    beside = [f"hydra.searchpath=[{','.join(_quoted(f'file://{each}') for each in rest)}]"] if rest else []
    with hydra.initialize_config_dir(first, version_base="1.3"):
        return hydra.compose(word, overrides=[*overrides, *beside])
