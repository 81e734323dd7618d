"""Bodies cut into kernels: how many launches, what is computed where, and what no kernel may hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emissions import emissions
from held import one_in

from rmtc.affine import Affine
from rmtc.codegen.triton.emit import grouped_body
from rmtc.codegen.triton.source import source_of
from rmtc.codegen.triton.style import Style
from rmtc.examples import armt_gpt2, armt_llama
from rmtc.ir.array import Array, Nest, Outside, Pointwise, Product, Reduction, Stored, View, base_of
from rmtc.ir.cost import Machine
from rmtc.ir.kernel import Attend, Kernel, build, loads
from rmtc.ir.terms import IllegalError
from rmtc.passes.bodies.fusion_groups import Groups, fusion_groups, kind_of, read_by


def stored(name: str, *shape: int) -> Stored:
    return Stored(name, tuple(map(Affine.of, shape)), torch.float32, True, ())


def pointwise(name: str, function: str, *args: Any) -> Pointwise:
    sizes = max((each.sizes for each in args if isinstance(each, Array)), key=len)
    return Pointwise(name, sizes, torch.float32, True, (), function, args, torch.float32)


def product(name: str, left: Array, right: Array) -> Product:
    return Product(name, (*left.sizes[:-1], right.sizes[-1]), torch.float32, True, (), left, right)


def total(name: str, source: Array, dim: int) -> Reduction:
    sizes = tuple(size for n, size in enumerate(source.sizes) if n != dim)
    return Reduction(name, sizes, torch.float32, True, (), "sum", source, (dim,), False, torch.float32)


def cut(arrays: Sequence[Array], *results: Array) -> list[Any]:
    return list(groups_of(arrays, *results).groups)


def groups_of(arrays: Sequence[Array], *results: Array) -> Groups:
    nest = Nest("body", tuple(arrays), {each.name: each for each in arrays if isinstance(each, Stored)}, results)
    return fusion_groups(nest, lambda view: False, Machine())


@pytest.mark.parametrize("build_model", one_in(2, [armt_llama.build, armt_gpt2.build]))
@pytest.mark.slow
def test_an_armt_is_ten_launches_and_nothing_is_left_to_torch(build_model: Any) -> None:
    for given in emissions(build_model):
        options = {name: value for name, value in given.items() if name not in ("bind", "target")}
        body = grouped_body(**options)
        assert len(body.groups) == len(body.launches) <= 10
        written = [array for launch in body.launches.values() for array in launch.kernel.written]
        assert len(set(written)) == len(written), "nothing is written twice"
        there: set[Array] = {each for each in body.nest.arrays if isinstance(each, Stored)}
        for group in body.groups:
            assert read_by(group) <= there, "what is read was written before"
            there |= set() if isinstance(group, Outside) else set(group.written)
        assert {base_of(each) for each in body.nest.results} <= there
        texts = [[launch.source.text for launch in made.launches.values()] for made in (body, grouped_body(**options))]
        assert texts[0] == texts[1]


def test_what_surrounds_a_product_is_a_part_of_its_kernel() -> None:
    x, w, y = stored("x", 64, 32), stored("w", 32, 48), stored("y", 64, 48)
    square = pointwise("square", "mul", x, x)
    scale = pointwise("scale", "rsqrt", total("sum", square, 1))
    column = View("column", (*scale.sizes, Affine.of(1)), scale.dtype, True, (), scale, lambda index: index[:-1], None)
    left = pointwise("left", "mul", x, column)
    found = product("found", left, w)
    gated = pointwise("gated", "mul", pointwise("silu", "silu", found), y)
    (kernel,) = cut([x, w, y, square, *scale.reads, scale, column, left, found, gated.reads[0], gated], gated)
    assert isinstance(kernel, Kernel) and [len(stage.accumulators) for stage in kernel.stages] == [0, 1]
    text = source_of(kernel, "k", Style()).text
    assert text.count("tl.dot(") == 1 and "tl.rsqrt" in text and "tl.sigmoid" in text


def test_a_product_of_a_product_is_two_launches() -> None:
    x, v, w = stored("x", 64, 32), stored("v", 32, 32), stored("w", 32, 48)
    one = product("one", x, v)
    other = product("other", one, w)
    groups = groups_of([x, v, w, one, other], other)
    assert [group.written for group in groups.groups if not isinstance(group, Outside)] == [(one,), (other,)]
    assert str(groups).splitlines() == [
        "body: 2 launches",
        "  0: product  one of v, x",
        "  1: product  other of w, one",
    ]
    with pytest.raises(IllegalError):
        build([other], lambda array: isinstance(array, Stored))


def test_a_sum_over_rows_of_what_is_summed_up_for_each_is_two_launches() -> None:
    x = stored("x", 64, 32)
    rows = total("rows", pointwise("square", "mul", x, x), 1)
    weight = View("weight", (*rows.sizes, Affine.of(1)), rows.dtype, True, (), rows, lambda index: index[:-1], None)
    scaled = pointwise("scaled", "mul", x, weight)
    columns = total("columns", scaled, 0)
    found = cut([x, rows.source, rows, weight, scaled, columns], columns)
    assert [group.written for group in found] == [(rows,), (columns,)]


def test_kernels_over_the_same_rows_are_one() -> None:
    x, w = stored("x", 64, 32), stored("w", 32, 48)
    found = product("found", x, w)
    rows = total("rows", pointwise("square", "mul", x, x), 1)
    (kernel,) = cut([x, w, found, rows.source, rows], found, rows)
    assert set(kernel.written) == {found, rows}


def test_one_array_at_its_own_index_is_loaded_once() -> None:
    x, y = stored("x", 8, 16), stored("y", 8, 16)
    found = pointwise("found", "add", pointwise("sum", "add", x, y), pointwise("product", "mul", x, y))
    (kernel,) = cut([x, y, *found.reads, found], found)
    assert isinstance(kernel, Kernel)
    assert Counter(load.array.name for load in loads(kernel)) == {"x": 1, "y": 1}


@pytest.mark.slow
def test_attention_takes_rotations_in() -> None:
    kinds = []
    for given in emissions(armt_llama.build):
        options = {name: value for name, value in given.items() if name not in ("bind", "target")}
        kinds += [group for group in grouped_body(**options).groups if isinstance(group, Attend)]
    assert kinds and all("rotated" in source_of(each, "k", Style()).name for each in kinds)


def test_a_library_multiplies_where_that_takes_less() -> None:
    """Of two products one is all that is asked for; of the other, memory costs more than a library may gain."""

    def kinds(own: float, depth: int) -> list[str]:
        a, x, y, w = stored("a", 999, depth), stored("x", 4096, depth), stored("y", 4096, 512), stored("w", depth, 512)
        alone, inner = product("alone", a, w), product("inner", x, w)
        result = pointwise("result", "mul", inner, y)
        nest = Nest(
            "body", (a, x, y, w, alone, inner, result), {each.name: each for each in (a, x, y, w)}, (alone, result)
        )
        machine = Machine(products={torch.float32: 6e13}, own={torch.float32: own})
        return sorted(kind_of(group) for group in fusion_groups(nest, lambda view: False, machine).groups)

    assert kinds(1.0, 4096) == ["product", "product"]
    assert kinds(0.9, 512) == ["library", "product"]
    assert kinds(0.2, 512) == ["library", "library", "rows"]
