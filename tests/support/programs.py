"""Runs of a loop over segments, written as the text of a program."""

from __future__ import annotations

from rmtc.ir.program import Program

SOURCES = """\
parameter layers.0.w: float64[4, 4]
parameter layers.1.w: float64[4, 4]
parameter head: float64[4, 4]
input text: float64[{batch}, {length}, 4]
"""


class Text:
    """A program that is written line by line."""

    def __init__(self, segments: int, batch: int, tail: int) -> None:
        self.length = 4 * (segments - 1) + tail
        self.lines = [SOURCES.format(batch=batch, length=self.length)]
        self.count = 0

    def add(self, call: str) -> str:
        """Add an operation, and return its value."""
        self.lines.append(f"%{self.count} = {call}\n")
        self.count += 1
        return f"%{self.count - 1}"

    def piece(self, segment: int) -> str:
        return self.add(f"slice.Tensor(text, 1, {4 * segment}, {min(4 * segment + 4, self.length)})")

    def program(self, **results: str) -> Program:
        return Program.parse("".join([*self.lines, *(f"return {name} = {value}\n" for name, value in results.items())]))
