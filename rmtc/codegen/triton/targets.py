"""GPUs that kernels are compiled for, without one of them at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rmtc.ir.cost import Issue, Machine


@dataclass(frozen=True, eq=False)
class Target:
    """A GPU that kernels are compiled for.

    Attributes:
        name: the name in ``--target``.
        backend, arch, warp: the arguments of Triton's ``GPUTarget``. ``warp`` is the number of lanes of a warp.
        card: the card whose data sheet has the figures.
        shared: bytes of shared memory that a block may have.
        multiprocessors: their number.
        registers: number of registers of 4 bytes of a multiprocessor. For AMD, those of its lanes.
        lanes: threads that a multiprocessor holds at most.
        machine: its roofline.
        instructions: a regular expression of the matrix instructions of its assembly.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    card: str
    shared: int
    multiprocessors: int
    registers: int
    lanes: int
    machine: Machine
    instructions: str


def _machine(
    bandwidth: float, half: float, single: float, issues: float, issue: Issue, descriptors: bool = False
) -> Machine:
    rates: Mapping[torch.dtype, float] = {torch.bfloat16: half, torch.float16: half, torch.float32: single}
    return Machine(bandwidth=bandwidth, products=rates, issues=issues, issue=issue, descriptors=descriptors, own=_OWN)


_OWN = {torch.bfloat16: 0.9, torch.float16: 0.9, torch.float32: 0.93}
"""Assumed until measured on a card: of float32 without tensor cores others have measured 0.9 to 0.97 on an A100
(triton-lang/triton issue 2491, from 1,152 rows on)."""


# Fitted to the machine code of the kernels of ARMT's layers at four sizes, by Triton 3.9 (machine_code.py).
_ISSUED = {  # on sm_80, sm_90 and sm_100
    "tile": (20, 20, 110),
    "persistent": (100, 340, 660),
    "turn": (5, 13, 57),
    "vector": (1.6, 4.6, 9.7),
    "described": (5, 17, 14),
    "matrix": (2.4, 0.59, 0.1),
    "staged": (4.3, 6.8, 18),
    "load": (4.1, 2.7, 7.3),
    "scattered": (4.5, 3.6, 1),
    "simple": (1.1, 1.9, 0.66),
    "row_load": (0.2, 1.1, 0.2),
    "row_scattered": (4.3, 3.4, 3.2),
    "row_simple": (0.14, 0.32, 0.1),
    "place": (0.3, 0.3, 0.3),
    "store": (5.8, 4.3, 0.2),
    "reduced": (2.5, 0.44, 1.3),
    "statistic": (5, 5, 5),
    "division": (3, 3, 3),
    "exponential": (10, 10, 3),
    "sigmoid": (15, 20, 25),
    "score": (1.5, 6.6, 7),
    "weighted": (2.7, 0.5, 3.5),
    "block": (20, 27, 20),
    "queries": (400, 400, 590),
}
_SM_80, _SM_90, _SM_100 = (
    Issue(**dict(zip(_ISSUED, column, strict=True))) for column in zip(*_ISSUED.values(), strict=True)
)

TARGETS: Mapping[str, Target] = {
    each.name: each
    for each in (
        Target(
            "sm_80",
            "cuda",
            80,
            32,
            "A100 SXM 80 GB",
            shared=166_912,
            multiprocessors=108,
            registers=65_536,
            lanes=2048,
            machine=_machine(2.04e12, 3.12e14, 1.95e13, 108 * 4 * 1.41e9, _SM_80),
            instructions=r"mma\.sync",
        ),
        Target(
            "sm_90",
            "cuda",
            90,
            32,
            "H100 SXM",
            shared=232_448,
            multiprocessors=132,
            registers=65_536,
            lanes=2048,
            machine=_machine(3.35e12, 9.89e14, 6.7e13, 132 * 4 * 1.755e9, _SM_90, descriptors=True),
            instructions=r"wgmma\.mma_async|mma\.sync",
        ),
        Target(
            "sm_100",
            "cuda",
            100,
            32,
            "B200",
            shared=232_448,
            multiprocessors=148,
            registers=65_536,
            lanes=2048,
            machine=_machine(8e12, 2.25e15, 8e13, 148 * 4 * 1.85e9, _SM_100, descriptors=True),
            instructions=r"tcgen05\.mma|mma\.sync",
        ),
        Target(
            "gfx942",
            "hip",
            "gfx942",
            64,
            "MI300X",
            shared=65_536,
            multiprocessors=304,
            registers=131_072,
            lanes=2048,
            machine=_machine(5.3e12, 1.307e15, 1.634e14, 304 * 4 * 2.1e9 / 2, _SM_80),  # no machine code was counted
            instructions=r"v_mfma_\w+",
        ),
    )
}
"""By name; peak rates without sparsity, products of float32 without rounding of their factors."""


def target_of(device: torch.device) -> Target | None:
    """Return the target that a device is most like, or None for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    return TARGETS["sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"]
