"""The renderer of every output table: text that is never cut, JSON and CSV that hold the values."""

import csv
import io
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from supar_sweep.errors import ConfigError
from supar_sweep.sweep.tables import render

ROWS: list[dict[str, Any]] = [
    {"cell": "a-very-long-name-" * 12, "loss": 2.5, "ci": (-9.25, -9.0), "done": True},
    {"cell": "b", "loss": None, "ci": None, "done": False, "why": "line one\nline two"},
]


def test_a_piped_table_is_never_cut() -> None:
    lines = render(ROWS).splitlines()
    assert ROWS[0]["cell"] in lines[2]
    assert len(lines) == 2 + len(ROWS)
    assert "line one line two" in lines[3]


def test_columns_choose_order_and_headings() -> None:
    lines = render(ROWS, {"loss": "train loss", "cell": "cell"}).splitlines()
    assert lines[0].split("  ")[0] == "train loss"
    assert "ci" not in lines[0]
    assert json.loads(render(ROWS, {"loss": "train loss"}, "json")) == [
        {"loss": 2.5},
        {"loss": None},
    ]


def test_numbers_line_up_on_the_right() -> None:
    lines = render([{"n": 1}, {"n": 1000}]).splitlines()
    assert lines[2:] == ["   1", "1000"]


def test_json_is_the_values_with_null_for_what_is_not_a_number() -> None:
    found = json.loads(render([{"a": float("nan"), "b": (1, 2.5), "c": None, "d": True}], format="json"))
    assert found == [{"a": None, "b": [1, 2.5], "c": None, "d": True}]


def test_csv_reads_back() -> None:
    found = list(csv.DictReader(io.StringIO(render(ROWS, format="csv"))))
    assert found[0] == {
        "cell": ROWS[0]["cell"], "loss": "2.5", "ci": "[-9.25, -9.0]", "done": "True", "why": "",
    }  # fmt: skip
    assert found[1]["why"] == "line one\nline two"


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_no_rows_is_no_error(form: str) -> None:
    assert render([], ["cell", "loss"], form).endswith("\n")
    assert json.loads(render([], format="json")) == []


def test_a_terminal_gets_a_drawn_table_with_every_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = re.sub(r"\x1b\[[0-9;]*m", "", render(ROWS, terminal=True, title="cells"))
    assert "cells" in text
    assert "".join(text.split()).count("a-very-long-name-") > 0
    assert "[bold]" in render([{"a": "[bold]"}], terminal=True)  # text, not markup


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'json'"):
        render(ROWS, format="jsn")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from supar_sweep.sweep.tables import render; render([{'a': 1}]);"
        " sys.exit(any(name in sys.modules for name in ('rich', 'pandas', 'torch', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
