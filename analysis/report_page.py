"""Report -> one HTML page that needs nothing else: no network, no script, no file beside it. The words are report.html.j2's."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import jinja2

from .report import Report
from .report_cost import FORMULA, MEANING, flops_text, time_text
from .report_figures import data_csv, size_px, svg
from .style import place_text

HERE = Path(__file__).resolve().parent

MARKS = {"transfers": ("yes", "\N{CHECK MARK}"), "does not transfer": ("no", "\N{MULTIPLICATION X}")}
"""Class and mark of a verdict: told apart without colour too."""

FEW_REASONS = 4
"""So many are read at a glance; the others are folded."""


def html(found: Report) -> str:
    """Return the page. What comes from records is escaped, all of it.

    Args:
        found: made by report.report.
    """
    # one that is missing in a template must not pass as an empty word
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        report=found,
        css=(HERE / "report.css").read_text(encoding="utf-8"),
        verdicts=[
            {
                "name": place_text({"parameterization": verdict.parameterization, **verdict.also}),
                "answer": verdict.answer,
                "kind": MARKS.get(verdict.answer, ("open", "?"))[0],
                "mark": MARKS.get(verdict.answer, ("open", "?"))[1],
                "reasons": verdict.reason.split("; ")[:FEW_REASONS],
                "more": verdict.reason.split("; ")[FEW_REASONS:],
            }
            for verdict in found.verdicts
        ],
        figures=list(_figures(found)),
        cost=_cost_words(found),
        rule=found.rule.replace("+-", "\N{PLUS-MINUS SIGN}"),
        formula=FORMULA,
        meaning=MEANING,
        claim_kinds={True: "yes", False: "no", None: "open"},
    )
    # a path that is no UTF-8 comes out of JSON as a lone surrogate, which no file can hold
    return page.encode("utf-8", "replace").decode("utf-8") + "\n"


def _figures(found: Report) -> Iterable[dict[str, object]]:
    for picture in found.figures:
        image = svg(picture)
        width_px, height_px = size_px(image)
        yield {
            "title": picture.title,
            "caption": picture.caption,
            "name": picture.name,
            "image": base64.b64encode(image).decode(),
            "csv": base64.b64encode(data_csv(picture).encode("utf-8", "replace")).decode(),
            "width_px": width_px,
            "height_px": height_px,
        }


def _cost_words(found: Report) -> list[tuple[str, str]]:
    """Return the cost in sentences: a heading, a sentence."""
    spent, study = found.cost, found.cost.study
    rows = [("This grid", f"{flops_text(spent.flops)} in {time_text(spent.train_s)}")]
    if study is not None:
        known = study.flops is not None
        rows.append(
            (
                "Tuning the proxy",
                f"{study.n_runs} runs, {flops_text(study.flops)} in {time_text(study.train_s)}"
                if known
                else f"{study.n_runs} runs; their records are not all in this runs folder",
            )
        )
    if study is not None and spent.direct_flops is not None:
        times = f", {spent.direct_flops / study.flops:,.3g} times the proxy's" if study.flops else ""
        shapes = f"{spent.n_targets} {'shape' if spent.n_targets == 1 else 'shapes'}"
        rows.append(
            (
                "Tuning each target directly",
                f"{flops_text(spent.direct_flops)} in {time_text(spent.direct_s)} for {shapes}{times}",
            )
        )
    elif study is None:
        rows.append(("Tuning each target directly", "no study is known, so there is no number of runs to compare with"))
    if spent.unfinished_s:
        rows.append(("Attempts without a result", f"{time_text(spent.unfinished_s)}, start-up included"))
    rows.append(("Computed on", "; ".join(f"{name}: {n} cells" for name, n in spent.devices.items())))
    return rows
