"""`prove` against cell graphs enumerated here, against search over (a, b), and against islpy for every S and L."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Sequence
from typing import TypeAlias

import islpy as isl
import networkx as nx
import pytest
import sympy

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import L, S, layer_symbol
from rmtc.passes.schedule.prove import Proof, prove

ell = layer_symbol
Edge = tuple[Cell, Cell]
Entry: TypeAlias = int | sympy.Expr


def dep(ds: Entry, dl: Entry, layers: tuple[Entry, Entry] | None = None, tensor: str = "") -> Dependence:
    return Dependence((ds, dl), tensor=tensor, layers=layers)


UP = dep(0, 1, tensor="hidden")
MEMORY = dep(1, 0, tensor="A")
TOP = dep(1, 1 - L, tensor="m")

# dependences, layers, a, b, makespan, bound, optimal
ACCEPTED = {
    "armt": ([UP, MEMORY], 8, 1, 1, S + L - 1, S + L - 1, True),
    "xl": ([UP, dep(1, 1)], 8, 0, 1, L, L, True),
    "xl, longer": ([UP, dep(1, 1), dep(2, 1)], 8, 0, 1, L, L, True),
    "no memory": ([UP], 8, 0, 1, L, L, True),
    "no layers": ([MEMORY], 8, 1, 0, S, S, True),
    "nothing": ([], 8, 0, 0, sympy.Integer(1), sympy.Integer(1), True),
    "one layer, free": ([UP], 1, 0, 1, L, L, True),
    "no such layer": ([UP, dep(1, -3)], 3, 0, 1, L, L, True),
    "no such layer, backwards": ([UP, dep(-1, 5)], 4, 0, 1, L, L, True),
    "feedback over 1": ([UP, dep(1, -1)], 8, 2, 1, 2 * (S - 1) + L, 2 * (S - 1) + L, True),
    "feedback over 3": ([UP, dep(1, -3)], 8, 4, 1, 4 * (S - 1) + L, 4 * (S - 1) + L, True),
    "feedback, just": ([UP, dep(1, -6)], 8, 7, 1, 7 * (S - 1) + L, 7 * (S - 1) + L, True),
    "all but the top": ([UP, dep(1, 2 - L)], 8, L - 1, 1, (L - 1) * (S - 1) + L, (L - 1) * (S - 1) + L, True),
    "value residual": ([UP, dep(0, ell, (1, L - 1))], 8, 0, 1, L, L, True),
    "value residual, undomained": ([UP, dep(0, ell)], 8, 0, 1, L, L, True),
    "first layer's memory for all": ([UP, dep(1, ell)], 8, 1, 1, S + L - 1, S + L - 1, True),
    "one recurrent layer": ([UP, dep(1, 1), dep(1, 0, (3, 3))], 8, 1, 1, S + L - 1, S + L - 1, True),
    "read below the write": ([UP, dep(1, 1), dep(1, -2, (3, 3))], 8, 3, 1, 3 * S + L - 3, 3 * S + L - 3, True),
    "two kinds of layer": (
        [dep(0, 1, (1, 2)), dep(0, 1, (3, L - 1)), MEMORY],
        8,
        *(1, 1, S + L - 1, S + L - 1, True),
    ),
    "reach 2": ([UP, dep(2, 0)], 8, 1, 1, sympy.floor((S - 1) / 2) + L, sympy.floor((S - 1) / 2) + L, True),
    "reach 2, 1 higher": ([UP, dep(2, -1)], 8, 1, 1, S + L - 1, 2 * sympy.floor((S - 1) / 2) + L, False),
    "reach 2 from the top": (
        [UP, dep(2, 1 - L)],
        8,
        *(sympy.ceiling(L / 2), 1, sympy.ceiling(L / 2) * (S - 1) + L, L * sympy.floor((S - 1) / 2) + L, False),
    ),
    "diagonal only": ([dep(1, 1)], 8, 0, 1, L, sympy.Min(S, L), False),
    "down only": ([dep(1, -2)], 8, 1, 0, S, sympy.Min(S, sympy.floor((L - 1) / 2) + 1), False),
    "zigzag": ([dep(1, 2), dep(1, -1)], 8, 1, 0, S, S, True),
    "two up, one down": (
        [dep(0, 2), dep(1, -1)],
        8,
        *(2, 1, 2 * (S - 1) + L, 3 * sympy.floor((S - 1) / 2) + sympy.floor((L - 1) / 2) + 1, False),
    ),
    "from layer 0 only": ([dep(0, ell)], 8, 0, 1, L, sympy.Integer(2), False),
    "a gap in the layers": ([dep(0, 1, (1, 2)), dep(0, 1, (4, L - 1)), MEMORY], 8, 1, 1, S + L - 1, S, False),
    "mirrored skip": (
        [UP, dep(0, 2 * ell - L + 1, (sympy.ceiling(L / 2), L - 1)), MEMORY],
        8,
        *(1, 1, S + L - 1, S + L - 1, True),
    ),
}

# dependences, layers, cycle, words of the reason
REFUSED = {
    "rmt": ([UP, TOP], 8, [UP] * 7 + [TOP], "nothing beats the sequential order"),
    "rmt, layer 0 named": ([UP, dep(1, 1 - L, (0, 0))], 3, None, "nothing beats the sequential order"),
    "memformer": ([UP, dep(1, ell - L)], 4, None, "nothing beats the sequential order"),
    "rmt among others": ([MEMORY, UP, dep(1, -1), TOP], 5, [UP] * 4 + [TOP], "nothing beats"),
    "all layers, as numbers": ([UP, dep(1, -3)], 4, None, "nothing beats the sequential order"),
    "one layer": ([MEMORY], 1, [MEMORY], "one layer"),
    "one layer, with (0, 1)": ([UP, MEMORY], 1, [MEMORY], "one layer"),
    "one layer, rmt": ([UP, TOP], 1, [TOP], "one layer"),
    "reach 2, two layers": ([UP, dep(2, -L)], 2, None, "no schedule a*s + b*l with integer a, b"),
    "backwards": ([UP, dep(-1, 1)], 8, None, "a segment wait for a later one"),
    "backwards, alone": ([dep(-1, 1)], 8, None, "a segment wait for a later one"),
    "itself": ([UP, dep(0, 0)], 8, None, "a cell wait for itself"),
    "down within a segment": ([UP, dep(0, -1)], 8, [UP, dep(0, -1)], "a higher one of the same segment"),
    "down, alone": ([dep(0, -2)], 8, None, "a higher one of the same segment"),
    "down at one end": ([UP, dep(0, ell - 2)], 8, None, "a higher one of the same segment"),
}


@functools.cache
def number(entry: Entry, layers: int, layer: int) -> int:
    return entry if isinstance(entry, int) else int(entry.subs({L: layers, ell: layer}))


@functools.cache
def edges(dependences: tuple[Dependence, ...], segments: int, layers: int) -> tuple[Edge, ...]:
    """Every pair (producer, consumer) of a grid. A distance in L or l names layer L, the epilogue, at every layer."""
    found = []
    for dependence, s, layer in itertools.product(dependences, range(segments), range(layers)):
        entries = (*dependence.distance, *(dependence.layers or (0, layers - 1)))
        ds, dl, first, last = (number(entry, layers, layer) for entry in entries)
        varies = not all(isinstance(entry, int) for entry in dependence.distance)
        named = {each - number(dependence.distance[1], layers, each) for each in range(first, last + 1)} == {layers}
        named |= dependence.distance[1] == -L
        source = Cell(s - ds, layer - dl)
        inside = 0 <= source.segment < segments and 0 <= source.layer < layers + (varies and named)
        if first <= layer <= last and inside and not (varies and source == (s, layer)):
            found.append((source, Cell(s, layer)))
    return tuple(found)


@functools.cache
def graph(dependences: tuple[Dependence, ...], segments: int, layers: int) -> nx.DiGraph:
    """The graph of the cells proper: what waits for an epilogue waits for the last layer."""
    result = nx.DiGraph()
    result.add_nodes_from(Cell(s, layer) for s in range(segments) for layer in range(layers))
    for at, to in edges(dependences, segments, layers):
        result.add_edge(Cell(at.segment, min(at.layer, layers - 1)), to)
    return result


@functools.cache
def longest(dependences: tuple[Dependence, ...], segments: int, layers: int) -> int:
    return int(nx.dag_longest_path_length(graph(dependences, segments, layers))) + 1


def value(expression: Entry, segments: int, layers: int) -> int:
    return int(sympy.sympify(expression).subs({S: segments, L: layers}))


def legal(dependences: Sequence[Dependence], a: int, b: int, layers: int, segments: int = 5) -> bool:
    """Whether every producer runs in an earlier step, an epilogue one step of b after the last layer."""
    pairs = edges(tuple(dependences), segments, layers)
    return all(a * (to.segment - at.segment) + b * (to.layer - at.layer) >= 1 for at, to in pairs)


def check_path(proof: Proof, dependences: Sequence[Dependence], segments: int, layers: int) -> int:
    """The number of cells of the critical path, after every link was found among the edges."""
    assert proof.path is not None
    cells = proof.path.cells(segments, layers)
    links = graph(tuple(dependences), segments, layers)
    assert set(cells) <= set(links.nodes)
    assert all(links.has_edge(at, to) for at, to in itertools.pairwise(cells))
    assert len(cells) == proof.path.count(segments, layers) == value(proof.path.length, segments, layers)
    return len(cells)


@pytest.mark.parametrize("name", ACCEPTED)
def test_table(name: str) -> None:
    dependences, layers, a, b, makespan, bound, optimal = ACCEPTED[name]
    proof = prove(dependences, layers)
    assert proof.reason is None
    assert proof.cycle == ()
    assert (proof.a, proof.b) == (a, b)
    assert sympy.expand(proof.makespan - makespan) == 0
    assert proof.path is not None
    assert sympy.expand(proof.path.length - bound) == 0
    assert proof.certificate.optimal is optimal
    assert sympy.expand(sympy.sympify(proof.certificate.bound, locals={"S": S, "L": L}) - bound) == 0
    assert [item.dependence for item in proof.certificate.inequalities] == list(dependences)
    assert proof.certificate.assumptions == ()


@pytest.mark.parametrize("name", ACCEPTED)
def test_table_by_enumeration(name: str) -> None:
    dependences, layers, *_ = ACCEPTED[name]
    proof = prove(dependences, layers)
    assert proof.a is not None
    assert proof.b is not None
    assert proof.path is not None
    depths = [layers] if name == "mirrored skip" else [1, 2, 3] if name == "no such layer" else [*range(1, 6), layers]
    gaps = []
    for segments, depth in itertools.product(range(1, 6), depths):
        schedule = proof.schedule(depth, segments)
        assert schedule is not None
        for at, to in edges(tuple(dependences), segments, depth):
            assert schedule.time(at) < schedule.time(to), f"{at} -> {to} at L = {depth}"
        steps = value(proof.makespan, segments, depth)
        assert steps == 1 + schedule.time(Cell(segments - 1, depth - 1))
        if depth >= proof.path.least:
            path = longest(tuple(dependences), segments, depth)
            assert check_path(proof, dependences, segments, depth) <= path <= steps
            gaps.append(steps - path)
    assert (max(gaps) == 0) is proof.certificate.optimal


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    dependences, layers, cycle, words = REFUSED[name]
    proof = prove(dependences, layers)
    assert (proof.a, proof.b) == (None, None)
    assert proof.makespan == S * L
    assert words in str(proof.reason)
    assert proof.cycle
    assert set(proof.cycle) <= set(dependences)
    assert cycle is None or list(proof.cycle) == cycle
    if "not executable" in str(proof.reason) or "no instance" in str(proof.reason):
        return
    for a, b in itertools.product(range(13), range(4)):
        if legal(dependences, a, b, layers):
            assert all(a * (n - 1) + b * (layers - 1) + 1 >= n * layers for n in range(2, 9)), (a, b)
    assert not legal(dependences, 0, 1, layers)
    forced = all(longest(tuple(dependences), n, layers) == n * layers for n in range(1, 6))
    assert proof.certificate.optimal is forced
    assert ("no schedule a*s" in str(proof.reason)) is not forced


@pytest.mark.parametrize(
    "name", ["rmt", "rmt, layer 0 named", "rmt among others", "all layers, as numbers", "memformer"]
)
def test_cycle_closes(name: str) -> None:
    """Round the cycle: every cell of a segment, then layer 0 of the next."""
    dependences, layers, *_ = REFUSED[name]
    proof = prove(dependences, layers)
    here, visited = Cell(0, 0), [Cell(0, 0)]
    for dependence in proof.cycle:
        # (1, l - L) reads the epilogue, which follows the last layer's cell
        after = [to for at, to in edges((dependence,), 3, layers) if (at.segment, min(at.layer, layers - 1)) == here]
        here = min(after, key=lambda to: to.layer)
        visited.append(here)
    assert visited == [*(Cell(0, layer) for layer in range(layers)), Cell(1, 0)]
    assert check_path(proof, dependences, 4, layers) == 4 * layers


@pytest.mark.parametrize(
    ("dependences", "layers", "slacks", "path"),
    [
        (
            [UP, MEMORY],
            4,
            ["1*0 + 1*1 = 1", "1*1 + 1*0 = 1"],
            "s0.l0 -> s1.l0 -> ... -> s(S-1).l0 -> ... -> s(S-1).l(L-1)",
        ),
        (
            [UP, dep(1, -2)],
            8,
            ["3*0 + 1*1 = 1", "3*1 + 1*-2 = 1"],
            "s0.l0 -> s0.l1 -> s0.l2 -> s1.l0 -> ... -> s(S-1).l0 -> ... -> s(S-1).l(L-1) (L >= 3)",
        ),
        (
            [UP, TOP],
            4,
            ["L*0 + 1*1 = 1", "L*1 + 1*(1 - L) = 1"],
            "s0.l0 -> ... -> s0.l(L-1) -> s1.l0 -> ... -> s(S-1).l0 -> ... -> s(S-1).l(L-1)",
        ),
        (
            [UP, dep(0, ell, (1, L - 1))],
            4,
            ["0*0 + 1*1 = 1", "0*0 + 1*1 = 1 at l = 1"],
            "s0.l0 -> s0.l1 -> ... -> s0.l(L-1)",
        ),
        (
            [UP, dep(2, 0)],
            4,
            ["1*0 + 1*1 = 1", "1*floor(2/2) + 1*0 = 1"],
            "s0.l0 -> s2.l0 -> ... -> s(2*floor((S-1)/2)).l0 -> ... -> s(2*floor((S-1)/2)).l(L-1)",
        ),
    ],
    ids=["armt", "feedback", "rmt", "value residual", "reach 2"],
)
def test_certificate_text(dependences: list[Dependence], layers: int, slacks: list[str], path: str) -> None:
    certificate = prove(dependences, layers).certificate
    assert [item.slack for item in certificate.inequalities] == slacks
    assert certificate.critical_path == path


def test_strips_reach_what_an_integer_a_loses() -> None:
    """(0, 1), (2, 0) at S = 6, L = 4: 6 steps, and 9 with one segment after another."""
    proof = prove([UP, dep(2, 0)], 4)
    assert proof.path is not None
    whole = proof.schedule(4, 6, whole=True)
    assert whole is not None and value(whole.makespan, 6, 4) == 9
    assert value(proof.makespan, 6, 4) == 6
    assert value(proof.path.length, 6, 4) == longest((UP, dep(2, 0)), 6, 4) == 6
    assert proof.certificate.optimal


def test_one_layer_that_reads_two_segments_back_has_a_schedule() -> None:
    proof = prove([dep(2, 0)], 1)
    schedule = proof.schedule(1, 9)
    assert schedule is not None and (schedule.strip, len(schedule.steps())) == (2, 5)
    assert prove([dep(1, 0)], 1).reason is not None


@pytest.mark.slow
def test_order_of_dependences_does_not_matter() -> None:
    dependences = [UP, dep(1, 1), dep(1, -2), dep(2, -1), dep(0, ell), MEMORY]
    proofs = [prove(order, 8) for order in itertools.permutations(dependences)]
    assert {(proof.a, proof.b, proof.certificate.bound) for proof in proofs} == {(3, 1, str(L + 3 * S - 3))}


def random_set(generator: random.Random) -> list[Dependence]:
    pairs = [
        (generator.choice([0, 1, 1, 1, 2, 3]), generator.choice([-4, -3, -2, -1, 0, 0, 1, 1, 2, 3]))
        for _ in range(generator.randint(1, 4))
    ]
    legal_pairs = [pair for pair in pairs if pair > (0, 0)]
    if generator.random() < 0.8:
        pairs = legal_pairs
    return [dep(ds, dl) for ds, dl in dict.fromkeys(([(0, 1)] if generator.random() < 0.6 else []) + pairs)]


@pytest.mark.slow
def test_random_sets() -> None:
    generator, layers, many = random.Random(7), 5, 40
    accepted, optima, orders = 0, 0, 0
    for _ in range(150):
        dependences = random_set(generator)
        proof = prove(dependences, layers)
        text = ", ".join(map(str, dependences))
        if any(dependence.distance <= (0, 0) for dependence in dependences):
            assert "not executable" in str(proof.reason), text
            orders += 1
            continue
        found = {
            (a, b): a * (many - 1) + b * (layers - 1) + 1
            for a, b in itertools.product(range(9), range(4))
            if legal(dependences, a, b, layers)
        }
        best = min(found.values())
        assert (proof.reason is None) is (best < many * layers) or proof.strips is not None, text
        sizes = list(itertools.product(range(1, 8), range(2, 7)))
        if proof.a is None or proof.b is None:
            forced = all(longest(tuple(dependences), n, layers) == n * layers for n in (1, 2, 5))
            assert forced is proof.certificate.optimal, text
            continue
        accepted += 1
        whole = proof.schedule(layers, many, whole=True)
        assert whole is not None
        assert found[int(proof.a), int(proof.b)] == best == value(whole.makespan, many, layers), text
        assert proof.strips is None or value(proof.makespan, many, layers) < best, text
        assert proof.path is not None
        gaps = []
        for segments, depth in sizes:
            path = longest(tuple(dependences), segments, depth)
            if depth >= proof.path.least:
                steps = value(proof.makespan, segments, depth)
                assert check_path(proof, dependences, segments, depth) <= path <= steps, text
                gaps.append(steps - path)
        assert (max(gaps) == 0) is proof.certificate.optimal, text
        optima += proof.certificate.optimal
    assert min(accepted, optima, accepted - optima, orders, 150 - orders - accepted) >= 5


def random_varying(generator: random.Random, layers: int) -> Dependence:
    """A dependence whose distance or domain has l or L in it; it has an instance at ``layers``."""
    while True:
        dl = generator.choice([0, 1, 1, 2, -1]) * ell + generator.choice([0, 0, 1, -1]) * L + generator.randint(-2, 2)
        first, last = generator.choice([(0, L - 1), (1, L - 1), (2, 3), (0, 0), (L - 1, L - 1), (1, L - 2)])
        made = dep(generator.choice([0, 1, 1, 2, ell]), dl, (first, last))
        reads = [to.layer for _, to in edges((made,), 2 * layers, layers)]
        if reads:
            return made


@pytest.mark.slow
def test_random_distances_in_layers() -> None:
    """At the model's L: legal on every edge, refused only if no smaller a is, and never a smaller a accepted."""
    generator, layers, seen = random.Random(11), 6, {"accepted": 0, "order": 0, "sequential": 0}
    for _ in range(200):
        dependences = [UP, *(random_varying(generator, layers) for _ in range(generator.randint(1, 2)))]
        proof = prove(dependences, layers)
        text = ", ".join(f"{item} for {item.layers}" for item in dependences)
        pairs = [(to.segment - at.segment, to.layer - at.layer) for at, to in edges(tuple(dependences), 9, layers)]
        if "not executable" in str(proof.reason):
            assert min(pairs) <= (0, 0), text
            seen["order"] += 1
            continue
        assert min(pairs) > (0, 0), text
        least = next(a for a in range(20) if all(a * ds + dl >= 1 for ds, dl in pairs))
        if proof.a is None:
            assert least >= layers, text
            seen["sequential"] += 1
            continue
        seen["accepted"] += 1
        assert value(proof.a, 1, layers) == least, text
        assert proof.path is not None
        for segments in range(1, 7):
            path = longest(tuple(dependences), segments, layers)
            steps = value(proof.makespan, segments, layers)
            assert check_path(proof, dependences, segments, layers) <= path <= steps, text
            assert not proof.certificate.optimal or path == steps, text
    assert min(seen.values()) >= 5


