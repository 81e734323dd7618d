"""Counts the instructions of kernels in their machine code, beside their estimate; prints both as JSON.

    python machine_code.py SETTINGS TARGETS

SETTINGS are those of `rmtc.examples.armt_llama.build`, TARGETS names of NVIDIA's. It runs in a process of its own.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

from rmtc.codegen.triton.launch import Printed
from rmtc.examples import armt_llama
from rmtc.ir.kernel import Attend, Kernel
from rmtc.kernels import kernels_of
from rmtc.passes.bodies.instructions import issued

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def counted(code: bytes) -> tuple[int, int | None]:
    """The instructions of a warp: of the whole kernel, and of its innermost loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([str(TOOL), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = [
        (int(line[1], 16), line[2], line[3])
        for line in re.finditer(
            r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);", text, flags=re.MULTILINE
        )
    ]
    inner: int | None = None
    for end, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < end:
            size = sum(int(target[1], 16) <= each <= end for each, _, _ in found)
            if size > 20 and (inner is None or size < inner):
                inner = size
    return len(found), inner


def bound(kernel: Kernel | Attend, printed: Printed, total: int, inner: int | None) -> float:
    """The instructions that all warps issue for a cell, if each turn of a loop runs the innermost one once."""
    blocks, inside = printed.config.blocks, inner or 0
    m, n, z = kernel.m.size.value, kernel.n.size.value, kernel.z.size.value
    tiles = math.ceil(m / blocks["BLOCK_M"])
    if isinstance(kernel, Attend):
        # A tile of a causal one ends with its own rows.
        ends = [min(n, (tile + 1) * blocks["BLOCK_M"]) if kernel.array.causal else n for tile in range(tiles)]
        turns = sum(math.ceil(end / blocks["BLOCK_N"]) for end in ends)
    else:
        tiles *= math.ceil(n / blocks["BLOCK_N"])
        turns = tiles * sum(math.ceil(stage.over.size.value / blocks["BLOCK_K"]) for stage in kernel.stages)
    return printed.config.warps * z * (tiles * (total - inside) + turns * inside)


def main(settings: str, targets: str) -> None:
    model, args = armt_llama.build(**json.loads(settings))
    rows = []
    for name, bodies in kernels_of(model, args, targets=targets.split(",")).items():
        body = next(each for each in bodies if each.name == "C0")
        for made in body.compile():
            kernel, printed, machine = made.launch.kernel, made.printed, made.target.machine
            total, inner = counted(made.code)
            wanted = bound(kernel, printed, total, inner)
            found = issued(kernel, machine.issue, printed.config, printed is made.launch.big)
            sizes = [kernel.m.size.value, kernel.n.size.value]
            what = [name, len(body.body.groups), printed.source.name, type(kernel).__name__, sizes]
            rows.append([*what, list(made.instructions), made.spilled, total, inner, found, wanted])
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
