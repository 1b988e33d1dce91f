"""Photographs in the terminal and on a contact sheet. Plain text where the output is no terminal."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_RESET = "\x1b[0m"
_GREY_RAMP = " .:-=+*#%@"
_RIGHT, _WRONG = (46, 125, 50), (198, 40, 40)


def colour_depth(stream=sys.stdout) -> str:
    """`"true"`, `"256"` or `"none"`: what the stream shows. NO_COLOR (https://no-color.org) is honoured."""
    if not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return "none"
    return "true" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "256"


def half_blocks(grey: np.ndarray, depth: str) -> list[str]:
    """A uint8 `(height, width)` photograph, height even, as `height / 2` lines of `width` characters.

    A character shows two pixels, one above the other: the upper half block in one grey on a ground of the other.
    Without colours it shows their mean as a denser or lighter letter.
    """
    upper, lower = grey[0::2].astype(int), grey[1::2].astype(int)
    if depth == "none":
        levels = (upper + lower) * (len(_GREY_RAMP) - 1) // 510
        return ["".join(_GREY_RAMP[level] for level in line) for line in levels]

    def code(ground: int, value: int) -> str:
        # 232..255 are the 24 greys of the 256-colour table.
        return f"{ground};2;{value};{value};{value}" if depth == "true" else f"{ground};5;{232 + value * 23 // 255}"

    return [
        "".join(f"\x1b[{code(38, above)};{code(48, below)}m▀" for above, below in zip(*pair, strict=True)) + _RESET
        for pair in zip(upper.tolist(), lower.tolist(), strict=True)
    ]


def beside(*blocks: Sequence[str], gap: int = 3, widths: Sequence[int] = ()) -> list[str]:
    """Blocks of lines next to each other; `widths` are those of the blocks, as escape codes have none on screen."""
    height = max(len(block) for block in blocks)
    filled = []
    for block, width in zip(blocks, [*widths, 0][: len(blocks)], strict=True):
        filled.append([*block, *[" " * width] * (height - len(block))])
    return [(" " * gap).join(parts).rstrip(" ") for parts in zip(*filled, strict=True)]


def painted(text: str, right: bool, depth: str) -> str:
    """Green if right, red if not, where there are colours."""
    return text if depth == "none" else f"\x1b[{32 if right else 31}m{text}{_RESET}"


def contact_sheet(
    photographs: np.ndarray, captions: Sequence[str], right: Sequence[bool], columns: int, path: Path
) -> None:
    """One PNG of all photographs, uint8 `(count, 28, 28)`, each with its caption and a green or red frame."""
    zoom, margin, caption_height = 3, 4, 16
    side = photographs.shape[1] * zoom
    cell_width, cell_height = side + 2 * margin + 20, side + 2 * margin + caption_height
    rows = -(-len(photographs) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for number, (grey, caption, is_right) in enumerate(zip(photographs, captions, right, strict=True)):
        left, top = number % columns * cell_width, number // columns * cell_height
        photograph = Image.fromarray(grey).resize((side, side), Image.Resampling.NEAREST)
        x, y = left + (cell_width - side) // 2, top + margin
        draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), fill=_RIGHT if is_right else _WRONG)
        sheet.paste(photograph, (x, y))
        colour = "black" if is_right else _WRONG
        draw.text((left + cell_width // 2, y + side + 4), caption, fill=colour, font=font, anchor="mt")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
