"""Print Markdown tables as the pages show them, row by row, with remarks below on times that mean nothing."""

from __future__ import annotations

import textwrap

from rmtc.turns import NOTHING, Turns

__all__ = ["Page"]


class Page(list[str]):
    """Lines that are printed as they come.

    Attributes:
        remarks: what is to be said below the table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.remarks = dict[str, None]()

    def say(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self.extend(lines)

    def head(self, *columns: str, title: str = "") -> None:
        """Begin a table, below a heading if there are several: `page.py` finds it by that."""
        above = ["", f"## {title}", ""] if title else [""] if self else []
        self.say(*above, f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")

    def row(self, *cells: str | float) -> None:
        self.say(f"| {' | '.join(f'{each:.2f}' if isinstance(each, float) else str(each) for each in cells)} |")

    def speed(self, name: str, turns: Turns, slow: str, fast: str) -> str:
        """Return the median of the ratios of turns with quartiles; a dash and a remark if the times mean nothing."""
        noise = [f"{name}, {NOTHING}: {why}" for way in (slow, fast) if (why := turns.noise(way))]
        self.remarks |= dict.fromkeys(noise)
        return "-" if noise else str(turns.ratio(slow, fast))

    def end(self) -> None:
        """End a table with its remarks, each an item of a list."""
        if self.remarks:
            self.say("", *(textwrap.fill(f"- {each}", 120, subsequent_indent="  ") for each in self.remarks))
        self.remarks = {}