# islpy: symbolic S and L


def relation(dependence: Dependence, layers: int | None = None) -> isl.Map:
    """The instances, consumer -> producer, for every S and L."""
    ds, dl = dependence.distance
    first, last = dependence.layers or (0, L - 1)
    return isl.Map(
        f"[S, L] -> {{ [s, l] -> [p, q] : 0 <= s < S and 0 <= l < L and 0 <= p and 0 <= q < L and p = s - ({ds}) "
        f"and q = l - ({dl}) and {first} <= l <= {last} and (p != s or q != l)"
        + (f" and L = {layers} }}" if layers else " }")
    )


def violated(dependences: Sequence[Dependence], a: int, b: int, layers: int | None = None) -> isl.Map:
    """The instances whose producer does not run in an earlier step."""
    late = isl.Map(f"[S, L] -> {{ [s, l] -> [p, q] : {a}*s + {b}*l <= {a}*p + {b}*q }}")
    empty = isl.Map("[S, L] -> { [s, l] -> [p, q] : false }")
    for dependence in dependences:
        empty = empty.union(relation(dependence, layers).intersect(late))
    return empty


NOT_AFFINE = ("all but the top", "reach 2 from the top", "mirrored skip")
OF_THIS_DEPTH = ("no such layer", "no such layer, backwards")
AFFINE = [name for name in ACCEPTED if name not in (*NOT_AFFINE, *OF_THIS_DEPTH)]


