"""An oracle that shares nothing with rmtc: one cell's output is changed at run time, and what else changes is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from casts import Float32CastsAsFloat64
from drawn import Cell, Choices, Probe, build, edges, probing, text_of
from torch import Tensor, nn

from rmtc.analysis import analyze
from rmtc.examples import armt_llama
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.passes.fold.dependences import cell_reads

SEGMENTS = 4

BASE = Choices(layers=3, kinds=("mlp",))
MODELS = {
    "own memory": BASE,
    "own memory, added up": replace(BASE, accumulate=True, state="attribute", branch=True),
    "no norm, read before": replace(BASE, kinds=("bare",), read="early", parameters="stacked"),
    "attention, read after": replace(BASE, kinds=("attention",), read="late", parameters="lists"),
    "from one layer higher": replace(BASE, dl=-1),
    "from two layers higher, in a buffer": replace(BASE, layers=4, dl=-2, state="buffer"),
    "from one layer lower": replace(BASE, dl=1, parameters="function", container="dict"),
    "top to all": replace(BASE, source="top"),
    "bottom to all": replace(BASE, source="bottom", kinds=("bare", "attention")),
    "within the segment": replace(BASE, layers=4, ds=0, dl=2),
    "two segments old": replace(BASE, ds=2, container="named tuple"),
    "one buffer, in place": replace(BASE, state="shared", in_place=True, accumulate=True),
    "deferred": replace(BASE, state="attribute", deferred=True, dl=1),
    "layers outside": replace(BASE, order="layers", branch=True),
}


def changed(run: Callable[[Probe], None], cells: list[Cell]) -> dict[Cell, set[Cell]]:
    """For each cell, those that give something else when its output is changed."""
    plain = Probe()
    run(plain)
    assert sorted(plain.seen) == cells
    found: dict[Cell, set[Cell]] = {}
    for cell in cells:
        probe = Probe(cell)
        run(probe)
        found[cell] = {
            other
            for other in cells
            if other != cell and not all(map(torch.equal, plain.seen[other], probe.seen[other]))
        }
    return found


def reached(graph: nx.DiGraph) -> dict[Cell, set[Cell]]:
    """For each cell, those that wait for it."""
    return {tuple(cell): {tuple(other) for other in nx.descendants(graph, cell)} for cell in graph}


def cell_graph(loop: SegmentLoop) -> nx.DiGraph:
    """The cells of the unrolled loop, with what they read."""
    graph: nx.DiGraph = nx.DiGraph((each.producer, each.consumer) for each in cell_reads(loop, SEGMENTS))
    graph.add_nodes_from((s, layer) for s in range(SEGMENTS) for layer in range(loop.layers))
    return graph


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_a_cell_changes_is_what_the_graph_says(name: str) -> None:
    choices = MODELS[name]
    assert choices == choices.possible()
    call, owner = build(choices)
    text = text_of(choices, SEGMENTS, choices.batch, choices.tail)

    def run(probe: Probe) -> None:
        fresh = copy.deepcopy(owner)
        with probing(probe):
            (fresh.call if choices.parameters == "function" else fresh)(text)

    cells = [(s, layer) for s in range(SEGMENTS) for layer in range(choices.layers)]
    seen = changed(run, cells)
    assert seen == reached(nx.DiGraph([*edges(choices, SEGMENTS)]))  # what it was built to do
    proven = analyze(call, (text,), {}).proven
    assert proven is not None and proven.loop.layers == choices.layers
    assert reached(cell_graph(proven.loop)) == seen


@torch.no_grad()
def test_what_a_cell_of_an_armt_changes_is_what_the_graph_says() -> None:
    sizes: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2, "segment": 4, "memory": 2, "key_size": 4}
    model, arguments = armt_llama.build(**sizes, segments=SEGMENTS, dtype="float64")
    proven = analyze(model, arguments, {}).proven

    def run(probe: Probe) -> None:
        handles = []
        layers: Any = model.model.layers
        for number, layer in enumerate(layers):

            def hook(module: nn.Module, args: Any, output: Tensor, number: int = number) -> Tensor:
                return probe.output(number, output)

            handles.append(layer.layer.register_forward_hook(hook))
        try:
            model(*arguments)
        finally:
            for handle in handles:
                handle.remove()

    with Float32CastsAsFloat64():
        seen = changed(run, [(s, layer) for s in range(SEGMENTS) for layer in range(3)])
    assert proven is not None
    assert reached(cell_graph(proven.loop)) == seen
    assert seen[1, 1] == {(s, layer) for s in range(1, SEGMENTS) for layer in (1, 2)} - {(1, 1)}
