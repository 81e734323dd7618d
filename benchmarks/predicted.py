"""What the kernels of the published shapes should take on GPUs that are not here: predictions by a roofline.

python benchmarks/predicted.py

A model of two layers is captured, since the kernels of all layers are the same ones; a step has as many cells as the
model has layers. A launch takes the longer of moving what it reads and writes and of computing its products at the rate
of the card's data sheet, and 4 us at least. Nothing else is counted: no launch waits, no rate is lower than its peak.
"""

from __future__ import annotations

from typing import Any

from gpu import MEMORY, PUBLISHED, SHAPES

from rmtc.codegen.triton.targets import TARGETS
from rmtc.examples import armt_llama
from rmtc.kernels import BodyKernels, kernels_of
from rmtc.passes.fusion_groups import work


def step(body: BodyKernels, cells: int) -> tuple[float, float, int]:
    """Seconds of a step of so many cells, floating-point operations of its products, and its launches."""
    machine, total, operations = body.target.machine, 0.0, 0.0
    for launch in body.launches:
        moved, products, _ = work(launch.kernel, machine)
        rate = machine.products[launch.kernel.written[0].dtype]
        total += max(machine.launch, cells * max(moved / machine.bandwidth, products / rate))
        operations += cells * products
    return total, operations, len(body.launches)


def main() -> None:
    names = list(TARGETS)
    cards = [f"{name} ({TARGETS[name].card})" for name in names]
    print(f"| model | tokens | launches a step | published | {' | '.join(cards)} |")
    print("|---" * (len(names) + 4) + "|")
    for (shape, segment), known in PUBLISHED.items():
        sizes: dict[str, Any] = {**SHAPES[shape], "layers": 2, "segment": segment, "memory": MEMORY, "segments": 3}
        model, args = armt_llama.build(**sizes, dtype="bfloat16")
        layers, found = SHAPES[shape]["layers"], {}
        for name, bodies in kernels_of(model, args, targets=names).items():
            found[name] = step(next(body for body in bodies if body.name == "C0"), layers)
        for tokens, (_, diagonal) in known.items():
            segments = tokens // segment
            cells = []
            for name in names:
                seconds, operations, _ = found[name]
                rate = operations / seconds / max(TARGETS[name].machine.products.values())
                # Groups are narrower at both ends: as many cells as there are, in full steps.
                cells.append(f"{segments * seconds:.3f} s, {100 * rate:.0f} %")
            launches = "/".join(dict.fromkeys(str(found[name][2]) for name in names))
            print(f"| {shape}, {segment} + {MEMORY} | {tokens} | {launches} | {diagonal} s | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
