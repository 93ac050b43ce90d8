"""Command lines that a person could type and should not have: every key of every command, with values that make no sense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hypothesis import strategies as st

from supar_sweep.cli.main import COMMANDS
from supar_sweep.cli.settings import READS, sections_of
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.config.study import StudyConfig

CONF = Path(__file__).resolve().parent.parent / "conf"

NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1.0", "1e3", "nan", "inf", "-inf", "1e308", "-1e308", "1e-320"),
    *("1e-9", "1e12", "100000", "1000000", "99999999999999999999999", "9" * 400, "0x10", "1_000", "1e400", ".5", "5."),
)
TEXTS = (
    *(
        "''",
        '""',
        "' '",
        "abc",
        "'1'",
        "a/b",
        "../x",
        "/dev/null",
        "/dev/null/x",
        "~/x",
        "~nobody/x",
        ".",
        "..",
        "%j%a",
    ),
    *(
        "'a\nb'",
        "a\nb",
        "a\tb",
        "'a\0b'",
        "a\\x00b",
        "\u00e9\u2603",
        "\U0001f600",
        "x" * 300,
        "y" * 5000,
        "--help",
        "a b",
    ),
    *("'%s'", "$HOME", "'; rm -rf x'", "True", "true", "false", "yes", "null", "None", "?", "???", "a=b", "a:b", "#x"),
    *("single", "supar", "adamw", "math.sqrt", "no.such.module", "os.system"),
)
NESTED = (
    *("[]", "[1]", "[1,2]", "[null]", "[[]]", "[a,b]", "['a',1,null]", "{}", "{a:1}", "{a:{b:{c:{d:1}}}}", "{1:2}"),
    *(
        "[" * 50 + "]" * 50,
        "{a:" * 30 + "1" + "}" * 30,
        "{log2:[-9,-7]}",
        "{log2:[-9,-3],step:1e-9}",
        "{log2:[-9,2000]}",
    ),
    *(
        "{log2:[-1e6,1e6],step:1}",
        "{log2:[1,0]}",
        "{log2:[nan,1]}",
        "{mult_log2:[-1,1]}",
        "{mult_log2:[-9,9],step:1e-7}",
    ),
    *("{width:3}", "{lr:[1]}", "{figure:nope}", "{name:x}", "[0.5,0.25]", "[0,0]", "[1e308]", "[nan]", "[16,32]"),
)
SYNTAX = (
    *("", "[", "]", "{", "}", "1,2", "range(1,3)", "choice(1,2)", "interval(0,1)", "glob(*)", "int(x)", "${", "}", "'"),
    *("${model.width}", "${no.such}", "${train}", "${oc.env:NO_SUCH}", "${hparams.lr}", "${share:1,2}", "${share:a}"),
    *("${row:width}", "${row:nope}", "${.x}", "${..}", "${train.steps}", "\\", "\\'", "a,b", "@x", "x@y", "a(b)"),
)
VALUES = (*NUMBERS, *TEXTS, *NESTED, *SYNTAX)

# what a command needs before it comes to the settings at all
NEEDS: Mapping[str, tuple[str, ...]] = {
    "quickstart": ("size=smoke",),
    "reproduce": ("fig6", "scale=cpu"),
    "logs": ("cell=mup",),
    "export": ("checkpoint=nothing",),
}
# the quick ones more often
WEIGHTS = {"plan": 6, "run": 3, "tune": 3, "transfer": 3, "rules": 2, "calibrate": 2, "quickstart": 2, "status": 2}


Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Line:
    """A command line.

    Args:
        words: all of it, the command first.
        wrong: those of the words that are meant to be wrong.
    """

    words: tuple[str, ...]
    wrong: tuple[str, ...]


@cache
def keys(command: str) -> dict[str, list[Key]]:
    """Return every key of a command, and the group's option that has it, if any, by section:
    {"launcher": [("launcher.nodes", ("launcher=slurm",)), ...], ...}.
    """
    tops = sections_of(command)
    found: dict[Key, None] = {}
    for path in sorted(CONF.glob("*.yaml")):
        if path.stem.startswith("_") or path.stem == command:
            found |= {(key, ()): None for key in _flat(yaml.safe_load(path.read_text()))}
    for path in sorted(CONF.glob("*/*.yaml")):
        text, group = path.read_text(), path.parent.name
        plain = yaml.safe_load(text) or {}
        plain.pop("defaults", None)
        own = plain if "@package _global_" in text else {group: plain}
        chosen = (f"{group}={path.stem}",)
        found[group, ()] = None
        if group not in tops or group in ("scale", "experiment"):
            continue  # another command's, or one that sets keys of others
        found |= {(key, chosen): None for key in _flat(own)}
    for section, cls in {"": CellConfig, "runtime": RuntimeConfig, "study": StudyConfig}.items():
        found |= {(f"{section}.{key}".lstrip("."), ()): None for key in _of_schema(cls)}
    sections: dict[str, list[Key]] = {}
    for entry in found:
        if (top := entry[0].partition(".")[0]) in tops:
            sections.setdefault(top, []).append(entry)
    return sections


def _flat(plain: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in plain.items():
        if name == "defaults":
            continue
        yield f"{prefix}{name}"
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            yield from _flat(value, f"{prefix}{name}.")


def _of_schema(cls: Any) -> Iterator[str]:
    hints = get_type_hints(cls)
    for item in fields(cls):
        yield item.name
        inner = next((hint for hint in (hints[item.name], *get_args(hints[item.name])) if is_dataclass(hint)), None)
        yield from (f"{item.name}.{name}" for name in (_of_schema(inner) if inner else ()))


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """Draw a command line with one or two words that are likely to be wrong."""
    command = draw(st.sampled_from([name for name in COMMANDS for _ in range(WEIGHTS.get(name, 1))]))
    words: list[str] = []
    wrong: list[str] = []
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        sections = keys(command)
        key, chosen = draw(st.sampled_from(sections[draw(st.sampled_from(list(sections)))]))
        axis = draw(st.sampled_from((*(4 * (False,)), True)))
        if axis and "experiment" in READS[command]:
            key, chosen = draw(st.sampled_from(("experiment.axes.", "experiment.by."))) + key, ()
        made = draw(_written(key))
        words += [*chosen, *made]
        wrong += made
    data = ("format=json",) if command in ("plan", "transfer") else ()
    return Line((command, *data, *NEEDS.get(command, ()), *words), tuple(wrong))


def _written(key: str) -> st.SearchStrategy[list[str]]:
    value = st.one_of(
        *(st.sampled_from(kind) for kind in (NUMBERS, TEXTS, NESTED, SYNTAX)),
        st.floats().map(repr),
        st.integers().map(str),
        st.text(st.characters(codec="utf-8"), max_size=8),
    )
    plain = value.map(lambda text: [f"{key}={text}"])
    rarer = st.one_of(
        value.map(lambda text: [f"+{key}={text}"]),
        value.map(lambda text: [f"++{key}={text}"]),
        st.just([f"~{key}"]),
        value.map(lambda text: [f"{key}.more={text}"]),
        value.map(lambda text: [f"{key}x={text}"]),
        st.just([key]),
        st.tuples(value, value).map(lambda two: [f"{key}={text}" for text in two]),
    )
    return st.one_of(plain, plain, plain, rarer)
