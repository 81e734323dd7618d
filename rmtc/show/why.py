"""The reason why a cell runs at its step: a longest chain of waiting cells that leads to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.explanation import Explanation
from rmtc.ir.formula import L
from rmtc.ir.schedule import Schedule
from rmtc.show.graph import edge
from rmtc.show.page import Page, count


@dataclass(frozen=True)
class Link:
    """A cell of a chain, with the dependence through which it waits for the one before, None for the first."""

    cell: Cell
    step: int
    dependence: Dependence | None = None


@dataclass(frozen=True)
class Why:
    """The chain that leads to a cell.

    Attributes:
        cell: the cell.
        step: the step in which it runs.
        schedule: the schedule it runs with.
        refused: whether the schedule is the order in which the model runs, since no better one was proven.
        chain: the cells, the last of them ``cell``.
    """

    cell: Cell
    step: int
    schedule: Schedule
    refused: bool
    chain: tuple[Link, ...]

    @property
    def forced(self) -> bool:
        """Return whether no schedule of whole cells can run it earlier.

        Its chain then has one cell for each step.
        """
        return len(self.chain) == self.step + 1

    def __str__(self) -> str:
        page = Page()
        time = self.schedule.formula
        order = "one cell after another, as the model runs" if self.refused else "by the schedule that was proven"
        page.heading(f"{self.cell} runs at step {self.step}: {order}, cell (s, l) runs at step {time}")
        if len(self.chain) == 1:
            page.text("It waits for no other cell.")
        else:
            page.text("In this chain each cell waits for the one before it:")
            page.blank()
            page.table([_row(link, len(str(self.step))) for link in self.chain])
            page.blank()
        number = count(len(self.chain), "cell")
        if self.forced:
            page.text(
                f"The chain has {number}, one for each step from 0 to {self.step}: no schedule of whole cells runs it "
                "earlier."
            )
        else:
            page.text(
                f"No chain to it is longer than {number}. It runs at step {self.step} since all cells run at steps of "
                f"the form {time}."
            )
        return str(page)


def _row(link: Link, width: int) -> list[str]:
    row = [f"step {link.step:>{width}}", str(link.cell)]
    if link.dependence is not None:
        distance, *words = edge(link.dependence)
        row += [distance, " ".join(words)]
    return row


def why(explanation: Explanation, cell: Cell) -> Why:
    """Find a longest chain that leads to a cell.

    Args:
        explanation: an explanation of a loop with layers.
        cell: a cell of its call.

    Raises:
        ValueError: if the call has no such cell.
    """
    segments, layers = explanation.segments, explanation.layers
    if not (0 <= cell.segment < segments and 0 <= cell.layer < layers):
        raise ValueError(
            f"there is no cell {cell}: this call has "
            + (f"s0.l0 to {Cell(segments - 1, layers - 1)}" if segments and layers else "none that are known")
        )
    schedule = explanation.whole or Schedule(L, 1, layers, segments)
    chain = _longest(explanation.dependences, cell, schedule)
    links = tuple(Link(each, schedule.time(each), through) for each, through in chain)
    return Why(cell, schedule.time(cell), schedule, explanation.whole is None, links)


def _longest(dependences: Sequence[Dependence], cell: Cell, schedule: Schedule) -> list[tuple[Cell, Dependence | None]]:
    producers: dict[Cell, list[tuple[Cell, Dependence]]] = {}
    work = [cell]
    while work:
        here = work.pop()
        if here not in producers:
            found = ((each.producers(here, schedule.layers), each) for each in dependences)
            producers[here] = [(source, each) for source, each in found if source is not None and source != here]
            work += [source for source, _ in producers[here]]
    length: dict[Cell, int] = {}
    before: dict[Cell, tuple[Cell, Dependence]] = {}
    for here in sorted(producers, key=schedule.time):
        known = [(length[source], (source, each)) for source, each in producers[here] if source in length]
        length[here] = 1
        if known:
            most, before[here] = max(known, key=lambda each: each[0])
            length[here] = most + 1
    chain: list[tuple[Cell, Dependence | None]] = []
    while cell in before:
        source, through = before[cell]
        chain.append((cell, through))
        cell = source
    return [(cell, None), *reversed(chain)]
