"""Text in a grid of characters, and frames of it as a GIF or an animated SVG that plays once.

Needs Pillow and a font of matplotlib's for a GIF, which come with matplotlib (the [plot] extra).
"""

import html
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLUMNS = 72  # of a line of text
SIZE, ADVANCE, LINE = 16, 10, 26  # pixels: of the letters, of a column, of a line
MARGIN, HEAD = 24, 72  # pixels: around the text, and above it with the title, caption and bar
HEADING_COLUMNS = 40  # the narrowest picture

# Colours of the page trajectory.html, light and dark.
LIGHT = {
    "page": "#fdfcfa",
    "ink": "#1f1e1c",
    "quiet": "#6b675f",
    "masked": "#e0dacf",
    "new": "#ffd978",
    "known": "#1c6e8c",
    "bar": "#b06f00",
}
DARK = {
    "page": "#16171a",
    "ink": "#e9e6e0",
    "quiet": "#9a968d",
    "masked": "#34363d",
    "new": "#7d5312",
    "known": "#7cc4de",
    "bar": "#e0a63c",
}


class Cell(NamedTuple):
    """A character of a line."""

    character: str
    kind: str  # "", "masked", "new" or "known"
    position: int  # of its token


class Frame(NamedTuple):
    """A state of one text as lines."""

    caption: str
    noise: float  # the share of the text that is still noise
    lines: list[list[Cell]]


