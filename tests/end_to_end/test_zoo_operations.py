"""What the packages' models allow operation by operation, held against what is known of them."""

from __future__ import annotations

import pytest
from held import some
from zoo import ZOO
from zoo_runs import KEPT, found

pytestmark = pytest.mark.slow

# a and b; for each recurrence its layers by copy, and whether it is affine; layer -1 is a prologue, L an epilogue
EACH_LAYER, ALL = ((0, 0), (1, 1), (2, 2)), ((-1, 3),)
FOUND: dict[str, tuple[int, int, list[tuple[tuple[tuple[int, int], ...], bool]]]] = {
    "block-recurrent, r = w": (1, 1, [(((1, 1),), False)]),
    "infini, delta rule": (1, 1, [(EACH_LAYER, True), (EACH_LAYER, True)]),
    "recurrent memory": (1, 0, [(ALL, False)]),
    "memformer": (3, 1, [(((0, 3),), False)]),
    "transformer_xl": (0, 1, []),
}


@pytest.mark.parametrize("name", some(FOUND, KEPT - {"memformer"}, pytest.mark.full))
def test_operations_of_a_package(name: str) -> None:
    entry, view = ZOO[name], found(name).answer.operations
    assert view is not None
    a, b, recurrences = FOUND[name]
    assert (view.a, view.b) == (a, b)
    assert [(each.layers, each.affine) for each in view.recurrences] == recurrences
    assert view.sequential == (entry.makespan is None)
    assert view.bound <= view.steps
    assert min(view.launches, view.apart) <= view.operations
