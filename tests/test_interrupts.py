"""Interrupts wherever they arrive, see interrupts.py: 60 places drawn by seed."""

from __future__ import annotations

import interrupts
import pytest


@pytest.mark.slow
def test_an_interrupt_leaves_the_model_and_all_later_results_as_they_were() -> None:
    results = {}
    for group in interrupts.drawn(60, seed=0):
        results.update(zip(group, interrupts.attempts(group), strict=True))
    wrong = {place: result for place, result in results.items() if result not in interrupts.FINE}
    assert not wrong
    assert sum(result == "as before" for result in results.values()) >= 50