def columns_of(character: str) -> int:
    """Of a grid of characters, as a terminal has."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(cells: Iterable[Cell], columns: int) -> Iterator[list[Cell]]:
    """Yields lines of at most `columns` columns; what cannot be printed shows as "·"."""
    line, width = [], 0
    for cell in cells:
        if cell.character == "\n":
            yield line
            line, width = [], 0
            continue
        if not cell.character.isprintable():
            cell = cell._replace(character="·")
        extent = columns_of(cell.character)
        if width + extent > columns:
            yield line
            line, width = [], 0
        line.append(cell)
        width += extent
    yield line


def line_starts(pieces: Sequence[str], columns: int) -> list[int]:
    """The positions of the tokens that begin a line where words are not broken."""
    starts, word, width = [0], 0, 0
    for position, piece in enumerate(pieces):
        before = pieces[position - 1][-1:] if position else ""
        if before.isspace() or piece[:1].isspace():
            word = position
        width += sum(map(columns_of, piece))
        if before == "\n":
            starts.append(position)
            width = sum(map(columns_of, piece))
        elif width > columns and piece.strip():
            starts.append(word if word > starts[-1] else position)
            width = sum(columns_of(c) for one in pieces[starts[-1] : position + 1] for c in one)
    return starts


def laid_out(pieces: Sequence[str], kinds: Sequence[str], last: Sequence[str]) -> list[list[Cell]]:
    """The lines of a state, broken where those of the text that it becomes are.

    A masked token is as wide as the token that stands there in `last`.
    """
    lines: list[list[Cell]] = []
    ends = [*line_starts(last, COLUMNS), len(last)]
    for begin, end in itertools.pairwise(ends):
        cells = []
        for position in range(begin, end):
            text, kind = pieces[position], kinds[position]
            if kind == "masked":
                text = (
                    last[position] if last[position].strip() else " " + last[position].lstrip(" ")
                )
            # The space between two words is dropped where a line is broken.
            is_broken = position == begin > 0 and not last[position - 1].endswith("\n")
            if is_broken and last[position].startswith(" ") and len(last[position]) > 1:
                text = text.removeprefix(" ")
            if text[:1] == " " and text.strip() and kind != "known":  # only the word is coloured
                cells.append(Cell(" ", "", position))
                text = text.removeprefix(" ")
            cells += [Cell(character, kind, position) for character in text]
        if end < len(last) and cells and cells[-1].character == "\n":
            cells.pop()  # the next line begins there anyway
        lines += wrap(cells, COLUMNS + 1)
    return lines


def seconds(count: int) -> list[float]:
    """How long each of `count` frames is shown; noise and the last one for longer."""
    pause = min(0.4, max(0.04, 9.0 / max(1, count - 1)))
    first, last = [0.8][: count - 1], [3.0]
    return [*first, *[pause] * (count - 2), *last]


def _runs(line: list[Cell]) -> Iterator[tuple[int, int, str, str]]:
    """(first column, columns, kind, text) of the parts of a line that look alike."""
    column = 0
    # Each masked token is a block of its own.
    for (kind, _), run in itertools.groupby(
        line, key=lambda cell: (cell.kind, cell.position if cell.kind == "masked" else -1)
    ):
        text = "".join(cell.character for cell in run)
        width = sum(map(columns_of, text))
        yield column, width, kind, text
        column += width


def _size(frames: Sequence[Frame]) -> tuple[int, int]:
    """Width and height of the picture, pixels."""
    lines = [line for frame in frames for line in frame.lines]
    columns = max(HEADING_COLUMNS, *(sum(columns_of(c.character) for c in line) for line in lines))
    height = max(len(frame.lines) for frame in frames)
    return 2 * MARGIN + columns * ADVANCE, HEAD + height * LINE + MARGIN


def gif(frames: Sequence[Frame], title: str) -> bytes:
    """The frames as a GIF, which plays once."""
    from PIL import Image, ImageDraw

    size, fonts = _size(frames), _fonts()
    images = []
    for frame in frames:
        image = Image.new("RGB", size, LIGHT["page"])
        _draw(ImageDraw.Draw(image), frame, title, fonts)
        images.append(image)
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette())  # one for all frames: what does not change is left out of them
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    file = io.BytesIO()
    durations = [round(1000 * each) for each in seconds(len(frames))]
    # Without `loop` a GIF plays once.
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations)
    return file.getvalue()


def _palette() -> list[int]:
    """Red, green and blue of each colour, and of those between it and what it is drawn on."""
    pairs = [("page", name) for name in LIGHT] + [("new", "ink"), ("masked", "bar")]
    colours = []
    for pair in pairs:
        below, above = (np.array(list(bytes.fromhex(LIGHT[name][1:]))) for name in pair)
        colours += [below + (above - below) * share for share in np.linspace(0, 1, 9)]
    return np.rint(colours).astype(int).ravel().tolist()


def _fonts() -> tuple:
    """The text's font and the small one of the head."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    layout = ImageFont.Layout.BASIC  # its advances are whole pixels
    return (
        ImageFont.truetype(folder / "DejaVuSansMono.ttf", SIZE, layout_engine=layout),
        ImageFont.truetype(folder / "DejaVuSans.ttf", 13),
    )


def _draw(draw, frame: Frame, title: str, fonts: tuple) -> None:
    """One frame onto an ImageDraw."""
    font, small = fonts
    right = draw.im.size[0] - MARGIN
    draw.text((MARGIN, 18), title, LIGHT["quiet"], small)
    draw.text((MARGIN, 38), frame.caption, LIGHT["quiet"], small)
    bar = (MARGIN, 60, right, 62)
    draw.rectangle(bar, LIGHT["masked"])
    if frame.noise > 0:
        draw.rectangle((*bar[:2], MARGIN + round(frame.noise * (right - MARGIN)), 62), LIGHT["bar"])
    for number, line in enumerate(frame.lines):
        top = HEAD + number * LINE
        for column, width, kind, text in _runs(line):
            left = MARGIN + column * ADVANCE
            box = (left, top + 2, left + width * ADVANCE - 2, top + LINE - 3)
            if kind == "masked":
                draw.rounded_rectangle(box, 3, LIGHT["masked"])
                continue
            if kind == "new":
                draw.rounded_rectangle(box, 3, LIGHT["new"])
            if kind == "known":
                draw.line((left, top + 22, box[2], top + 22), LIGHT["known"], 2)
            is_even = font.getlength(text) == width * ADVANCE  # else each character is placed
            for part in [text] if is_even else text:
                draw.text((left, top + 3), part, LIGHT["ink"], font)
                left += columns_of(part) * ADVANCE if len(part) == 1 else 0


