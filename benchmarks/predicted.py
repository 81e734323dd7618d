"""Predict by estimates the times of the published shapes' kernels on GPUs that are not here.

python benchmarks/predicted.py

A model of two layers is captured, since the kernels of all layers are the same ones; a step has as many cells as the
model has layers. A launch takes 4 us, and the longest of moving what it reads and writes, of its products at 0.9 of
the rate of the card's data sheet, and of issuing its instructions (rmtc/passes/bodies/instructions.py). Nothing was
measured.
"""

from __future__ import annotations

import argparse

from gpu import MEMORY, PUBLISHED, SHAPES, Case
from gpu_items import steady_bodies

from rmtc.codegen.triton.targets import TARGETS


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    names = list(TARGETS)
    cards = [f"{name} ({TARGETS[name].card})" for name in names]
    print(f"| model | tokens | launches a step | published | {' | '.join(cards)} |")
    print("|---" * (len(names) + 4) + "|")
    for (shape, segment), known in PUBLISHED.items():
        layers = SHAPES[shape]["layers"]
        bodies = steady_bodies(Case(shape, segment, 3 * segment), names, "bfloat16")
        found = {name: body.predicted(layers) for name, body in bodies.items()}
        for tokens, (_, diagonal) in known.items():
            segments = tokens // segment
            cells = []
            for name in names:
                # Groups are narrower at both ends: as many cells as there are, in full steps.
                cells.append(f"{segments * found[name].seconds:.3f} s, {100 * found[name].share:.0f} %")
            launches = "/".join(dict.fromkeys(str(len(found[name].launches)) for name in names))
            print(f"| {shape}, {segment} + {MEMORY} | {tokens} | {launches} | {diagonal} s | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
