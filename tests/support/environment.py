"""The variables that tests run with: set before torch is imported, which imports Triton where it was built for GPUs."""

from __future__ import annotations

import os
from pathlib import Path

SET = {
    # For the commands that tests start.
    "OMP_NUM_THREADS": "1",
    # Kernels in Triton are interpreted, which Triton is told when it is imported; they are compiled in other processes.
    "TRITON_INTERPRET": "1",
    # No test is to find what another one has left; tests of the cache turn it on, in folders of their own.
    "RMTC_CACHE": "0",
    # Where operations as written are said to take a millisecond, a schedule is always worth it, as tests want it.
    "RMTC_COST_MODEL": str(Path(__file__).parent / "costs" / "steps.json"),
}

for name, value in SET.items():
    os.environ.setdefault(name, value)
