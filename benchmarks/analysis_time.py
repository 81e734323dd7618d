"""Time each stage of an analysis, a replay per segment, and writing the kernels, once each.

python benchmarks/analysis_time.py [--layers 16] [--width 256] [--segments 64]
"""

from __future__ import annotations

import argparse
import os
import platform
from functools import partial

import torch
from tables import Page

from rmtc.analysis import Analysis, analyze
from rmtc.capture.sizes import Sizes
from rmtc.codegen.triton.targets import TARGETS
from rmtc.examples.armt_llama import build
from rmtc.kernels import kernels_on
from rmtc.turns import timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--segments", type=int, default=64)
    options = parser.parse_args()
    build_small = {"layers": 1, "width": 16, "heads": 2, "segment": 4, "memory": 2, "segments": 3}
    model, args = build(**build_small)
    analyze(model, args, {})  # imports and first uses
    model, args = build(layers=options.layers, width=options.width, segment=64, memory=8, segments=options.segments)
    total, analysis = timed(lambda: analyze(model, args, {}))
    page = Page()
    page.say(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    page.head(f"{options.layers} layers of width {options.width}, {options.segments} segments", "time")
    page.row("all of it", f"{total:.1f} s")
    for stage, seconds in analysis.seconds.items():
        page.row(stage, f"{seconds:.2f} s")
    for segments in (options.segments, 4 * options.segments):
        fresh = Analysis(
            analysis.capture,
            analysis.proven,
            replayer=analysis.replayer,
            traced=analysis.traced,
            told=analysis.told,
            probes=analysis.probes,
        )
        seconds, _ = timed(partial(fresh.admit, Sizes(segments, 1, 64)))
        page.row(f"replay of {segments} segments", f"{seconds:.2f} s, {1000 * seconds / segments:.1f} ms per segment")
    seconds, bodies = timed(lambda: kernels_on(TARGETS["sm_90"], analysis, "shortest"))
    count = sum(len(body.launches) for body in bodies)
    page.row(f"{count} kernels of {len(bodies)} bodies for sm_90, as text", f"{seconds:.2f} s")


if __name__ == "__main__":
    main()
