"""Runs benchmarks/gpu.py without a GPU: kernels are compiled for an H100, and a driver stands in that launches nothing.

python stub_gpu.py [OPTIONS OF gpu.py]

So what a kernel should write is whatever was in memory: the backend `triton` gives wrong results, and is found to.
"""

from __future__ import annotations

import sys
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

gpu: Any = import_module("gpu")

gpu.SHAPES["toy"] = {"layers": 3, "width": 256, "heads": 4, "kv_heads": 2, "intermediate": 512}
"""Large enough for the kernels of large products, with descriptors."""


def items(toy: bool, repeats: int) -> list[Any]:
    """One item of each kind that kernels have a part in, in bfloat16."""
    case = gpu.Case("toy", 112, 448, memory=16)
    pairs = (
        ("machine", ""),
        ("correct", "triton"),
        ("kernels", "triton"),
        ("time", "rmtc triton"),
        ("time", "ceiling"),
    )
    return [gpu.Item(kind, case, way, "bfloat16", repeats) for kind, way in pairs]


gpu.items = items


class _Utils:
    """What Triton asks of a driver about a device and its binaries."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        memory = {"max_shared_mem": 232_448, "max_num_regs": 65_536, "mem_clock_rate": 1, "mem_bus_width": 1}
        return {**memory, "multiprocessor_count": 132, "warpSize": 32, "sm_clock_rate": 1}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, module: int) -> None:
        """There is none."""


class Launcher:
    """Launches nothing, but takes the memory that a kernel asks for."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.scratch = getattr(metadata, "global_scratch_size", 0)
        self.align = getattr(metadata, "global_scratch_align", 1)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any, **kwargs: Any) -> None:
        if self.scratch:
            from triton.runtime import _allocation

            _allocation._allocator.get()(x * y * z * self.scratch, self.align, stream)


class Driver:
    """A driver of Triton's for an H100 that is not there."""

    utils = _Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


def stand_in() -> None:
    """Have Triton compile for an H100, launch nothing, and take whatever is in memory for the results."""
    import triton

    from rmtc.codegen.triton.targets import TARGETS
    from rmtc.runtime import triton as runtime

    triton.runtime.driver.set_active(Driver())
    runtime.Triton.target = lambda self, device: TARGETS["sm_90"]  # type: ignore[method-assign]
    runtime._hold_against = lambda *results: None


def work(link: Connection, toy: bool) -> None:
    """Measure with the driver in place of a card's."""
    import torch

    gpu_items: Any = import_module("gpu_items")

    def init(card: Any, toy: bool) -> None:
        card.toy, card.device = toy, torch.device("cpu")

    stand_in()
    gpu_items.Card = type("Card", (gpu_items.Card,), {"__init__": init, "name": "no card"})
    gpu_items.serve(link, toy)


if __name__ == "__main__":
    gpu.main(["--toy", *sys.argv[1:]], work)
