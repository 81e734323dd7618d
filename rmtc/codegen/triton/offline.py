"""Kernels compiled for a GPU that need not be there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmtc.codegen.triton.configs import FILE
from rmtc.codegen.triton.launch import KernelLaunch, Printed, jitted
from rmtc.codegen.triton.targets import Target
from rmtc.errors import RmtcError, failures
from rmtc.ir.array import Array
from rmtc.passes.bodies.fusion_groups import work

_TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


class OfflineError(RmtcError):
    """An error of a kernel that cannot be compiled here."""

    title = "not compiled"


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for a target.

    Attributes:
        launch, printed, target: the kernel, as it was printed, and the target.
        assembly: PTX or AMDGCN.
        code: what the card loads.
        registers: registers of a thread, or None where no tool tells.
        spilled: bytes of a thread that are kept in memory for lack of registers, or None where no tool tells.
        shared: bytes of shared memory of a block.
        instructions: number of matrix instructions of each kind in its assembly.
        moved, operations: bytes, and floating-point operations of products, of a launch.
        cells: number of cells of that launch.
    """

    launch: KernelLaunch
    printed: Printed
    target: Target
    assembly: str
    code: bytes
    registers: int | None
    spilled: int | None
    shared: int
    instructions: Mapping[str, int]
    moved: float
    operations: float
    cells: int

    @property
    def fits(self) -> bool:
        """True if the target has that much shared memory, and nothing was spilled."""
        return self.shared <= self.target.shared and not self.spilled

    @property
    def occupancy(self) -> float | None:
        """The share of a multiprocessor's threads that run at once, by registers and shared memory."""
        if self.registers is None:
            return None
        threads = self.printed.config.warps * self.target.warp
        blocks = self.target.lanes // threads
        if self.registers:
            blocks = min(blocks, self.target.registers // (-(-self.registers // 8) * 8 * threads))
        if self.shared:
            blocks = min(blocks, self.target.shared // self.shared)
        return blocks * threads / self.target.lanes

    @property
    def seconds(self) -> float:
        """The least seconds of a launch, predicted by the target's roofline."""
        return self.target.machine.least(self.moved, self.operations, self.launch.kernel.written[0].dtype)


def compile_for(launch: KernelLaunch, tensors: Mapping[Array, torch.Tensor], target: Target, cells: int) -> Binary:
    """Compile a kernel for tensors that lie as those given do.

    Args:
        launch: the kernel.
        tensors: for each of its pointers a tensor, which may be on ``meta``.
        target: the target to compile for.
        cells: number of cells of a launch, for what it moves and computes.

    Raises:
        OfflineError: if that cannot be done in this process, or the compiler fails.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise OfflineError(
            "a process that interprets kernels cannot compile them", remedy="unset TRITON_INTERPRET for this command"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, int] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    printed = launch.printed(tensors)
    for place, (name, value) in enumerate(printed.arguments(tensors, cells)):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value == 1:  # as when it is launched
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    for name in printed.source.blocks:
        signature[name], constants[name] = "constexpr", printed.config.blocks[name]
    options = {"num_warps": printed.config.warps, "num_stages": printed.config.stages}
    try:
        source = ASTSource(jitted(printed.source.name, printed.source.text), signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)
    except failures(Exception) as error:  # whatever the compiler raises
        raise OfflineError(
            f"{launch.source.name} does not compile for {target.name} with {printed.config}: "
            f"{' '.join(str(error.__cause__ or error).split())[-300:]}",
            remedy=f"give it other tiles if {FILE} names a file with these; else report it, please, with its source",
        ) from error
    assembly = str(made.asm["ptx" if target.backend == "cuda" else "amdgcn"])
    code: bytes = made.asm["cubin" if target.backend == "cuda" else "hsaco"]
    registers, spilled = _of_cubin(code) if target.backend == "cuda" else _of_amdgcn(assembly)
    found: dict[str, int] = {}
    for each in re.findall(target.instructions, assembly):
        found[each] = found.get(each, 0) + 1
    moved, operations = work(launch.kernel, target.machine)
    return Binary(
        *(launch, printed, target, assembly, code, registers, spilled),
        *(int(made.metadata.shared), found, cells * moved, cells * operations, cells),
    )


def resources_tool() -> str | None:
    """Return the path of the tool that tells what a binary for NVIDIA's cards needs; None if there is none."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else shutil.which("cuobjdump")


def _of_cubin(code: bytes) -> tuple[int | None, int | None]:
    """Return the registers and the spilled bytes of a thread, or None where no tool tells."""
    path = resources_tool()
    if path is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        run = subprocess.run([path, "-res-usage", file.name], capture_output=True, text=True, check=False)
    used = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", run.stdout)
    return (int(used[1]), int(used[2]) + int(used[3])) if used else (None, None)


def _of_amdgcn(assembly: str) -> tuple[int | None, int | None]:
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spilled = re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    return int(registers[1]) if registers else None, int(spilled[1]) if spilled else None