@pytest.mark.parametrize("name", AFFINE)
def test_legal_for_every_size(name: str) -> None:
    dependences, layers, a, b, *_ = ACCEPTED[name]
    proof = prove(dependences, layers)
    assert (proof.a, proof.b) == (a, b)
    assert not any(relation(dependence).is_empty() for dependence in dependences)
    assert violated(dependences, a, b).is_empty()
    if a:
        assert not violated(dependences, a - 1, b).is_empty()
    if b:
        assert not violated(dependences, a, b - 1).is_empty()


@pytest.mark.parametrize("name", NOT_AFFINE[:2])
def test_legal_for_fixed_layers_where_a_has_layers(name: str) -> None:
    dependences, layers, *_ = ACCEPTED[name]
    proof = prove(dependences, layers)
    assert proof.a is not None
    for depth in range(2, 8):
        a = value(proof.a, 1, depth)
        assert violated(dependences, a, 1, depth).is_empty()
        assert a == 1 or not violated(dependences, a - 1, 1, depth).is_empty()


def test_sequential_for_every_size() -> None:
    """RMT: no number is a legal a for every L; for a given L exactly a >= L is, which is the sequential order."""
    for a, b in itertools.product(range(7), range(4)):
        assert not violated([UP, TOP], a, b).is_empty()
    for depth in range(2, 7):
        assert violated([UP, TOP], depth, 1, depth).is_empty()
        assert not violated([UP, TOP], depth - 1, 1, depth).is_empty()


