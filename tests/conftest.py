"""What holds for all tests."""

from __future__ import annotations

import os

import torch

# On tensors as small as these a second thread only waits for its turn; the tests themselves run side by side.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
