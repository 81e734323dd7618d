"""Indices: what is simplified is what it was, for all values of its variables."""

from __future__ import annotations

import itertools
import random

import pytest

from rmtc.ir.index import Index, Quotient, Remainder, Symbol, Variable


def value(index: Index, at: dict[Variable, int]) -> int:
    """By Python's integers."""

    def atom(each: object) -> int:
        if isinstance(each, Symbol):
            return each.value
        if isinstance(each, Variable):
            return at[each]
        assert isinstance(each, (Quotient, Remainder))
        of, by = value(each.of, at), value(each.by, at)
        return of // by if isinstance(each, Quotient) else of % by

    total = 0
    for atoms, factor in index.terms:
        for each in atoms:
            factor *= atom(each)
        total += factor
    return total


@pytest.mark.parametrize("seed", range(40))
def test_arithmetic_is_that_of_integers(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 5) for _ in range(3)]
    lengths = [Index.of(Symbol(size) if draw.random() < 0.5 else size) for size in sizes]
    variables = [Variable(f"v{n}", length) for n, length in enumerate(lengths)]
    points = [dict(zip(variables, each, strict=True)) for each in itertools.product(*map(range, sizes))]
    known = [(Index.of(each), [point[each] for point in points]) for each in variables]
    known += [(length, [size] * len(points)) for length, size in zip(lengths, sizes, strict=True)]
    for _ in range(12):
        (one, a), (other, b) = draw.choice(known), draw.choice(known)
        kind = draw.choice(["add", "mul", "floordiv", "mod"])
        if kind == "add":
            known.append((one + other, [x + y for x, y in zip(a, b, strict=True)]))
        elif kind == "mul":
            known.append((one * other, [x * y for x, y in zip(a, b, strict=True)]))
        else:
            by = draw.choice(lengths)
            divided = [(x // by.value, x % by.value) for x in a]
            quotients, remainders = ([each[place] for each in divided] for place in range(2))
            known.append((one // by, quotients) if kind == "floordiv" else (one % by, remainders))
    for index, wanted in known:
        assert [value(index, point) for point in points] == wanted, str(index)
        assert index.least <= min(wanted) and max(wanted) <= index.most


def test_what_is_put_together_comes_apart() -> None:
    T, b, t = Index.of(Symbol(7)), Variable("b", Index.of(3)), Variable("t", Index.of(Symbol(7)))
    flat = Index.of(b) * T + Index.of(t)
    assert (flat // T, flat % T) == (Index.of(b), Index.of(t))
    assert (flat * 4 + 3) // 4 == flat and (flat * 4 + 3) % 4 == Index.of(3)
    assert flat.at({b: Index.of(2)}) == T * 2 + Index.of(t)
    assert Index.of(t) - 3 + 3 == Index.of(t) and (Index.of(t) - 3).least == -3


def test_a_size_that_depends_on_a_symbol_by_a_quotient_is_not_fixed() -> None:
    size = Index.of(Symbol(5))
    assert not size.fixed and not (size // 2).fixed and not (size % 3).fixed and not (2 * (size // 2) + 1).fixed
    assert Index.of(7).fixed
