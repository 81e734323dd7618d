"""What holds for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# On tensors as small as these a second thread only waits for its turn; the tests themselves run side by side.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start

# Where operations as written are said to take a millisecond, a schedule is always worth it, as tests of them want it.
os.environ.setdefault("RMTC_COST_MODEL", str(Path(__file__).parent / "costs" / "steps.json"))
