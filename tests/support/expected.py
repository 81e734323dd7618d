"""Dependences of the models of models.py, as their definitions imply them."""

from __future__ import annotations

from typing import Any

from rmtc.ir.formula import L, S

MEMORY = {(0, 1), (1, 0)}


DIAGONAL = S + L - 1


# What the source says: distances, makespan.
EXPECTED: dict[str, tuple[set[tuple[Any, Any]], Any]] = {
    "attributes": (MEMORY, DIAGONAL),
    "buffers": (MEMORY, DIAGONAL),
    "list in the wrapper": (MEMORY, DIAGONAL),
    "tables of a segment's length": (MEMORY, DIAGONAL),
    "slices of one tensor": (MEMORY, DIAGONAL),
    "keys and values": (MEMORY, DIAGONAL),
    "shared part": (MEMORY, DIAGONAL),
    "counter": (MEMORY, DIAGONAL),
    "no dropout in eval": (MEMORY, DIAGONAL),
    "mixed precision": (MEMORY, DIAGONAL),
    "top to bottom": ({(0, 1), (1, 1 - L)}, None),
    "feedback from 1 higher": ({(0, 1), (1, -1)}, 2 * (S - 1) + L),
    "feedback from 2 higher": ({(0, 1), (1, -2)}, 3 * (S - 1) + L),
    "transformer-xl": ({(0, 1), (1, 1)}, L),
    "loop over an argument": (MEMORY, DIAGONAL),
    "loop over a closure": (MEMORY, DIAGONAL),
    "loop over a global": (MEMORY, DIAGONAL),
    "loop in a partial": (MEMORY, DIAGONAL),
    "stacked weights": (MEMORY, DIAGONAL),
    "stacked weights in a closure": (MEMORY, DIAGONAL),
    "list of segments": (MEMORY, DIAGONAL),
    "a result a segment": (MEMORY, DIAGONAL),
    "first segment alone": (MEMORY, DIAGONAL),
}
