"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rmtc.runtime.executor import Executor, Run

# On tensors as small as these a second thread only waits for its turn; the tests themselves run side by side.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start

# Where operations as written are said to take a millisecond, a schedule is always worth it, as tests of them want it.
os.environ.setdefault("RMTC_COST_MODEL", str(Path(__file__).parent / "costs" / "steps.json"))


@pytest.fixture(autouse=True)
def every_run_is_held_against_the_next(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs runs again, then in memory that stays, and gives the same."""
    once = Executor.run

    def run(
        self: Executor, values: Mapping[str, torch.Tensor], segments: int, batch: int, tail: int
    ) -> tuple[dict[str, Any], Run]:
        seed = torch.get_rng_state()
        first, _ = once(self, values, segments, batch, tail)
        after = torch.get_rng_state()
        torch.set_rng_state(seed)
        second, done = once(self, values, segments, batch, tail)
        assert torch.equal(after, torch.get_rng_state())
        assert first.keys() == second.keys()
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(second[name], value, equal_nan=True)
                assert second[name].stride() == value.stride(), name
        return second, done

    monkeypatch.setattr(Executor, "run", run)
    yield
