"""Classes of bodies in words."""

from __future__ import annotations

from rmtc.grouping import by_key
from rmtc.ir.explanation import CellClass
from rmtc.ir.segment_loop import SegmentLoop


def class_summaries(loop: SegmentLoop) -> tuple[CellClass, ...]:
    """Describe each class by its number of operations and its members, in the order layers, prologues, epilogues."""
    members: dict[tuple[int, str], dict[int, list[int]]] = {}
    sizes: dict[tuple[int, str], int] = {}
    for row, layout in enumerate(loop.layouts):
        for layer in range(-1, loop.layers + 1):
            if name := loop.class_of(row, layer):
                stage = 1 if layer < 0 else 2 if layer >= loop.layers else 0
                members.setdefault((stage, name), {}).setdefault(row, []).append(layer)
                begin, end = layout.bounds(layer)
                sizes[stage, name] = end - begin
    last = len(loop.layouts) - 1
    return tuple(
        CellClass(
            name,
            ("layer", "prologue", "epilogue")[stage],
            sizes[stage, name],
            _members(rows, last, None if stage else loop.layers),
            loop.class_notes.get(name, ""),
        )
        for (stage, name), rows in sorted(members.items(), key=lambda item: item[0])
    )


def _members(rows: dict[int, list[int]], last: int, layers: int | None) -> str:
    """Return the members of a class in words, such as ``s >= 1, all l``."""
    parts: list[str] = []
    for at, which in by_key((tuple(found), row) for row, found in rows.items()).items():
        if which == list(range(last + 1)):
            segments = "all s"
        elif which[-1] == last and which == list(range(which[0], last + 1)):
            segments = f"s >= {which[0]}"
        else:
            segments = "s = " + ", ".join(str(row) for row in which)
        if layers is None:
            parts.append(segments)
        else:
            where = "all l" if len(at) == layers else "l = " + _ranges(list(at))
            parts.append(f"{segments}, {where}")
    return "; ".join(parts)


def _ranges(values: list[int]) -> str:
    text: list[str] = []
    start = values[0]
    for here, after in zip(values, [*values[1:], None], strict=False):
        if after != here + 1:
            text.append(str(start) if start == here else f"{start} .. {here}")
            start = after if after is not None else 0
    return ", ".join(text)
