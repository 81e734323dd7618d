"""Loops over segments: how operands of the part after the loop are printed."""

from __future__ import annotations

import pytest

from rmtc.ir.segment_loop import Where


@pytest.mark.parametrize(("segment", "number"), [(0, 4), (1, 5), (2, 9), (7, 9), (-1, 9), (-2, 9), (-4, 9)])
def test_a_value_of_one_segment_has_the_number_of_its_row(segment: int, number: int) -> None:
    """Of two first segments and all later ones, of which the last ones are."""
    assert str(Where(segment, (4, 5, 9))) == f"s[{segment}].%{number}"