def svg(frames: Sequence[Frame], title: str) -> str:
    """The frames as an SVG that plays once, and once more at each click.

    What does not animate SVGs shows the last frame.
    """
    width, height = _size(frames)
    shown = seconds(len(frames))
    ends = list(itertools.accumulate(shown))
    total = ends[-1] if len(frames) > 1 else 1.0
    groups = []
    for number, frame in enumerate(frames):
        is_last = number == len(frames) - 1
        begin = ends[number] - shown[number]
        values = [
            (0.0, "hidden"),
            (begin, "visible"),
            *([] if is_last else [(ends[number], "hidden")]),
        ]
        values = values[number == 0 :]
        times = ";".join(f"{time / total:.4f}" for time, _ in values)
        animate = (
            f'<animate attributeName="visibility" values="{";".join(v for _, v in values)}" '
            f'keyTimes="{times}" calcMode="discrete" dur="{total:.2f}s" begin="0s;film.click" '
            'fill="freeze"/>'
        )
        state = "visible" if is_last else "hidden"
        groups.append(f'<g visibility="{state}">{animate}{_svg_frame(frame, width)}</g>')
    name = html.escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" id="film" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{name}">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n"
        f'<rect class="page" width="{width}" height="{height}"/>\n'
        f'<text class="head" x="{MARGIN}" y="30">{name}</text>\n'
        f'<rect class="masked" x="{MARGIN}" y="60" width="{width - 2 * MARGIN}" height="3"/>\n'
        + "\n".join(groups)
        + "\n</svg>\n"
    )


def _svg_frame(frame: Frame, width: int) -> str:
    """The caption, the bar and the lines of one frame."""
    bar = round(frame.noise * (width - 2 * MARGIN))
    parts = [
        f'<text class="head" x="{MARGIN}" y="50">{html.escape(frame.caption)}</text>',
        f'<rect class="bar" x="{MARGIN}" y="60" width="{bar}" height="3"/>',
    ]
    blocks = {"masked": "", "new": ""}  # a path of lines as high as a block
    texts = []
    for number, line in enumerate(frame.lines):
        top = HEAD + number * LINE
        for column, columns, kind, text in _runs(line):
            left, extent = MARGIN + column * ADVANCE, columns * ADVANCE
            if kind in blocks:
                blocks[kind] += f"M{left} {top + 13}h{extent - 1}"
            if kind != "masked" and text.strip():
                name = ' class="known"' if kind == "known" else ""
                texts.append(
                    f'<text{name} x="{left}" y="{top + 18}" textLength="{extent}">'
                    f"{html.escape(text)}</text>"
                )
    paths = [f'<path class="{kind}" d="{path}"/>' for kind, path in blocks.items() if path]
    return "".join([*parts, *paths, *texts])


# The letters of SIZE, and blocks a little lower than a LINE.
_STYLE = """
text{font:16px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}
.head{font:13px system-ui,'DejaVu Sans',sans-serif}
.known{font-weight:bold}
path{stroke-width:21px}
"""
_COLOURS = """
.page{fill:page}text{fill:ink}.head{fill:quiet}.bar{fill:bar}
rect.masked{fill:masked}path.masked{stroke:masked}path.new{stroke:new}
.known{text-decoration:underline known}
"""


def _coloured(colours: dict[str, str]) -> str:
    return re.sub(r"(?<=[:\s])[a-z]+(?=})", lambda name: colours[name.group()], _COLOURS)


_STYLE += f"{_coloured(LIGHT)}@media(prefers-color-scheme:dark){{{_coloured(DARK)}}}"
