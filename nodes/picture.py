"""A sheet to draw text, bars and maps on, 1,024 pixels wide, and the way from it to ComfyUI's images."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN = 1024, 24
TEXT, SMALL, TITLE = 17, 14, 24  # pixels
PAPER, INK, FAINT, GRID = "#ffffff", "#1b1f24", "#6b7480", "#e3e7ec"
OWN_COLOUR = "#b9c0c9"
COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#8f5fd0", "#d9a300", "#d03b3b", "#3aa6b9", "#7a8b2f")

Colour = str | tuple[int, int, int]


class Sheet:
    """Grows downward: each part is drawn at `y`, which it moves on."""

    def __init__(self) -> None:
        self.y = MARGIN
        self._image = Image.new("RGB", (WIDTH, 256), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def reserve(self, height: int) -> int:
        """Make room for so many pixels from `y` on, and pass it; where the room begins."""
        top, self.y = self.y, self.y + height
        if self.y + MARGIN > self._image.height:
            grown = Image.new("RGB", (WIDTH, self.y + MARGIN + 512), PAPER)
            grown.paste(self._image)
            self._image, self._draw = grown, ImageDraw.Draw(grown)
        return top

    def paragraph(self, text: str, size: int = TEXT, colour: Colour = INK, indent: int = 0) -> None:
        """Text in lines that fit the sheet."""
        font = _font(size)
        for line in _wrapped(text, font, WIDTH - 2 * MARGIN - indent):
            self._draw_text((MARGIN + indent, self.reserve(round(size * 1.4))), line, font, colour)

    def gap(self, height: int = 12) -> None:
        self.reserve(height)

    def text(self, x: float, y: float, text: str, size: int = SMALL, colour: Colour = FAINT, anchor: str = "la") -> None:
        """One line; `anchor` as PIL has it: "la" from the left, "ra" up to the right, "ma" around the middle."""
        self._draw.text((x, y), text, fill=colour, font=_font(size), anchor=anchor)

    def width_of(self, text: str, size: int = SMALL) -> float:
        return _font(size).getlength(text)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A filled rectangle; at least a pixel each way."""
        self._draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=colour)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: int = 1) -> None:
        self._draw.line(list(points), fill=colour, width=width)

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def legend(self, entries: Sequence[tuple[str, Colour]]) -> None:
        """Colours and what they mean, in as many lines as it takes."""
        x, top = float(MARGIN), self.reserve(22)
        for name, colour in entries:
            width = 20 + self.width_of(name) + 18
            if x + width > WIDTH - MARGIN:
                x, top = MARGIN, self.reserve(22)
            self.box(x, top + 3, x + 14, top + 17, colour)
            self.text(x + 20, top + 2, name, colour=INK)
            x += width

    def _draw_text(self, at: tuple[float, float], text: str, font: Any, colour: Colour) -> None:
        self._draw.text(at, text, fill=colour, font=font)

    def image(self) -> Image.Image:
        """What was drawn, as high as it is."""
        return self._image.crop((0, 0, WIDTH, self.y + MARGIN))


def tensor(image: Image.Image) -> torch.Tensor:
    """As ComfyUI's IMAGE: fp32 [1, height, width, 3], 0 to 1."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(1, image.height, image.width, 3).float() / 255


def preview(image: Image.Image) -> dict[str, Any]:
    """What a node returns as "ui" to show a picture; empty outside of ComfyUI."""
    folder_paths = sys.modules.get("folder_paths")
    if folder_paths is None:
        return {}
    folder, name = folder_paths.get_temp_directory(), f"sageattention_{uuid.uuid4().hex[:12]}.png"
    os.makedirs(folder, exist_ok=True)
    image.save(os.path.join(folder, name), compress_level=4)
    return {"images": [{"filename": name, "subfolder": "", "type": "temp"}]}


def shade(share: float) -> tuple[int, int, int]:
    """From light green to dark blue for 0 to 1."""
    light, dark = (190, 232, 206), (13, 54, 107)
    share = min(1.0, max(0.0, share))
    return tuple(round(a + (b - a) * share) for a, b in zip(light, dark))  # type: ignore[return-value]


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines
