"""Answers made by hand: what `rmtc.explain` says of an ARMT-like and of an RMT-like model."""

from __future__ import annotations

from rmtc.errors import Location
from rmtc.ir.cells import Dependence
from rmtc.ir.explanation import CellClass, Certificate, Explanation, Inequality
from rmtc.ir.formula import L
from rmtc.ir.schedule import Schedule

HIDDEN = Dependence(
    (0, 1),
    tensor="hidden states",
    producer="layers.{l} (its last residual add)",
    consumer="layers.{l}.W_q, layers.{l}.input_layernorm",
    location=Location("armt.py", 143, "forward"),
    consumer_location=Location("armt.py", 118, "read"),
)
MEMORY = Dependence(
    (1, 0),
    tensor="layers.{l}.A",
    producer="layers.{l} memory update",
    consumer="layers.{l} memory read",
    location=Location("armt.py", 131, "write"),
    consumer_location=Location("armt.py", 119, "read"),
)
NORMALISER = Dependence(
    (1, 0),
    tensor="layers.{l}.z",
    producer="layers.{l} memory update",
    consumer="layers.{l} memory read",
    location=Location("armt.py", 132, "write"),
    consumer_location=Location("armt.py", 120, "read"),
)
TOP = Dependence(
    (1, 1 - L),
    tensor="memory",
    producer="the last 4 positions of the last layer's output",
    consumer="cat with the embedded segment",
    location=Location("rmt.py", 88, "forward"),
    consumer_location=Location("rmt.py", 81, "forward"),
)


def armt(segments: int = 33, layers: int = 16) -> Explanation:
    """An associative memory a layer: the diagonal is legal and optimal."""
    schedule = Schedule(
        1,
        1,
        layers,
        segments,
        classes=(("A",) * layers, ("B",) * layers),
        stage_classes={"prologue": ("P0",), "epilogue": ("E0",)},
    )
    last, top = f"s{segments - 1}", f"l{layers - 1}"
    certificate = Certificate(
        inequalities=(
            Inequality(HIDDEN, "1*0 + 1*1 = 1"),
            Inequality(MEMORY, "1*1 + 1*0 = 1"),
            Inequality(NORMALISER, "1*1 + 1*0 = 1"),
        ),
        critical_path=f"s0.l0 -> s0.l1 -> ... -> s0.{top} -> s1.{top} -> ... -> {last}.{top}",
        bound="L + S - 1",
        optimal=True,
        assumptions=(
            "the Python of the loop does at every segment what it did at the probed ones: the first call with a new "
            "number of segments is held against the pattern before it is used",
            "no hook is added to a layer after the capture",
        ),
        checked="all 3,210 edges of the flat graph of 5 segments, which was no probe; none is violated.",
    )
    return Explanation(
        name="ArmtLlama",
        segments=segments,
        layers=layers,
        segment_length=64,
        growing=("input_ids: dimension 1, 64 a segment", "logits: dimension 1, 64 a segment"),
        free=("batch size", "length of the last segment, 1 to 64"),
        dependences=(HIDDEN, MEMORY, NORMALISER),
        classes=(
            CellClass("A", "layer", 118, "s = 0, all l"),
            CellClass("B", "layer", 131, "s >= 1, all l", "unlike A: also reads the memory, matmul at armt.py:119"),
            CellClass("P0", "prologue", 3, "all s"),
            CellClass("E0", "epilogue", 9, "all s"),
        ),
        schedule=schedule,
        certificate=certificate,
        seconds={"capture": 3.25, "reroll": 0.5, "prove": 0.125},
    )


def rmt(segments: int = 33, layers: int = 16) -> Explanation:
    """A memory that goes through the whole stack: nothing beats the sequential order."""
    return Explanation(
        name="RmtLlama",
        segments=segments,
        layers=layers,
        segment_length=64,
        growing=("input_ids: dimension 1, 64 a segment",),
        free=("batch size", "length of the last segment, 1 to 64"),
        dependences=(HIDDEN, TOP),
        classes=(CellClass("A", "layer", 101, "all s, all l"),),
        certificate=Certificate(
            critical_path=f"s0.l0 -> ... -> s0.l{layers - 1} -> s1.l0 -> ... -> s{segments - 1}.l{layers - 1}",
            bound="L*S",
            assumptions=("the Python of the loop does at every segment what it did at the probed ones",),
        ),
        reason="the memory that the last layer makes for one segment is an input of layer 0 of the next",
        cycle=(HIDDEN, TOP),
        location=Location("rmt.py", 88, "forward"),
        remedy="keep a memory in each layer (as ARMT does), which depends on the layer's own past only",
    )
