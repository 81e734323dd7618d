"""Times of operations against cycles enumerated by networkx, shifts tried one by one, and operations written out."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import networkx as nx
import pytest
from folded import Spelled, broken, drawn, drawn_times, spell
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtc.errors import VerifyError
from rmtc.ir.folded import Times
from rmtc.ir.formula import S
from rmtc.passes.schedule.check_moments import check_moments
from rmtc.passes.schedule.longest_chain import lasting_chain, longest_chain
from rmtc.passes.schedule.operations_view import operations_view
from rmtc.passes.schedule.retime import retime, retime_with

X, M, H = 0, 1, 2  # of a layer: its output, its memory, something between


def layered(layers: int, *reads: tuple[int, int, int, int | str], vertices: int = 3) -> Spelled:
    return spell(layers, [range(layers)] * vertices, *reads)


def updated(layers: int) -> Spelled:
    """An updater after the last layer, read by every layer of the next segment."""
    return spell(layers, [range(layers), [layers]], (X, X, 0, 1), (X, M, 0, 1), (M, X, 1, "all"))


def one_recurrent(layers: int) -> Spelled:
    """A state in the middle layer, whose read and write are vertices of their own."""
    return spell(layers, [range(layers), [layers // 2]], (X, X, 0, 1), (X, M, 0, 0), (M, X, 1, 0))


# operations for L layers; steps for S segments; whether the bound is the same
NAMED: dict[str, tuple[Callable[[int], Spelled], Callable[[int, int], int], bool]] = {
    "written from the output": (
        lambda L: layered(L, (X, X, 0, 1), (X, M, 0, 0), (M, X, 1, 0)),
        *(lambda S, L: S + L - 1, True),
    ),
    "written from the input, with a sum": (
        lambda L: layered(L, (X, X, 0, 1), (M, X, 0, 0), (X, M, 0, 1), (M, M, 1, 0)),
        *(lambda S, L: S + L - 1, True),
    ),
    "hidden states cached": (lambda L: layered(L, (X, X, 0, 1), (X, X, 1, 1)), lambda S, L: L, True),
    "keys cached, made from hidden states": (
        lambda L: layered(L, (X, X, 0, 1), (X, M, 0, 1), (M, X, 0, 0), (M, X, 1, 0)),
        *(lambda S, L: L, True),
    ),
    "read from 1 higher": (
        lambda L: layered(L, (X, X, 0, 1), (X, X, 1, -1)),
        *(lambda S, L: 2 * (S - 1) + L if L > 1 else 1, True),
    ),
    "read from 2 higher": (
        lambda L: layered(L, (X, X, 0, 1), (X, X, 1, -2)),
        *(lambda S, L: 3 * (S - 1) + L if L > 2 else L, True),
    ),
    "one recurrent layer": (one_recurrent, lambda S, L: S + L - 1, True),
    "up and down by a segment": (
        lambda L: layered(L, (X, M, 0, 0), (M, X, 1, 1), (M, X, 1, -1)),
        *(lambda S, L: S if L > 1 else 1, True),
    ),
    "up by a segment": (lambda L: layered(L, (X, M, 0, 0), (M, X, 1, 1)), lambda S, L: L, False),
    "no recurrence": (lambda L: layered(L, (X, M, 0, 1), (X, M, 1, 1)), lambda S, L: 1, True),
    "top to bottom": (lambda L: layered(L, (X, X, 0, 1), (X, X, 1, 1 - L)), lambda S, L: S * L, True),
    "an updater after the last layer": (updated, lambda S, L: S * L, False),
    "two segments back": (lambda L: layered(L, (X, X, 0, 1), (X, X, 2, 0)), lambda S, L: S + L - 1, False),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_graphs_for_all_small_sizes(name: str) -> None:
    build, steps, tight = NAMED[name]
    for layers in range(1, 9):
        spelled = build(layers)
        graph = spelled.graph()
        times = retime(graph).times
        assert times is not None
        assert broken(graph, times) is None
        for segments in range(1, 13):
            check_moments(*spelled.written_out(segments, times))
            assert times.makespan(graph, segments) == steps(segments, layers)
            bound = longest_chain(graph, times.order, segments).steps
            assert bound == steps(segments, layers) if tight else bound <= steps(segments, layers)
            length, lasting = times.length(graph), lasting_chain(graph, times.order)
            assert lasting is not None
            assert length[0].subs(S, segments) == steps(segments, layers) or segments < length[1] <= 2
            assert lasting.steps.subs(S, segments) == bound or not tight or segments < lasting.since <= 2


def test_what_waits_for_itself_has_no_times() -> None:
    spelled = layered(3, (X, M, 0, 0), (M, X, 0, 0))
    found = retime(spelled.graph())
    assert found.times is None
    assert [(edge.producer, edge.consumer) for edge in found.cycle] in ([(X, M), (M, X)], [(M, X), (X, M)])
    with pytest.raises(ValueError, match="waits for itself or for a later segment"):
        longest_chain(spelled.graph(), (0, 1, 2), 3)


def test_the_text_of_times() -> None:
    domains = [range(4), range(4), range(1, 4)]
    graph = spell(4, domains, (X, X, 0, 1), (X, M, 0, 0), (M, H, 0, 1), (H, H, 1, 0)).graph()
    assert retime(graph).text(graph).splitlines() == [
        "s + l + c_v, c_v from -1 to 0",
        "  c = -1: all of K2",
        "forced by v2 -> v2 (1, 0) t3",
    ]
    cyclic = layered(3, (X, M, 0, 0), (M, X, 0, 0)).graph()
    assert retime(cyclic).text(cyclic).startswith("no times: v")


def test_the_cycle_that_forces_a_is_a_cycle_and_asks_for_it() -> None:
    graph = layered(8, (X, H, 0, 1), (H, X, 0, 0), (X, M, 0, 0), (M, H, 1, -2), (X, M, 1, 0)).graph()
    found = retime(graph)
    assert found.times is not None
    assert (found.times.a, found.times.b) == (3, 1)
    for edge, following in zip(found.cycle, (*found.cycle[1:], found.cycle[0]), strict=True):
        assert edge.consumer == following.producer
    assert "t3" in [edge.dependence.tensor for edge in found.cycle]
    assert sum(edge.ds for edge in found.cycle) == 1
    assert 2 + sum(edge.dl for edge in found.cycle) < 1


DISTANCES = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, -1), (2, -1)]


def small() -> Iterator[Spelled]:
    """Every graph of two operations in two layers with up to three reads."""
    all_reads = [
        (made, read, *distance)
        for made, read in itertools.product(range(2), repeat=2)
        for distance in DISTANCES
        if distance != (0, 0) or made < read
    ]
    for count in range(4):
        for reads in itertools.combinations(all_reads, count):
            yield spell(2, [range(2)] * 2, *reads)


def least_a(spelled: Spelled, b: int) -> int | None:
    """From all simple cycles, one by one; None if no a will do."""
    graph: nx.MultiDiGraph = nx.MultiDiGraph()
    for made, read, ds, pairs in spelled.reads:
        graph.add_edge(made, read, ds=ds, dl=min(target - source for source, target in pairs))
    least = 0
    for nodes in nx.simple_cycles(nx.DiGraph(graph)):
        hops = [graph[u][v].values() for u, v in zip(nodes, (*nodes[1:], nodes[0]), strict=True)]
        for hop in itertools.product(*hops):
            ds, dl = sum(each["ds"] for each in hop), sum(each["dl"] for each in hop)
            if ds == 0 and b * dl < 1:
                return None
            while least * ds + b * dl < 1:
                least += 1
    return least


def fewest_steps(spelled: Spelled, a: int, b: int) -> int | None:
    """Steps at three segments with the best of all shifts and orders; None if none is legal."""
    reads = [(made, read, a * ds + b * (c - p)) for made, read, ds, pairs in spelled.reads for p, c in pairs]
    best = None
    for shift, order in itertools.product(range(-6, 7), ((0, 1), (1, 0))):
        shifts = (0, shift)
        if all((gain + shifts[read], order[read]) > (shifts[made], order[made]) for made, read, gain in reads):
            steps = [a * s + b * layer + each for s in range(3) for layer in range(2) for each in shifts]
            best = min(best or 99, max(steps) - min(steps) + 1)
    return best


@pytest.mark.slow
def test_every_small_graph() -> None:
    for spelled in small():
        graph = spelled.graph()
        for b in (0, 1):
            times = retime_with(graph, b).times
            assert (times.a if times else None) == least_a(spelled, b), spelled
            if times is not None:
                assert broken(graph, times) is None
                check_moments(*spelled.written_out(3, times))
                steps = times.makespan(graph, 3)
                assert steps == fewest_steps(spelled, times.a, b)
                assert longest_chain(graph, times.order, 3).steps <= steps
                assert times.a == 0 or fewest_steps(spelled, times.a - 1, b) is None


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5))
def test_drawn_graphs(rng: random.Random, segments: int) -> None:
    spelled = drawn(rng)
    graph = spelled.graph()
    for b in (0, 1):
        times = retime_with(graph, b).times
        assert (times.a if times else None) == least_a(spelled, b)
        if times is not None:
            assert broken(graph, times) is None
            check_moments(*spelled.written_out(segments, times))
            bound, lasting = longest_chain(graph, times.order, segments), lasting_chain(graph, times.order)
            assert lasting is None or segments < lasting.since or lasting.steps.subs(S, segments) <= bound.steps
            length, since = times.length(graph)
            assert all(length.subs(S, s) == times.makespan(graph, s) for s in range(since, since + 5))
            assert bound.steps <= times.makespan(graph, segments)
            assert bound.steps == chain_by_search(spelled, times.order, segments)
            for earlier, later in itertools.pairwise(bound.chain):
                read = spelled.before(segments)[later.cell.segment, later.cell.layer, later.vertex]
                assert (earlier.cell.segment, earlier.cell.layer, earlier.vertex) in read


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 30))
def test_a_long_call_has_the_bound_of_a_formula(rng: random.Random, segments: int) -> None:
    graph = drawn(rng).graph()
    found = retime(graph)
    if found.times is None:
        return
    exact = longest_chain(graph, found.times.order, segments).steps
    with pytest.MonkeyPatch.context() as patch:
        counted = operations_view(graph, found, segments)
        patch.setattr("rmtc.heuristics.OPERATIONS_COUNTED", 0)
        long = operations_view(graph, found, segments)
    assert counted is not None and long is not None
    assert counted.bound == exact
    assert long.bound <= exact
    assert replace(long, bound=exact) == counted


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_verdict_does_not_depend_on_the_layer_that_an_operation_is_filed_in(rng: random.Random) -> None:
    spelled = drawn(rng)
    moved = rng.randrange(len(spelled.domains))
    up = rng.choice([-1, 1, 2])

    def at(vertex: int, layer: int) -> int:
        return layer + up * (vertex == moved)

    other = Spelled(
        spelled.layers,
        tuple(tuple(at(v, layer) for layer in layers) for v, layers in enumerate(spelled.domains)),
        tuple(
            (made, read, ds, tuple((at(made, source), at(read, target)) for source, target in pairs))
            for made, read, ds, pairs in spelled.reads
        ),
    )
    first, second = retime(spelled.graph()).times, retime(other.graph()).times
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert (first.a, first.b) == (second.a, second.b)
        for segments in (1, 4):
            assert first.launches(spelled.graph(), segments) == second.launches(other.graph(), segments)
            assert first.makespan(spelled.graph(), segments) == second.makespan(other.graph(), segments)


def chain_by_search(spelled: Spelled, order: tuple[int, ...], segments: int) -> int:
    """Steps until all is done, when each step runs all that can run, in that order."""
    before = spelled.before(segments)
    step: dict[tuple[int, int, int], int] = {}
    now = 0
    while len(step) < len(before):
        now += 1
        for vertex in sorted(range(len(order)), key=order.__getitem__):
            ready = [at for at in before if at[2] == vertex and at not in step and all(e in step for e in before[at])]
            step.update(dict.fromkeys(ready, now))
    return max(step.values(), default=0)


def test_prover_and_checker_accept_the_same_times() -> None:
    rng = random.Random(5)
    legal = illegal = 0
    while legal + illegal < 10_000:
        spelled = drawn(rng)
        graph = spelled.graph()
        found = retime(graph).times
        for _ in range(4):
            times = drawn_times(rng, len(spelled.domains))
            if found is not None and rng.random() < 0.8:  # near legal ones it is close
                times = rng.choice([replace(found, shifts=times.shifts), replace(times, a=found.a, b=found.b), found])
            try:
                check_moments(*spelled.written_out(3, times))
            except VerifyError:
                assert broken(graph, times) is not None, (spelled, times)
                illegal += 1
            else:
                assert broken(graph, times) is None, (spelled, times)
                legal += 1
    assert min(legal, illegal) > 1000


def test_the_checker_wants_one_kind_of_operation_at_once() -> None:
    spelled = layered(2, vertices=2)
    with pytest.raises(VerifyError, match="at once with a"):
        check_moments(*spelled.written_out(2, Times(0, 1, (0, 0), (0, 0))))


def test_eighty_layers_written_out_take_less_than_a_second() -> None:
    body = 60
    reads: list[tuple[int, int, int, int | str]] = []
    for layer in range(80):
        first = layer * body
        reads += [(v - 1, v, 0, 0) for v in range(first + 1, first + body)]
        reads += [(first + body - 1, first + 3, 1, 0)]
        reads += [(first - 1, first, 0, 1)] if layer else []
    spelled = spell(80, [[v // body] for v in range(80 * body)], *reads)
    graph = spelled.graph()
    start = time.perf_counter()
    times = retime(graph).times
    assert time.perf_counter() - start < 1
    assert times is not None
    assert times.a == 1
