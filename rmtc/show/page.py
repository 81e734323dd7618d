"""Plain text of a fixed width: headings, paragraphs, tables and lists with an elided middle."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 110
"""Columns of every line rmtc prints."""


class Page:
    """Lines of text that are filled from top to bottom and wrapped at :data:`WIDTH` columns."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def heading(self, text: str) -> None:
        """Add a heading, with an empty line above it unless it is the first line."""
        if self._lines:
            self.blank()
        self._lines.append(text)

    def blank(self) -> None:
        """Add an empty line."""
        self._lines.append("")

    def text(self, text: str, indent: int = 2, hang: int = 0) -> None:
        """Add a paragraph, whose later lines are indented by ``hang`` more columns."""
        self._lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hang),
            break_on_hyphens=False,
        )

    def raw(self, lines: Sequence[str], indent: int = 0) -> None:
        """Add lines that are laid out already, without wrapping them."""
        self._lines += [(" " * indent + line).rstrip() for line in lines]

    def table(self, rows: Sequence[Sequence[str]], indent: int = 4) -> None:
        """Add rows in aligned columns, two spaces between them, with the last column wrapped.

        The last column gets lines of its own where the other columns leave no room for it.
        """
        columns = max((len(row) for row in rows), default=0)
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
        for row in rows:
            last = len(row) - 1
            head = "".join(cell.ljust(widths[i]) + "  " for i, cell in enumerate(row[:last]))
            room = WIDTH - indent - len(head)
            if room < 24:
                self.text(head.rstrip(), indent, hang=2)
                self.text(row[last], indent + 2, hang=2)
                continue
            wrapped = textwrap.wrap(row[last], room, break_on_hyphens=False) or [""]
            self.raw([head + wrapped[0], *(" " * len(head) + line for line in wrapped[1:])], indent)

    def __str__(self) -> str:
        return "\n".join(self._lines)


def count(number: int, what: str) -> str:
    """Print a number with its noun: ``1 cell``, ``2 cells``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def elide(count: int, limit: int, head: int, tail: int) -> tuple[list[int], list[int]]:
    """Return the numbers below ``count`` to show: all of them up to ``limit``, else the first and the last few.

    Returns:
        The numbers before the gap and those after it. Without a gap the second list is empty.
    """
    if count <= limit:
        return list(range(count)), []
    return list(range(head)), list(range(count - tail, count))
