"""The report as a picture: time and error by layer, and a map of what was computed at which step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..sageattention.cli.report import OWN, summary
from .picture import COLOURS, FAINT, GRID, INK, MARGIN, OWN_COLOUR, SMALL, TITLE, WIDTH, Colour, Sheet, shade

if TYPE_CHECKING:
    from PIL import Image

AXIS, CHART = 56, 220  # pixels: left of a chart, and its height
CELL, MAP = (4, 16), 480  # the least and the greatest height of a map's row, and of the map where rows are above the least
MAX_ERROR, MIN_ERROR = 1.0, 1e-3  # ends of the error's scale
REASONS = 8


def draw(report: dict[str, Any]) -> Image.Image:
    """1,024 pixels wide, as high as it takes."""
    sheet = Sheet()
    sheet.paragraph(f"{report['model']} on {report['device']}", TITLE)
    for finding in report["findings"]:
        sheet.paragraph(finding, colour="#b3261e")
    if report["layers"]:
        sheet.paragraph(summary(report))
        colours = _colours(report["ran"])
        _time_by_layer(sheet, report, colours)
        _error_by_layer(sheet, report)
        _map(sheet, report["map"])
    if report["left"]:
        sheet.gap()
        sheet.paragraph("Why calls were left", colour=FAINT)
        for reason, count in list(report["left"].items())[:REASONS]:
            sheet.paragraph(f"{count} {'call' if count == 1 else 'calls'}: {reason}", SMALL)
        if len(report["left"]) > REASONS:
            sheet.paragraph(f"and {len(report['left']) - REASONS} more reasons, see the text", SMALL, FAINT)
    return sheet.image()


def _colours(names: Iterable[str]) -> dict[str, Colour]:
    ours = [name for name in names if name != OWN]
    return {**{name: COLOURS[i % len(COLOURS)] for i, name in enumerate(ours)}, OWN: OWN_COLOUR}


def _time_by_layer(sheet: Sheet, report: dict[str, Any], colours: dict[str, Colour]) -> None:
    """A bar a layer, of its shapes one on the other, coloured by what ran most."""
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for row in report["layers"]:
        by_layer.setdefault(row["layer"], []).append(row)
    timed = any(row["ms_a_step"] is not None for row in report["layers"])
    measure = "ms_a_step" if timed else "calls"
    heights = {layer: sum(row[measure] or 0 for row in rows) for layer, rows in by_layer.items()}
    top = max(heights.values()) or 1
    sheet.gap()
    sheet.paragraph("Attention by layer, ms a step" if timed else "Attention calls by layer (no time was taken)", colour=FAINT)
    left, base, width = _axes(sheet, [f"{top * part:.3g}" for part in (0, 0.5, 1)])
    column = width / len(by_layer)
    for i, rows in enumerate(by_layer.values()):
        x, y = left + i * column, float(base)
        for row in rows:
            height = CHART * (row[measure] or 0) / top
            sheet.box(x + column * 0.1, y - height, x + column * 0.9, y, colours[next(iter(row["ran"]))])
            y -= height
    _names(sheet, list(by_layer), left, column)
    sheet.legend([(name, colour) for name, colour in colours.items() if name in report["ran"]])


def _error_by_layer(sheet: Sheet, report: dict[str, Any]) -> None:
    """A dot for each layer and shape that the guard measured, on a logarithmic scale, and the bound."""
    layers = list(dict.fromkeys(row["layer"] for row in report["layers"]))
    measured = [(layers.index(row["layer"]), row) for row in report["layers"] if row["error"] is not None]
    if not measured:
        return
    bound = next((node["max_error"] for node in report["nodes"] if node.get("max_error")), None)
    sheet.gap()
    sheet.paragraph("Relative error of the worst head, where the guard measured", colour=FAINT)
    left, base, width = _axes(sheet, ["0.001", "0.03", "1"])

    def height(error: float) -> float:
        inside = min(MAX_ERROR, max(MIN_ERROR, error))
        return base - CHART * math.log(inside / MIN_ERROR) / math.log(MAX_ERROR / MIN_ERROR)

    if bound:
        sheet.line([(left, height(bound)), (left + width, height(bound))], "#b3261e", 2)
        sheet.text(left + width, height(bound) - 18, f"max_error {bound:g}", colour="#b3261e", anchor="ra")
    column = width / len(layers)
    for i, row in measured:
        good = bound is None or row["error"] <= bound
        sheet.dot(left + (i + 0.5) * column, height(row["error"]), 4, INK if good else "#b3261e")
    _names(sheet, layers, left, column)


def _map(sheet: Sheet, found: dict[str, Any]) -> None:
    """A row a layer, a column a step."""
    layers, steps, blocks = found["layers"], found["steps"], found["blocks"]
    sheet.gap()
    sheet.paragraph("Share of the blocks computed, by layer (downward) and step (to the right)", colour=FAINT)
    height = min(CELL[1], max(CELL[0], MAP // len(layers)))
    names = 150
    left, width = MARGIN + names, WIDTH - 2 * MARGIN - names
    top = sheet.reserve(height * len(layers) + 24)
    column = width / len(steps)
    every = max(1, math.ceil(16 / height))  # rows a name needs
    for i, layer in enumerate(layers):
        y = top + i * height
        if i % every == 0:
            sheet.text(left - 8, y - (16 - min(height, 16)) / 2, layer[-18:], colour=FAINT, anchor="ra")
        for j, share in enumerate(blocks[i]):
            colour = OWN_COLOUR if share is None else shade(share)
            sheet.box(left + j * column, y, left + (j + 1) * column - 1, y + height - 1, colour)
    bottom = top + height * len(layers) + 4
    every = max(1, math.ceil(30 / column))
    for j in range(0, len(steps), every):
        sheet.text(left + (j + 0.5) * column, bottom, str(steps[j] + 1), anchor="ma")
    sheet.legend([("all (dense)", shade(1)), ("a half", shade(0.5)), ("a tenth", shade(0.1)), (OWN, OWN_COLOUR)])


def _axes(sheet: Sheet, labels: list[str]) -> tuple[int, int, int]:
    """The lines of a chart with labels from the bottom to the top; its left end, its base line, and its width."""
    top = sheet.reserve(CHART + 14) + 10
    left, right = MARGIN + AXIS, WIDTH - MARGIN
    for i, label in enumerate(labels):
        y = top + CHART * (1 - i / (len(labels) - 1))
        sheet.line([(left, y), (right, y)], GRID)
        sheet.text(left - 8, y - 8, label, anchor="ra")
    return left, top + CHART, right - left


def _names(sheet: Sheet, names: list[str], left: int, column: float) -> None:
    """Below a chart, as many as fit."""
    top = sheet.reserve(24)
    widest = max(sheet.width_of(name) for name in names) + 16
    every = max(1, math.ceil(widest / column))
    for i in range(0, len(names), every):
        sheet.text(left + (i + 0.5) * column, top + 2, names[i], anchor="ma")
