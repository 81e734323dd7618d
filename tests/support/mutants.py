"""Measure the tests: plant small faults in the modules that decide what is legal and what runs, and count those found.

    python tests/support/mutants.py --seed 0 --count 200 --json score.json

Each mutant differs from the package in one place of one module (a comparison, an operator, a constant, a condition, a
statement left out). It is killed if a test of its module fails within the limit. A mutant that no test fails for in
that time survives, whether the tests ended or not. The same seed draws the same mutants from the same sources.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.machinery
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TESTS = {
    "rmtc/passes/graph/regions.py": ("test_regions.py", "test_check_regions.py"),
    "rmtc/passes/graph/reads.py": ("test_regions.py", "test_canonicalize.py"),
    "rmtc/passes/graph/writes.py": ("test_regions.py", "test_canonicalize.py"),
    "rmtc/passes/schedule/prove.py": ("test_prove.py", "test_study.py"),
    "rmtc/passes/schedule/check.py": ("test_check.py",),
    "rmtc/passes/fold/dependences.py": ("test_oracle.py", "test_explain.py"),
    "rmtc/passes/bodies/group.py": ("test_if_convert.py", "test_rules.py"),
    "rmtc/passes/launches/plan_launches.py": ("test_check_launches.py", "test_arena.py"),
    "rmtc/runtime/arena.py": ("test_arena.py",),
}
"""The tests of each module."""

PATIENCE = 10
"""How many times the limit the tests of a mutant may take by the clock: they may wait, and the machine may be busy."""

MEMORY = 12 * 2**30
"""Bytes that a mutant may take: a loop that no longer ends must not stop the machine."""

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """A module with one fault.

    Attributes:
        module: its path from the root of the repository.
        place: the number of the fault among all that can be planted in the module.
        line: where it is.
        says: what was changed, for a reader.
    """

    module: str
    place: int
    line: int
    says: str


def faults(tree: ast.Module) -> Iterator[tuple[int, str, Any]]:
    """All faults that can be planted: the line, what it is, and a function that plants it in the tree."""
    hinted = {id(each) for node in ast.walk(tree) for each in _hints(node)}
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if id(node) in hinted:  # what a type checker reads does nothing when it runs
            continue
        stack.extend(reversed(list(ast.iter_child_nodes(node))))
        yield from _faults_of(node)


def _hints(node: ast.AST) -> list[ast.AST]:
    found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        found.append(node)
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        found.append(node)
    if isinstance(node, ast.Assign) and any(
        isinstance(each, ast.Name) and each.id == "__all__" for each in node.targets
    ):
        found.append(node)
    return [each for each in found if each is not None]


def _faults_of(node: ast.AST) -> Iterator[tuple[int, str, Any]]:
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            if (other := _COMPARED.get(type(operator))) is not None:
                yield node.lineno, f"{type(operator).__name__} -> {other.__name__}", _in_list(node.ops, number, other())
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and (computed := _COMPUTED.get(type(node.op))) is not None:
        yield node.lineno, f"{type(node.op).__name__} -> {computed.__name__}", _set(node, "op", computed())
    if isinstance(node, ast.BoolOp):
        joined: ast.boolop = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node.lineno, f"{type(node.op).__name__} -> {type(joined).__name__}", _set(node, "op", joined)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.lineno, "- left out", _set(node, "op", ast.UAdd())
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        turned = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        yield node.lineno, f"{type(node).__name__}: condition negated", _set(node, "test", turned)
    if isinstance(node, ast.comprehension):
        for number, _ in enumerate(node.ifs):
            yield node.target.lineno, "filter of a comprehension left out", _drop(node.ifs, number)
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield node.lineno, f"{node.value} -> {value}", _set(node, "value", value)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in _CALLED:
        yield node.lineno, f"{node.id} -> {_CALLED[node.id]}", _set(node, "id", _CALLED[node.id])
    for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
        for number, each in enumerate(body if isinstance(body, list) else ()):
            called = isinstance(each, ast.Expr) and isinstance(each.value, ast.Call)
            if called or isinstance(each, (ast.AugAssign, ast.Continue, ast.Raise)):
                nothing = ast.copy_location(ast.Pass(), each)
                yield each.lineno, f"{type(each).__name__} left out", _in_list(body, number, nothing)


def _set(node: ast.AST, name: str, value: Any) -> Any:
    return lambda: setattr(node, name, value)


def _in_list(items: Any, number: int, value: Any) -> Any:
    return lambda: items.__setitem__(number, value)


def _drop(items: list[Any], number: int) -> Any:
    return lambda: items.__delitem__(number)


def mutants(modules: Sequence[str]) -> list[Mutant]:
    """All mutants of some modules."""
    return [
        Mutant(module, place, line, says)
        for module in modules
        for place, (line, says, _) in enumerate(faults(ast.parse((ROOT / module).read_text())))
    ]


def planted(mutant: Mutant) -> Any:
    """The code of the module with its fault."""
    file = ROOT / mutant.module
    tree = ast.parse(file.read_text())
    (plant,) = [plant for place, (_, _, plant) in enumerate(faults(tree)) if place == mutant.place]
    plant()
    return compile(ast.fix_missing_locations(tree), str(file), "exec", dont_inherit=True)


def _run(mutant: Mutant | None, module: str, log: Path, limit: int) -> int:
    """Run the tests of a module in this process, which is a child; the exit code of pytest."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    os.chdir(ROOT)
    if mutant is not None:
        code = planted(mutant)
        once = importlib.machinery.SourceFileLoader.get_code

        def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> Any:
            return code if Path(self.path) == ROOT / mutant.module else once(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    import pytest

    files = [str(file) for each in TESTS[module] for file in (ROOT / "tests").rglob(each)]
    return int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line", *files]))


class Pool:
    """Children that each run the tests for one mutant."""

    def __init__(self, limit: int, logs: Path) -> None:
        self.limit, self.logs = limit, logs
        self.begun: dict[int, tuple[float, Mutant | None, str]] = {}

    def start(self, mutant: Mutant | None, module: str) -> None:
        """Begin with a mutant; None for the module as it is."""
        name = "as it is" if mutant is None else str(mutant.place)
        log = self.logs / f"{Path(module).stem} {name}.log"
        child = os.fork()
        if child == 0:
            os.setsid()
            code = 70
            try:
                code = _run(mutant, module, log, self.limit)
            finally:
                sys.stdout.flush()
                os._exit(code)
        self.begun[child] = time.monotonic(), mutant, module

    def end(self) -> None:
        """End the children that are left, and what they started."""
        for child in self.begun:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

    def ended(self) -> tuple[Mutant | None, str, str, float] | None:
        """A child that has ended, if there is one: the mutant, its module, what came of it, and seconds."""
        for child, (start, mutant, module) in self.begun.items():
            found, status, used = os.wait4(child, os.WNOHANG)
            if found == 0:
                if time.monotonic() - start < PATIENCE * self.limit:
                    continue
                os.killpg(child, signal.SIGKILL)
                _, status, used = os.wait4(child, 0)
            code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
            late = code in (-signal.SIGXCPU, -signal.SIGKILL)
            outcome = "not in time" if late else "killed" if code else "survived"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the tests started
            del self.begun[child]
            return mutant, module, outcome, seconds
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="draws the mutants (0)")
    parser.add_argument("--count", type=int, default=200, help="how many mutants (200)")
    parser.add_argument("--limit", type=int, default=20, help="seconds of CPU for the tests of one mutant (20)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many run at once (one a core)")
    parser.add_argument("--only", nargs="+", choices=[*TESTS], default=[*TESTS], help="modules")
    parser.add_argument("--logs", type=Path, help="a folder for what the tests print")
    parser.add_argument("--least", type=int, default=0, help="exit with 1 if fewer mutants are killed")
    parser.add_argument("--json", type=Path, help="write each mutant and what came of it there")
    options = parser.parse_args()
    possible = mutants(options.only)
    if not 0 < options.count <= len(possible):
        parser.error(f"--count is 1 to {len(possible)} for these modules")
    if options.jobs < 1 or options.limit <= 0:
        parser.error("--jobs is at least 1, --limit more than 0")
    drawn = random.Random(options.seed).sample(possible, options.count)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("[]\n")
    import hypothesis
    import networkx
    import sympy
    import torch
    import transformers.models.llama.modeling_llama

    assert hypothesis and networkx and sympy and transformers
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        pool, found = Pool(options.limit, logs), list[dict[str, Any]]()
        try:
            for each in measured(drawn, options.only, pool, options.jobs):
                found.append(each)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
                at = f"{each['module']}:{each['line']}  {each['says']}"
                print(f"{len(found):4} {each['outcome']:11} {each['seconds']:5.1f} s  {at}", flush=True)
        finally:
            pool.end()
    print()
    for module in options.only:
        counts = Counter(each["outcome"] for each in found if each["module"] == module)
        print(f"{module:32} {counts['killed']} of {counts.total()} killed, {counts['not in time']} not in time")
    killed = sum(each["outcome"] == "killed" for each in found)
    print(f"seed {options.seed}, {options.limit} s of CPU each: {killed} of {len(found)} killed")
    raise SystemExit(killed < options.least)


def measured(drawn: Sequence[Mutant], modules: Sequence[str], pool: Pool, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield what comes of each mutant, after those of each module as it is, which must not fail.

    Raises:
        SystemExit: if the tests of a module fail without a fault.
    """
    waiting: list[tuple[Mutant | None, str]] = [(None, module) for module in modules]
    waiting += [(each, each.module) for each in drawn]
    waiting.reverse()
    while waiting or pool.begun:
        while waiting and len(pool.begun) < jobs:
            pool.start(*waiting.pop())
        ended = pool.ended()
        if ended is None:
            time.sleep(0.05)
            continue
        mutant, module, outcome, seconds = ended
        if mutant is None:
            if outcome == "killed":
                raise SystemExit(f"the tests of {module} fail without a fault: see --logs")
            continue
        yield {**vars(mutant), "outcome": outcome, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
