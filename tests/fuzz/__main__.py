"""Run the fuzzer: ``python -m tests.fuzz --minutes 60 --seed 0``.

The exit code is 1 if there is a finding, or if the time ended before as many models as ``--models`` says were examined.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import collector
import environment

assert environment.SET  # before torch is imported


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long models are drawn")
    parser.add_argument("--models", type=int, help="how many are drawn, and have to be examined in that time")
    parser.add_argument("--seed", type=int, default=0, help="of the series of models")
    parser.add_argument("--start", type=int, default=0, help="the number of the first model")
    parser.add_argument("--only", type=int, help="the number of one model, as logged, or else drawn: print it")
    parser.add_argument("--shrink", action="store_true", help="with --only: a smaller model with such a verdict")
    parser.add_argument("--workers", type=int, default=1, help="how many are examined at once")
    parser.add_argument("--shrinking", type=float, default=120, help="seconds for which a failure is made smaller")
    parser.add_argument("--log", type=Path, default=Path(".fuzz/log.jsonl"))
    parser.add_argument("--failures", type=Path, default=Path(".fuzz/failures"))
    parser.add_argument("--without", nargs="+", default=[], metavar="FEATURE", help="leave out: script=module, op=sort")
    parser.add_argument("--training", action="store_true", help="ask gradients of each call")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="LOG", help="sum up logs")
    given = parser.parse_args()
    from . import campaign
    from .render import render
    from .spec import draw

    if given.summary:
        sys.stdout.write(campaign.summary(given.summary) + "\n")
        return 0
    if given.only is not None:
        spec = campaign.logged(given.log, given.seed, given.only) or draw(given.seed, given.only)
        verdict = campaign.isolated(spec)
        if given.shrink:
            spec = campaign.shrink(spec, campaign.signature(verdict), given.shrinking)
            verdict = campaign.isolated(spec)
        sys.stdout.write(f"{render(spec)}\n# {verdict}\n")
        return int(verdict.kind != "same")
    import torch

    torch.set_num_threads(1)
    run = campaign.Campaign(given.seed, given.log, given.failures, given.shrinking, given.without, given.training)
    campaign.judge(draw(0, 0))  # what is imported late is there for every process that is forked
    collector.keep_away()
    numbers = itertools.count(given.start)
    models = itertools.islice(numbers, given.models) if given.models is not None else numbers
    run.run(models, given.workers, time.monotonic() + 60 * given.minutes)
    sys.stdout.write(campaign.summary([given.log]) + "\n")
    findings = sum(count for kind, count in run.counts.items() if kind not in ("ran", "refused", "eager", "unstable"))
    sys.stdout.write(f"{run.counts.total()} models examined, {findings} with a finding\n")
    if given.models is not None:
        asked = sum(map(run.wanted, range(given.start, given.start + given.models)))
        if run.counts.total() < asked:
            sys.stdout.write(f"too few: {asked} were asked for, and the time (--minutes) ended before\n")
            return 1
    return int(findings > 0)


raise SystemExit(main())
