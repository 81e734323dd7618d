"""Where operations are placed: groups of what layers do alike, the pace between segments, and the ends."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch

from rmtc.errors import CaptureError, Location
from rmtc.ir.program import Op, Origin
from rmtc.ir.segment_loop import Row
from rmtc.passes.fold.placement import Placement, in_turn, rising_subsequence

aten = torch.ops.aten
LAYERS = 3


class Each(NamedTuple):
    """An operation: its name, what it reads (``a`` of this segment, ``a'`` of the one before), its layer if known."""

    name: str
    kind: str
    reads: str = ""
    layer: int | None = None


def graph(row: Sequence[Each], lines: bool = False) -> tuple[list[Op], list[list[Row]], dict[int, int]]:
    """Return the operations, what they read and the anchors. A letter is a line of code, or each operation."""
    number = {each.name: i for i, each in enumerate(row)}
    reads = [[Row(name.count("'"), number[name.rstrip("'")]) for name in each.reads.split()] for each in row]
    ops = [
        Op(getattr(aten, each.kind).default, tuple(read), Origin(Location("", i if lines else ord(each.name[0]))))
        for i, (each, read) in enumerate(zip(row, reads, strict=True))
    ]
    return ops, reads, {i: each.layer for i, each in enumerate(row) if each.layer is not None}


def placed(row: Sequence[Each], lines: bool = False) -> dict[str, int]:
    ops, reads, anchors = graph(row, lines)
    templates = [("w.{l}",) if i in anchors else () for i in range(len(ops))]
    found = Placement(ops, reads, {}, anchors, templates, LAYERS).layer
    return {each.name: layer for each, layer in zip(row, found, strict=True)}


def stack(*layer: Each, first: str = "x") -> list[Each]:
    """Layers that are alike: ``b`` is the hidden state of the layer below, and ``*`` the number of a layer."""
    row = [Each("x", "sin")]
    for n in range(LAYERS):
        below = first if n == 0 else f"h{n - 1}"
        for each in layer:
            reads = " ".join(below if name == "b" else name.replace("*", str(n)) for name in each.reads.split())
            known = None if each.layer is None else n
            row.append(each._replace(name=f"{each.name}{n}", reads=reads, layer=known))
    return row


MAP = Each("m", "exp", "b", 0)


def test_what_a_layer_does_behind_its_parameters_is_its_own() -> None:
    found = placed([*stack(MAP, Each("h", "tanh", "m*")), Each("y", "cos", "h2")])
    assert found == {"x": -1, "m0": 0, "h0": 0, "m1": 1, "h1": 1, "m2": 2, "h2": 2, "y": 3}


def test_layers_that_are_written_out_are_alike() -> None:
    row = [*stack(Each("n", "tanh", "b"), Each("m", "exp", "n*", 0), Each("h", "cos", "m*")), Each("y", "tan", "h2")]
    assert placed(row, lines=True) == placed(row)
    assert [placed(row)[f"n{n}"] for n in range(LAYERS)] == [placed(row)[f"h{n}"] for n in range(LAYERS)] == [0, 1, 2]


def test_what_a_layer_does_ahead_of_its_parameters_is_its_own() -> None:
    found = placed([*stack(Each("n", "tanh", "b"), Each("h", "exp", "n*", 0)), Each("y", "tanh", "h2")])
    assert [found[f"n{n}"] for n in range(LAYERS)] == [0, 1, 2] and found["y"] == LAYERS


def test_a_norm_ahead_of_each_layer_and_one_behind_all_are_where_they_are_needed() -> None:
    row = stack(Each("n", "tanh", "b"), Each("p", "cos", "n*"), Each("m", "exp", "p*", 0), Each("h", "add", "b m*"))
    found = placed([*row, Each("n3", "tanh", "h2"), Each("p3", "cos", "n3")])
    assert [found[f"p{n}"] for n in range(LAYERS + 1)] == [0, 1, 2, 3]
    assert [found[f"n{n}"] for n in range(LAYERS + 1)] == [0, 1, 2, 3]


def test_what_ends_some_layers_stays_in_them() -> None:
    """The first two layers of four end with a sum that the others do not have."""
    row = [Each("x", "sin"), Each("m0", "exp", "x", 0), Each("h0", "add", "x m0"), Each("m1", "exp", "h0", 1)]
    row += [Each("h1", "add", "h0 m1"), Each("k2", "exp", "h1", 2), Each("k3", "exp", "k2", 3)]
    ops, reads, anchors = graph(row)
    templates = [(f"{each.name[0]}.{{l}}",) if i in anchors else () for i, each in enumerate(row)]
    layer = Placement(ops, reads, {}, anchors, templates, 4).layer
    assert [layer[2], layer[4]] == [0, 1]


def test_a_memory_is_in_the_layer_that_reads_it() -> None:
    write = Each("w", "cos", "h* w*'")
    found = placed(stack(MAP, Each("h", "add", "m* w*'"), write))
    assert [found[f"w{n}"] for n in range(LAYERS)] == [0, 1, 2]
    # Also one that is written behind all layers.
    row = stack(MAP, Each("h", "add", "m* w*'"), write)
    row.sort(key=lambda each: each.name.startswith("w"))
    assert placed(row) == found


def test_a_memory_of_the_layer_below_is_written_there() -> None:
    """Then all segments of a layer run at once: the pace is 0."""
    row = [*stack(Each("q", "cat", "b b'"), Each("h", "exp", "q*", 0)), Each("y", "cos", "h2")]
    row = [each._replace(reads=f"x v{each.name[1]}'") if each.kind == "cat" else each for each in row]
    for n in range(LAYERS):  # a view that the layer takes of its input
        at = next(i for i, each in enumerate(row) if each.name == f"q{n}")
        below = "x" if n == 0 else f"h{n - 1}"
        row[at] = row[at]._replace(reads=f"{below} v{n}'")
        row.insert(at, Each(f"v{n}", "abs", below))
    found = placed(row)
    assert [found[f"v{n}"] for n in range(LAYERS)] == [-1, 0, 1]
    assert [found[f"q{n}"] for n in range(LAYERS)] == [0, 1, 2]


def test_no_layer_is_torn_for_a_pace_of_0() -> None:
    """Attention over keys of earlier segments could run with the next layer; it stays where the keys are made."""
    found = placed(stack(MAP, Each("k", "cos", "m*"), Each("h", "add", "m* k* k*'")))
    assert [found[f"h{n}"] for n in range(LAYERS)] == [0, 1, 2]


def test_a_pace_of_1_may_move_what_reads_a_higher_layer() -> None:
    row = stack(MAP, Each("h", "add", "m*"))
    row = [
        each._replace(reads=f"{each.reads} m{min(2, int(each.name[1]) + 1)}'") if each.name[0] == "h" else each
        for each in row
    ]
    assert placed(row) == {"x": -1, "m0": 0, "h0": 1, "m1": 1, "h1": 2, "m2": 2, "h2": 3}


def test_sums_over_layers_and_segments_are_behind_the_layers() -> None:
    row = [Each("x", "sin")]
    for n in range(LAYERS):
        below, total = ("x", f"t{LAYERS - 1}'") if n == 0 else (f"h{n - 1}", f"t{n - 1}")
        row += [Each(f"h{n}", "exp", below, n), Each(f"c{n}", "cos", f"h{n}"), Each(f"t{n}", "add", f"{total} c{n}")]
    found = placed(row)
    assert [found[f"c{n}"] for n in range(LAYERS)] == [0, 1, 2]
    assert [found[f"t{n}"] for n in range(LAYERS)] == [LAYERS] * LAYERS


def test_what_one_layer_alone_needs_of_the_text_waits_for_it() -> None:
    row = [*stack(MAP, Each("h", "add", "m*")), Each("e", "abs", "x"), Each("y", "mul", "e h2")]
    assert placed(row)["e"] == LAYERS


def test_a_loss_that_all_layers_but_the_last_add_to_is_behind_them() -> None:
    row = [Each("x", "sin")]
    for n in range(LAYERS):
        row += [Each(f"h{n}", "exp", "x" if n == 0 else f"h{n - 1}", n)]
        if n < LAYERS - 1:
            row += [Each(f"c{n}", "cos", f"h{n}"), Each(f"t{n}", "add", f"a' c{n}" if n == 0 else f"t{n - 1} c{n}")]
    found = placed([*row, Each("e", "abs", "h2"), Each("a", "add", "t1 e")])
    assert (found["c0"], found["c1"]) == (0, 1)
    assert found["t0"] == found["t1"] == LAYERS


def test_memories_that_are_handed_around_are_no_chain_of_layers() -> None:
    """Each layer reads the memory of the next one, and the last that of the first."""
    row = stack(MAP, Each("h", "add", "m* w*'"), Each("w", "cos", "h*"))
    turned = {"h0": "m0 w1'", "h1": "m1 w2'", "h2": "m2 w0'"}
    found = placed([each._replace(reads=turned.get(each.name, each.reads)) for each in row])
    assert [found[f"h{n}"] for n in range(LAYERS)] == [found[f"w{n}"] for n in range(LAYERS)] == [0, 1, 2]


def test_what_only_looks_alike_does_not_move_a_layer() -> None:
    """What is added to the text before the first layer is no hidden state, though it is added in the same way."""
    row = [
        Each("t", "sin"),
        Each("x", "add", "t t"),
        *stack(MAP, Each("h", "add", "b m*"), Each("w", "cos", "h* w*'"))[1:],
    ]
    row = [each._replace(reads=f"{each.reads} w{each.name[1]}'") if each.name[0] == "m" else each for each in row]
    found = placed(row)
    assert [found[f"h{n}"] for n in range(LAYERS)] == [found[f"w{n}"] for n in range(LAYERS)] == [0, 1, 2]


def test_one_of_several_results_is_where_they_are_made() -> None:
    ops, reads, anchors = graph(
        [Each("x", "sin"), Each("m", "exp", "x", 0), Each("t", "cos", "m"), Each("z", "exp", "t", 1)]
    )
    ops.append(Op(operator.getitem, (Row(0, 2), 1)))
    found = Placement(ops, [*reads, [Row(0, 2)]], {}, anchors, [()] * len(ops), 2)
    assert found.layer[4] == found.layer[2]


def test_each_layer_runs_in_the_order_of_the_middle_one() -> None:
    row = stack(MAP, Each("c", "cos", "m*"), Each("s", "sin", "m*"), Each("h", "add", "c* s*"))
    at = next(i for i, each in enumerate(row) if each.name == "c2")
    row[at], row[at + 1] = row[at + 1], row[at]
    ops, reads, anchors = graph(row)
    templates = [("w.{l}",) if i in anchors else () for i in range(len(ops))]
    order, layout = Placement(ops, reads, {}, anchors, templates, LAYERS).arranged(range(len(ops)))
    names = [row[i].name[0] for i in order]
    assert [names[begin:end] for begin, end in layout.layers] == [["m", "c", "s", "h"]] * LAYERS


@pytest.mark.parametrize("seed", range(40))
def test_every_placement_is_legal(seed: int) -> None:
    """Drawn rows: nothing is below what it reads, anchors stay, and whole groups are as far apart as their layers."""
    draw = random.Random(seed)
    row: list[Each] = [Each("x", "sin")]
    for n in range(LAYERS):
        row.append(Each(f"a{n}", "exp", row[-1].name, n))
        for k in range(draw.randint(1, 4)):
            known = [each.name for each in row]
            reads = [draw.choice(known[-6:])] + [draw.choice(known) for _ in range(draw.randint(0, 2))]
            row.append(Each(f"b{n}{k}", draw.choice(["cos", "tanh", "add", "mul"]), " ".join(reads)))
    every = [each.name for each in row]
    row = [
        each._replace(reads=f"{each.reads} {draw.choice(every)}'")
        if each.layer is None and each.name != "x" and draw.random() < 0.4
        else each
        for each in row
    ]
    found = placed(row)
    for each in row:
        if each.layer is not None:
            assert found[each.name] == each.layer
        for name in each.reads.split():
            assert name.endswith("'") or found[name] <= found[each.name]
        assert -1 <= found[each.name] <= LAYERS


def test_uses_out_of_turn_are_dropped_and_layers_that_interleave_refused() -> None:
    row = [Each("a", "exp", "", 0), Each("b", "exp", "a", 1), Each("c", "exp", "b", 2), Each("d", "exp", "c", 1)]
    ops, _, anchors = graph(row)
    names = {0: ("w.0",), 1: ("w.1",), 2: ("w.2",), 3: ("v.2",)}
    assert in_turn(ops, names, anchors | {3: 2}) == {0: 0, 1: 1, 2: 2, 3: 2}
    twice = {0: ("w.0",), 1: ("w.1",), 2: ("w.2",), 3: ("w.1",)}
    assert in_turn(ops, twice, anchors) == {0: 0, 1: 1, 2: 2}
    with pytest.raises(CaptureError, match="layer 1 runs here out of turn"):
        in_turn(ops[:2], {0: ("w.1",), 1: ("w.0",)}, {0: 1, 1: 0})


def test_a_rising_subsequence_is_heaviest() -> None:
    generator = random.Random(0)
    for _ in range(60):
        values = generator.choices(range(4), k=generator.randint(0, 9))
        weights = [Fraction(1, generator.randint(1, 3)) for _ in values]
        every = [places for n in range(len(values) + 1) for places in itertools.combinations(range(len(values)), n)]

        def worth(places: Sequence[int], values: list[int] = values, weights: list[Fraction] = weights) -> Any:
            return sum(weights[place] for place in places), len({values[place] for place in places})

        found = rising_subsequence(values, weights)
        assert found == sorted(set(found))
        assert [values[place] for place in found] == sorted(values[place] for place in found)
        rising = [p for p in every if all(values[a] <= values[b] for a, b in itertools.pairwise(p))]
        assert worth(found) == max(map(worth, rising))
