"""Compiles the kernels of an example in a process of its own, and prints what came of it as JSON.

python compiled.py MODULE SETTINGS TARGETS BODIES
"""

from __future__ import annotations

import importlib
import json
import sys

from rmtc.kernels import kernels_of


def main(module: str, settings: str, targets: str, bodies: str) -> None:
    model, args = importlib.import_module(f"rmtc.examples.{module}").build(**json.loads(settings))
    found = []
    for name, each in kernels_of(model, args, targets=targets.split(",")).items():
        for body in each:
            if body.name not in bodies.split(","):
                continue
            library = len(body.body.multiplied)
            for made in body.compile():
                kinds = list(made.instructions)
                count = sum(made.instructions.values())
                of = made.launch.source.name, made.printed.source.persistent
                needs = made.spilled, made.shared, made.target.shared
                found.append([name, body.name, *of, *needs, count, kinds, body.body.fallbacks, library])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
