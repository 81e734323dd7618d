"""Integers in symbols: what is simplified is what it was, for all values of its symbols."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from rmtc.affine import Affine, Quotient, Remainder, Symbol, Variable, fitted, solved


def value(index: Affine, at: dict[Variable, int]) -> int:
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
        product = int(factor)
        for each in atoms:
            product *= atom(each)
        total += product
    return total


@pytest.mark.parametrize("seed", range(40))
def test_arithmetic_is_that_of_integers(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 5) for _ in range(3)]
    lengths = [Affine.of(Symbol(size) if draw.random() < 0.5 else size) for size in sizes]
    variables = [Variable(f"v{n}", length) for n, length in enumerate(lengths)]
    points = [dict(zip(variables, each, strict=True)) for each in itertools.product(*map(range, sizes))]
    known = [(Affine.of(each), [point[each] for point in points]) for each in variables]
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
    T, b, t = Affine.of(Symbol(7)), Variable("b", Affine.of(3)), Variable("t", Affine.of(Symbol(7)))
    flat = Affine.of(b) * T + Affine.of(t)
    assert (flat // T, flat % T) == (Affine.of(b), Affine.of(t))
    assert (flat * 4 + 3) // 4 == flat and (flat * 4 + 3) % 4 == Affine.of(3)
    assert flat.at({b: Affine.of(2)}) == T * 2 + Affine.of(t)
    assert Affine.of(t) - 3 + 3 == Affine.of(t) and (Affine.of(t) - 3).least == -3


def test_a_size_that_depends_on_a_symbol_by_a_quotient_is_not_fixed() -> None:
    size = Affine.of(Symbol(5))
    assert not size.fixed and not (size // 2).fixed and not (size % 3).fixed and not (2 * (size // 2) + 1).fixed
    assert Affine.of(7).fixed


def test_sizes_by_name_print_and_are_given_later() -> None:
    s, T, B = (Affine.of(name) for name in "sTB")
    assert str(s * 4 + T - 1) == "4*s + T - 1" and str(B * T + B) == "B*T + B" and str(Affine()) == "0"
    assert (s * 4 + T - 1).number(s=2, T=3) == 10
    assert (s * 4 + B * T).fix(s=2, T=3) == B * 3 + 8 and (s * 4 + T).fix(s=2, T=3) == 11
    assert (s * Fraction(1, 2) + 1).factor("s") == Fraction(1, 2) and (s + 3).factor() == 3
    assert (s - s + 2).integer == 2 and s.integer is None and Affine.of(Fraction(1, 2)).integer is None
    with pytest.raises(ValueError, match="s has no range"):
        _ = s // 2


def test_a_fit_is_the_only_sum_with_whole_factors() -> None:
    T = Affine.of("T")
    assert fitted([("T",), ()], [(2, 1), (5, 1), (7, 1)], [5, 11, 15]) == T * 2 + 1
    assert fitted([("T",), ()], [(2, 1), (2, 1)], [5, 5]) is None  # more than one goes through the samples
    assert fitted([("T",)], [(2,), (4,)], [1, 2]) is None  # half of T
    assert fitted([("T",)], [(2,), (4,)], [2, 5]) is None


def test_equations_have_one_solution_many_or_none() -> None:
    assert solved([(1, 1, 3), (1, -1, 2)]) == [Fraction(5, 2), Fraction(1, 2)]
    assert solved([(1, 2, 1, 4), (0, 0, 2, 2)]) == [3, None, 1]
    assert solved([(1, 1, 3), (2, 2, 5)]) is None
