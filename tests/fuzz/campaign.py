"""Run drawn models one after another, each in a process of its own; log, shrink, sum up."""

from __future__ import annotations

import collections
import json
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import rmtc

from .check import Verdict, examine
from .render import render
from .spec import Spec, draw, features, has_schedule, size, smaller, trained

__all__ = ["Campaign", "commit", "judge", "logged", "reason_class", "shrink", "signature", "summary"]

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 150
"""A model that takes more hangs."""

_SHRUNK = 2  # failures of one signature that are made smaller: it takes as long as dozens of models

_FORK = multiprocessing.get_context("fork")

Compile = Callable[..., Any]


def judge(spec: Spec, compile: Compile = rmtc.compile) -> Verdict:
    """The verdict on a drawn model, in this process."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        path = Path(folder) / "model.py"
        path.write_text(render(spec))
        return examine(path, compile)


def _child(spec: Spec, sender: Connection, compile: Compile) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    try:
        verdict = judge(spec, compile)
    except Exception as error:  # noqa: BLE001 (a fault of the generator)
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else ""
        verdict = Verdict("generator", [f"{type(error).__name__}: {error} ({line})"])
    verdict.cpu_seconds = time.process_time()
    sender.send(asdict(verdict))
    sender.close()


class Job:
    """A model that is examined in a process of its own.

    Args:
        spec: the model.
        compile: what compiles it.
    """

    def __init__(self, spec: Spec, compile: Compile = rmtc.compile) -> None:
        self.spec, self.started = spec, time.monotonic()
        self.receiver, sender = _FORK.Pipe(duplex=False)
        self.process: BaseProcess = _FORK.Process(target=_child, args=(spec, sender, compile), daemon=True)
        self.process.start()
        sender.close()

    @property
    def late(self) -> bool:
        """Whether it has been at it for so long that it waits for something."""
        return time.monotonic() - self.started > 8 * CPU_SECONDS

    def done(self) -> Verdict:
        """The verdict; to be asked for when there is something to read, or it is late."""
        try:
            verdict = Verdict(**self.receiver.recv()) if not self.late or self.receiver.poll() else Verdict("hang")
        except EOFError:
            self.process.join(10)
            code = self.process.exitcode
            verdict = Verdict("hang" if code == -signal.SIGXCPU else "crash", [f"exit code {code}"])
        if verdict.kind == "hang":
            self.process.kill()
        self.process.join(10)
        self.receiver.close()
        return verdict


def isolated(spec: Spec, compile: Compile = rmtc.compile) -> Verdict:
    """The verdict on a drawn model, found in a process of its own."""
    job = Job(spec, compile)
    wait([job.receiver], timeout=8 * CPU_SECONDS)
    return job.done()


def signature(verdict: Verdict) -> str:
    """What two failures, or refusals, of one cause are likely to share."""
    if verdict.kind == "same":
        refused = "" if verdict.ran else next(iter(verdict.refused), "")
        return f"refused: {reason_class(refused)}" if refused else "same"
    told = verdict.detail[-1] if verdict.kind in ("error inside", "exception", "modes") and verdict.detail else ""
    return f"{verdict.kind} {reason_class(told)}".strip()


def shrink(spec: Spec, failure: str, seconds: float, compile: Compile = rmtc.compile, look: Any = isolated) -> Spec:
    """The smallest model found in a while that still fails with a signature."""
    until = time.monotonic() + seconds
    again = True
    while again:
        again = False
        for less in smaller(spec):
            if time.monotonic() > until:
                return spec
            if size(less) < size(spec) and signature(look(less, compile)) == failure:
                spec, again = less, True
                break
    return spec


def reason_class(reason: str) -> str:
    """A reason without the names and numbers of one model."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "'...'", reason)
    reason = re.sub(r"%\d+|\b\d[\d.e+-]*\b", "N", reason)
    reason = re.sub(r"\b(?:aten|torch|prims|higher_order)\.[\w.]+", "OP", reason)
    reason = re.sub(r"\([^()]*\)", "(...)", reason)
    return " ".join(reason.split())[:160]


