"""Marks that the parts of a drawing share: the palette, the style sheet, texts and boxes."""

from __future__ import annotations

import textwrap
from html import escape

_SHADES = 128
"""Most colours of a drawing: more cannot be told apart. Of more segments, neighbours share one."""

_LIGHT = ("#2a1a6b", "#2c4a9a", "#17758f", "#3f8f4e", "#b98600")
_DARK = ("#7468e0", "#4f93e6", "#35bdb0", "#9bd658", "#fbe54e")
"""Each from dark to bright, so that it reads without red and green; 3:1 or more against its background."""

_WHITE_UNTIL = 0.63
"""Part of the light palette on which white numbers read better than black ones."""

ARROWS = ("#2a7fd0", "#d55e00", "#009e73", "#b0609a", "#7a7a7a")
"""Colours of arrows: 3:1 or more against both backgrounds, and told apart without red and green."""

_STYLE = """
text{font:11px system-ui,sans-serif;fill:#1c2128}
.title{font-size:18px;font-weight:600}.head{font-size:13px;font-weight:600}.note{font-size:13px}.soft{fill:#59636e}
.end{text-anchor:end}.mid{text-anchor:middle}
.ground{fill:#fff}.panel{fill:#eef1f4}.bars{fill:#59636e}.spot{fill:#cfd6de}
.number{fill:#000;font-size:10px;pointer-events:none}.white{fill:#fff}
.stage{opacity:.45}.arrow{fill:none;stroke-width:1.8}
"""
_NIGHT = """text{fill:#e6e9ed}.soft{fill:#a3adb8}.ground{fill:#14171c}.panel{fill:#20252c}.bars{fill:#a3adb8}
.spot{fill:#4a535e}.number{fill:#000}"""
_NARROW = "@media(max-width:640px){.axis,.head{font-size:18px}.number,.width{display:none}}"


def _shade(segment: int, segments: int) -> int:
    return segment * min(segments, _SHADES) // segments


def colour(segment: int, segments: int) -> str:
    """Give the class of a segment's colour, ``c0`` for the first one."""
    return f"c{_shade(segment, segments)}"


def on_dark(segment: int, segments: int) -> bool:
    """Tell whether a number on the segment's colour reads better white, in a light drawing."""
    return _shade(segment, segments) < _WHITE_UNTIL * min(segments, _SHADES)


def style(segments: int) -> str:
    """Write the style sheet of a drawing, for light and for dark as the reader prefers."""
    count = min(segments, _SHADES)
    night = f"@media(prefers-color-scheme:dark){{{_NIGHT}\n{_palette(_DARK, count)}}}"
    return f"{_STYLE}{_palette(_LIGHT, count)}\n{night}\n{_NARROW}\n"


def _palette(stops: tuple[str, ...], count: int) -> str:
    """Write a rule for each of so many colours between the stops."""
    parts = [[int(stop[at : at + 2], 16) for at in (1, 3, 5)] for stop in stops]
    rules = []
    for n in range(count):
        place = n / max(count - 1, 1) * (len(stops) - 1)
        below = min(int(place), len(stops) - 2)
        mixed = (a + (b - a) * (place - below) for a, b in zip(parts[below], parts[below + 1], strict=True))
        rules.append(f".c{n}{{fill:#{''.join(f'{round(value):02x}' for value in mixed)}}}")
    return "".join(rules)


def number(value: float) -> str:
    """Write a number, short."""
    return f"{value:.6g}" if value % 1 else str(int(value))


def box(x: float, y: float, width: float, height: float) -> str:
    """Write a rectangle as a part of a path."""
    left, top, across, down = (number(round(value, 4)) for value in (x, y, width, height))
    return f"M{left} {top}h{across}v{down}h-{across}z"


def text(kind: str, x: float, y: float, words: str) -> str:
    """Write a text of a class of the style sheet."""
    return f'<text class="{kind}" x="{number(x)}" y="{number(y)}">{escape(words)}</text>'


def wrapped(kind: str, x: float, y: float, words: str, width: int, down: float) -> list[str]:
    """Write a text in lines of at most so many characters, ``down`` from line to line."""
    return [text(kind, x, y + index * down, line) for index, line in enumerate(textwrap.wrap(words, width))]
