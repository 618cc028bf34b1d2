"""The benchmark as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .benchmark import PYTORCH, Row, a_step
from .picture import COLOURS, FAINT, INK, MARGIN, OWN_COLOUR, SMALL, TITLE, WIDTH, Sheet

if TYPE_CHECKING:
    from PIL import Image

NAMES, NUMBERS = 170, 190  # pixels, left and right of the bars


def draw(device: str, rows: list[Row]) -> Image.Image:
    """A bar an attention, by case; 1,024 pixels wide."""
    sheet = Sheet()
    sheet.paragraph(f"Attention on {device}", TITLE)
    sheet.paragraph("ms a call, and how many times as fast as PyTorch's; random inputs", colour=FAINT)
    left, width = MARGIN + NAMES, WIDTH - 2 * MARGIN - NAMES - NUMBERS
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(r.attention for r in rows if r.attention != PYTORCH))}
    for case in dict.fromkeys(row.case for row in rows):
        group = [row for row in rows if row.case == case]
        sheet.gap()
        sheet.paragraph(f"{case}, {group[0].calls:g} calls a step")
        slowest = max((row.ms for row in group if row.ms), default=1.0)
        for row in group:
            top = sheet.reserve(24)
            sheet.text(left - 8, top + 2, row.attention, colour=INK, anchor="ra")
            if row.ms is None:
                sheet.text(left, top + 2, row.note[:90])
                continue
            end = left + max(2, width * row.ms / slowest)
            sheet.box(left, top, end, top + 18, colours.get(row.attention, OWN_COLOUR))
            said = f"{row.ms:.3g} ms" + (f", {row.ratio:.2f}x" if row.ratio else "")
            sheet.text(end + 8, top + 2, said, SMALL, INK)
    total = a_step(rows)
    if total:
        sheet.gap()
        sheet.paragraph(
            "Attention of a step: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in sorted(total.items(), key=lambda i: i[1]))
        )
    return sheet.image()