def commit() -> str:
    """The commit that is run, with a mark if the sources differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--", "rmtc", "tests/fuzz")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


class Campaign:
    """Models of a seed, logged.

    Args:
        seed: of the series.
        log: a file that a line of JSON is added to for each model.
        failures: a folder for the files that reproduce failures.
        shrinking: seconds that a failure is made smaller for.
        without: features whose models are left out, such as ``script=module``.
        training: whether gradients are asked of each call of each model.
    """

    def __init__(
        self,
        seed: int,
        log: Path,
        failures: Path,
        shrinking: float,
        without: Iterable[str] = (),
        training: bool = False,
    ) -> None:
        self.seed, self.log, self.failures, self.shrinking = seed, log, failures, shrinking
        self.without, self.training = frozenset(without), training
        self.commit = commit()
        self.counts: collections.Counter[str] = collections.Counter()
        self.failed: collections.Counter[str] = collections.Counter()

    def run(self, numbers: Iterable[int], workers: int, until: float) -> None:
        """Examine models until there are no more or it is late."""
        numbers, jobs = (number for number in numbers if self.wanted(number)), dict[int, Job]()
        while True:
            while len(jobs) < workers and time.monotonic() < until and (number := next(numbers, None)) is not None:
                spec = draw(self.seed, number)
                jobs[number] = Job(trained(spec) if self.training else spec)
            if not jobs:
                return
            ready = wait([job.receiver for job in jobs.values()], timeout=5)
            for number, job in list(jobs.items()):
                if job.receiver in ready or job.late:
                    del jobs[number]
                    self._record(number, job.spec, job.done(), time.monotonic() - job.started)

    def wanted(self, number: int) -> bool:
        """Whether a model is examined, and not left out."""
        return self.without.isdisjoint(features(draw(self.seed, number)))

    def _record(self, number: int, spec: Spec, verdict: Verdict, seconds: float) -> None:
        kind = verdict.kind
        status = kind if kind != "same" else "ran" if verdict.ran else "refused" if verdict.refused else "eager"
        line = {
            "seed": self.seed,
            "number": number,
            "commit": self.commit,
            "status": status,
            "ran": verdict.ran,
            "refused": verdict.refused,
            "eager": verdict.eager,
            "raised": verdict.raised,
            "detail": verdict.detail[:5],
            "signature": signature(verdict) if kind != "same" else "",
            "seconds": round(seconds, 2),
            "packed": verdict.packed,
            "parts": verdict.parts,
            "backwards": verdict.backwards,
            "cpu_seconds": round(verdict.cpu_seconds, 2),
            "legal": has_schedule(spec),
            "features": sorted(features(spec)),
            "spec": spec,
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.counts[status] += 1
        if kind not in ("same", "unstable"):
            self._keep(number, spec, verdict)
        sys.stdout.write(f"{self.seed} {number} {status} {seconds:.1f} s {'; '.join(verdict.detail[:1])[:200]}\n")
        sys.stdout.flush()

    def _keep(self, number: int, spec: Spec, verdict: Verdict) -> None:
        """A file that reproduces a failure, as small as it gets in a while."""
        self.failures.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", verdict.kind)
        path = self.failures / f"{name}_{self.seed}_{number}.py"
        path.write_text(render(spec))
        failure = signature(verdict)
        self.failed[failure] += 1
        if verdict.kind != "generator" and self.failed[failure] <= _SHRUNK:
            path.write_text(render(shrink(spec, failure, self.shrinking)))


def logged(log: Path, seed: int, number: int) -> Spec | None:
    """The model of a number as it was logged last; None if it was not: a changed generator draws others."""
    found = None
    for line in map(json.loads, log.read_text().splitlines() if log.exists() else ()):
        if (line["seed"], line["number"]) == (seed, number):
            found = line.get("spec")
    return found


def summary(paths: Iterable[Path]) -> str:
    """What logs say: models by verdict, by feature, by reason."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    statuses = collections.Counter(line["status"] for line in lines)
    commits = collections.Counter(line["commit"] for line in lines)
    text = [f"{len(lines)} models: " + ", ".join(f"{count} {name}" for name, count in statuses.most_common())]
    text.append(f"{sum(line.get('packed', 0) > 1 for line in lines)} of them with several calls at once")
    text.append(f"{sum(line.get('parts', 0) > 0 for line in lines)} of them in parts, and as they come")
    text.append(f"{sum(line.get('backwards', 0) > 0 for line in lines)} of them with backward passes by a schedule")
    text.append("by commit: " + ", ".join(f"{name} {count}" for name, count in commits.items()))
    text += ["", f"{'feature':40} {'drawn':>6} {'ran':>6} {'refused':>8} {'failed':>7}"]
    by_feature: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines:
        status = line["status"]
        found = status if status in ("ran", "refused", "eager") else "failed"
        for feature in set(line["features"]):
            by_feature[feature][found] += 1
    for feature, counts in sorted(by_feature.items()):
        drawn = sum(counts.values())
        text.append(f"{feature:40} {drawn:6} {counts['ran']:6} {counts['refused']:8} {counts['failed']:7}")
    never = [line for line in lines if not line["ran"]]
    for title, chosen in (
        ("refused though legal", [line for line in never if line["legal"]]),
        ("refused, and theory has no schedule or the README says so", [line for line in never if not line["legal"]]),
        (
            "calls that ran as written, of models whose other calls ran by a schedule",
            [line for line in lines if line["ran"]],
        ),
    ):
        text += ["", f"{title}:", *_reasons(chosen)]
    return "\n".join(text)


def _reasons(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Classes of reasons, the most frequent first, with a model each."""
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    for line in lines:
        for reason in line["refused"]:
            counts[reason_class(reason)] += 1
            examples.setdefault(reason_class(reason), f"--seed {line['seed']} --only {line['number']}")
    return [f"{count:5}  {reason}  [{examples[reason]}]" for reason, count in counts.most_common()]
