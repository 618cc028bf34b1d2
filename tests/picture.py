"""The demo's picture and page: samples side by side, and how far each is from the oracle's."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch
    from showcase import Run

HEAD = ("attention", "what ran", "seconds", "error", "bound", "verdict")
AMPLIFY = 100  # of the differences; a full bar of the colour scale is then 1 % of the picture's range
TILE, GAP, MARGIN, CAPTION = 236, 20, 32, 62
INK, DIM, PAPER, PANEL, BAD = (232, 234, 240), (150, 156, 172), (18, 20, 27), (30, 33, 43), (255, 120, 110)


def sheet(title: str, exact_name: str, exact: torch.Tensor, runs: list[Run]) -> Image.Image:
    """One column per sample: the picture above, its amplified difference from the oracle's below."""
    limit = float(exact.abs().max())
    columns = [(exact_name, "the exact result", exact, None, True)]
    for run in runs:
        caption = f"error {run.error:.1e}, {run.seconds:.2f} s"
        columns.append((run.name, caption, run.latent, run.latent - exact, run.verdict == "ok"))
    width = 2 * MARGIN + len(columns) * TILE + (len(columns) - 1) * GAP
    top = MARGIN + 66
    height = top + 2 * TILE + CAPTION + 40 + MARGIN
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    big, normal, small = (ImageFont.load_default(size) for size in (24, 15, 13))
    draw.text((MARGIN, MARGIN - 6), "The same sample by every attention", INK, big)
    draw.text((MARGIN, MARGIN + 28), title, DIM, normal)
    for index, (name, caption, latent, difference, fine) in enumerate(columns):
        x = MARGIN + index * (TILE + GAP)
        canvas.paste(_picture(latent / limit), (x, top))
        label = name.removeprefix("sageattn_")  # the long names do not fit
        draw.text((x, top + TILE + 8), label, INK if fine else BAD, normal)
        draw.text((x, top + TILE + 30), caption, DIM, small)
        below = (x, top + TILE + CAPTION)
        if difference is None:
            draw.rounded_rectangle((*below, x + TILE - 1, below[1] + TILE - 1), 8, PANEL)
            _legend(draw, x + 20, below[1] + 20, small)
        else:
            canvas.paste(_heat(difference / limit), below)
    draw.text((MARGIN, height - MARGIN - 8), f"Below: distance from the {exact_name}, amplified {AMPLIFY} times.", DIM, normal)
    return canvas


def page(title: str, picture: Image.Image, rows: list[tuple[str, ...]], absent: list[tuple[str, str]]) -> str:
    """A page that needs nothing beside itself: the picture inline, the table, and what this machine could not run."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEAD)
    body = "".join(
        f'<tr class="{"ok" if row[-1] == "ok" else "bad"}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    missing = "".join(f"<li><code>{html.escape(name)}</code> {html.escape(reason)}</li>" for name, reason in absent)
    return PAGE.format(
        title=html.escape(title),
        image=image,
        head=head,
        body=body,
        missing=f"<h2>Not on this machine</h2><ul>{missing}</ul>" if missing else "",
    )


def _picture(latent: torch.Tensor) -> Image.Image:
    """The first three channels of a latent in −1 to 1, as a square of `TILE` pixels."""
    pixels = ((latent[:3].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    return _rounded(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC))


def _heat(difference: torch.Tensor) -> Image.Image:
    """The magnitude of a difference, on a black–red–yellow–white scale."""
    x = (difference.abs().mean(0) * AMPLIFY * 0.5).clamp(0, 1).nan_to_num(1.0)  # the picture's range is 2
    pixels = [tuple(_hot(float(value))) for value in x.flatten()]
    image = Image.new("RGB", (x.shape[1], x.shape[0]))
    image.putdata(pixels)
    return _rounded(image.resize((TILE, TILE), Image.Resampling.NEAREST))


def _hot(value: float) -> list[int]:
    base = (26, 27, 34)  # not quite black, so that a perfect result still is a panel
    return [round(b + (255 - b) * min(1.0, max(0.0, 3 * value - i))) for i, b in enumerate(base)]


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int, font: ImageFont.ImageFont) -> None:
    draw.text((x, y), "difference, share of range", DIM, font)
    length = TILE - 40
    for i in range(length):
        draw.line((x + i, y + 26, x + i, y + 42), tuple(_hot(i / length)))
    for share, label in ((0, "0"), (0.5, f"{50 / AMPLIFY:g} %"), (1, f"{100 / AMPLIFY:g} %")):
        draw.text((x + share * length - (0, 14, 26)[int(2 * share)], y + 48), label, DIM, font)


def _rounded(image: Image.Image) -> Image.Image:
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, image.width - 1, image.height - 1), 8, 255)
    return Image.composite(image, Image.new("RGB", image.size, PAPER), mask)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Attention, quantised</title>
<style>
:root {{ color-scheme: dark; }}
body {{ margin: 0; background: #12141b; color: #e8eaf0; font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 1360px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ font-size: 26px; margin: 0 0 4px; }} h2 {{ font-size: 18px; margin: 36px 0 8px; }}
p, li {{ color: #a9b0c2; max-width: 90ch; }}
img {{ width: 100%; height: auto; border-radius: 10px; border: 1px solid #2a2e3c; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; margin: 8px 0; font-variant-numeric: tabular-nums; }}
th {{ text-align: left; color: #969cac; font-weight: 500; }}
th, td {{ padding: 8px 14px 8px 0; border-bottom: 1px solid #2a2e3c; white-space: nowrap; }}
th:nth-child(n+3):nth-child(-n+5), td:nth-child(n+3):nth-child(-n+5) {{ text-align: right; }}
.ok td:last-child {{ color: #7fd69a; }} .bad td:last-child {{ color: #ff786e; }}
code {{ color: #cfd5e6; }}
</style></head><body><main>
<h1>Quantised attention, compared</h1>
<p>{title}. The error is the relative L2 distance of the finished sample from the one that the fp64 oracle gives.</p>
<img alt="Samples and their differences from the oracle" src="data:image/png;base64,{image}">
<h2>What ran</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{missing}
</main></body></html>
"""