def test_illegal_schedules_are_found() -> None:
    assert violated([UP, MEMORY], 1, 1).is_empty()
    bad = violated([UP, MEMORY, dep(1, -1)], 1, 1)
    assert not bad.is_empty()
    assert bad.is_equal(relation(dep(1, -1)))
    assert not violated([UP], 1, 0).is_empty()
    assert not violated([UP, dep(-1, 1)], 1, 1).intersect_params(isl.Set("[S, L] -> { : S = 2 and L = 2 }")).is_empty()


# input


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        prove([UP], 0)
    with pytest.raises(ValueError, match="symbols L and l"):
        prove([dep(1, sympy.Symbol("n"))], 4)
    with pytest.raises(ValueError, match="not whole"):
        prove([dep(1, sympy.sqrt(ell + 2))], 4)


def test_a_distance_that_is_not_affine_is_read_at_the_models_layers() -> None:
    half = prove([UP, dep(1, -sympy.floor(L / 2))], 8)
    assert (half.a, half.b, half.certificate.optimal) == (5, 1, True)
    assert check_path(half, [UP, dep(1, -4)], 4, 8) == value(half.makespan, 4, 8)
    dilated = dep(2**ell, 0)
    proof = prove([UP, dilated], 4)
    assert (proof.a, proof.b) == (1, 1)
    assert proof.certificate.inequalities[1].slack.endswith("for L = 4")
    assert proof.path is not None
    with pytest.raises(ValueError, match="needs L = 4"):
        proof.path.cells(3, 5)


def test_one_layer_where_a_distance_in_layers_becomes_a_memory() -> None:
    """(1, L - 1) of one layer is (1, 0); of more it points below and costs nothing."""
    upwards = [UP, dep(1, L - 1)]
    assert str(prove(upwards, 1).reason).startswith("one layer")
    assert (prove(upwards, 2).a, prove(upwards, 2).b) == (0, 1)


def test_too_few_layers_for_the_path() -> None:
    proof = prove([UP, dep(1, -3)], 8)
    assert proof.path is not None
    with pytest.raises(ValueError, match="needs L >= 4"):
        proof.path.cells(3, 3)


def test_fast() -> None:
    dependences = [UP, MEMORY, dep(1, 1), dep(0, ell), dep(1, -2), dep(1, ell - L)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        prove(dependences, 16)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
