"""How many bytes the results of operations hold at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Live"]


class Live(TorchDispatchMode):
    """The most bytes that the results of operations hold at once, but for views of what was there before."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._given:
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: each for key, each in self._held.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result
