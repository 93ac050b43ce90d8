"""Who a cell is never changes: canonical JSON and ids of every preset at every scale, held against tests/guard/identity.json."""

from __future__ import annotations

import pytest

from tests.guard.identity import ADD, Row, golden, presets, row_of, rules, transferred

GOLDEN = golden()
CELLS = {name: (command, words) for name, command, words in presets()}
RULES = dict(rules())


def changes(was: Row, now: Row, where: str = "") -> list[str]:
    """Return a line for each entry that differs, by its dotted key."""
    lines = []
    for key in sorted(was.keys() | now.keys()):
        old, new = was.get(key, "(absent)"), now.get(key, "(absent)")
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{where}{key}: ")
        elif old != new:
            lines.append(f"{where}{key}: was {old!r}, is {new!r}")
    return lines


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_keeps_its_id(name: str) -> None:
    assert name in GOLDEN["cells"], f"{name} is not in tests/guard/identity.json; {ADD}"
    found = changes(GOLDEN["cells"][name], row_of(*CELLS[name]))
    assert not found, f"{name}: users' records would not be found again\n  " + "\n  ".join(found)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_its_numbers(name: str) -> None:
    assert name in GOLDEN["rules"], f"{name} is not in tests/guard/identity.json; {ADD}"

    def rounded(value: object) -> object:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, list):
            return {str(place): rounded(item) for place, item in enumerate(value)}
        return float(f"{value:.12g}") if isinstance(value, float) else value

    was, now = rounded(GOLDEN["rules"][name]), rounded(transferred(RULES[name]))
    assert isinstance(was, dict)
    assert isinstance(now, dict)
    found = changes(was, now)
    assert not found, f"{name}: the same settings would train otherwise, under the same ids\n  " + "\n  ".join(found)


def test_nothing_that_once_was_is_gone() -> None:
    assert GOLDEN["cells"].keys() <= CELLS.keys(), "a preset or an option was removed or renamed"
    assert GOLDEN["rules"].keys() <= RULES.keys()
