"""GPUs that kernels are compiled for, without one of them at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rmtc.passes.bodies.fusion_groups import Machine


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
        descriptors: whether it reads tiles by tensor descriptors.
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
    descriptors: bool


def _machine(bandwidth: float, half: float, single: float, pointwise: float, launch: float = 4e-6) -> Machine:
    rates: Mapping[torch.dtype, float] = {torch.bfloat16: half, torch.float16: half, torch.float32: single}
    return Machine(launch=launch, bandwidth=bandwidth, products=rates, pointwise=pointwise, own=_OWN)


_OWN = {torch.bfloat16: 0.9, torch.float16: 0.9, torch.float32: 0.93}
"""Assumed until measured on a card: of float32 without tensor cores others have measured 0.9 to 0.97 on an A100
(triton-lang/triton issue 2491, from 1,152 rows on)."""


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
            machine=_machine(2.04e12, 3.12e14, 1.95e13, 1.95e13),
            instructions=r"mma\.sync",
            descriptors=False,
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
            machine=_machine(3.35e12, 9.89e14, 6.7e13, 6.7e13),
            instructions=r"wgmma\.mma_async|mma\.sync",
            descriptors=True,
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
            machine=_machine(8e12, 2.25e15, 8e13, 8e13),
            instructions=r"tcgen05\.mma|mma\.sync",
            descriptors=True,
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
            machine=_machine(5.3e12, 1.307e15, 1.634e14, 8.17e13),
            instructions=r"v_mfma_\w+",
            descriptors=False,
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
