"""Where the tokens of a video or an image lie in a sequence: a frame-major grid, perhaps between tokens of text or audio."""

from __future__ import annotations

from typing import Any, NamedTuple

from .forward import KEY, Forward


class Grid(NamedTuple):
    """`frames` × `height` × `width` tokens behind `prefix` others and before `suffix` others.

    Attributes:
        exact_rows: tokens whose queries should be exact, (start, stop): what is not video.
        segments: lengths of the parts that make up the prefix.
    """

    frames: int
    height: int
    width: int
    prefix: int = 0
    suffix: int = 0
    exact_rows: tuple[int, int] = (0, 0)
    segments: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.prefix + self.frames * self.height * self.width + self.suffix

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """The tokens that are no video."""
        ranges = (0, self.prefix), (self.tokens - self.suffix, self.tokens)
        return tuple((start, stop) for start, stop in ranges if start < stop)


def find(tokens: int, options: dict[str, Any]) -> Grid | str:
    """The grid of a self-attention call over `tokens` tokens; where it is not known, why."""
    layout = options.get("minimax_h3_layout")
    if layout is not None and getattr(layout, "seq_len", None) == tokens:
        return _of_h3(layout)
    forward: Forward | None = options.get(KEY)
    if forward is None:
        return "the call does not come from a model's pass"
    if not forward.latent or forward.patch is None:
        return "the model does not tell its latent's shape or its patch size"
    sizes = forward.latent[2:] if len(forward.latent) == 5 else (1, *forward.latent[2:])
    frames, height, width = (-(-size // patch) for size, patch in zip(sizes, forward.patch))
    beside = tokens - frames * height * width
    if beside < 0:
        return f"{tokens:,} tokens are fewer than the latent's {frames} x {height} x {width}"
    if beside == forward.text and beside:
        grid = Grid(frames, height, width, *((0, beside) if forward.text_last else (beside, 0)), segments=(beside,))
        return grid._replace(exact_rows=grid.ends[0])
    if beside % (height * width) == 0:  # reference frames are frames of the grid
        return Grid(frames + beside // (height * width), height, width)
    return f"{beside:,} tokens beside the latent's {frames} x {height} x {width}, {forward.text:,} of them text"


def _of_h3(layout: Any) -> Grid | str:
    """MiniMax H3's own table of segments: text, references, audio, video."""
    _, frames, rows, columns, _ = layout.signature
    height, width = rows // 2, columns // 2
    start, stop = next(((start, stop) for start, stop, kind in layout.segments if kind == "video"), (0, 0))
    if stop - start != frames * height * width:
        return f"H3's video segment of {stop - start:,} tokens is not its latent's {frames} x {height} x {width}"
    before = [(a, b, kind) for a, b, kind in layout.segments if b <= start]
    audio = next((a for a, _, kind in before if kind == "audio"), 0)
    return Grid(frames, height, width, start, layout.seq_len - stop, (audio, start), tuple(b - a for a, b, _ in before))
