"""Classes of bodies in words."""

from __future__ import annotations

from rmtc.ir.explanation import CellClass
from rmtc.ir.segment_loop import SegmentLoop


def class_summaries(loop: SegmentLoop) -> tuple[CellClass, ...]:
    """Describe each class by its number of operations and its members, in the order layers, prologues, epilogues."""
    members: dict[tuple[str, str], dict[int, list[int]]] = {}
    sizes: dict[tuple[str, str], int] = {}

    def note(stage: str, name: str, row: int, layer: int, bounds: tuple[int, int]) -> None:
        members.setdefault((stage, name), {}).setdefault(row, []).append(layer)
        sizes[stage, name] = bounds[1] - bounds[0]

    for row, names in enumerate(loop.classes):
        for layer, name in enumerate(names):
            note("layer", name, row, layer, loop.layouts[row].layers[layer])
    for stage, stage_names in loop.stage_classes.items():
        for row, name in enumerate(stage_names):
            if name:
                layout = loop.layouts[row]
                note(stage, name, row, 0, layout.prologue if stage == "prologue" else layout.epilogue)
    order = {"layer": 0, "prologue": 1, "epilogue": 2}
    last = len(loop.layouts) - 1
    return tuple(
        CellClass(
            name,
            stage,
            sizes[stage, name],
            _members(rows, last, loop.layers if stage == "layer" else None),
            loop.class_notes.get(name, ""),
        )
        for (stage, name), rows in sorted(members.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    )


def _members(rows: dict[int, list[int]], last: int, layers: int | None) -> str:
    """Return the members of a class in words, such as ``s >= 1, all l``."""
    parts: list[str] = []
    by_layers: dict[tuple[int, ...], list[int]] = {}
    for row, found in rows.items():
        by_layers.setdefault(tuple(found), []).append(row)
    for at, which in by_layers.items():
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
