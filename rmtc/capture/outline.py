"""Loops of a function's source as functions of their own, and the function that has them run.

A method that reads a text and then answers goes on where no trace can follow. Its loop over the segments is moved into
a function, which can be traced, and all else stays where it is, with its contexts, branches and exceptions::

    for segment in segments[:-1]:               left = run(0, (segments[:-1],), ())
        out = self.cell(segment, memory)   ->   if "memory" in left: memory = left["memory"]
        memory = out.memory

The source counts only if it compiles to the very code of the function. A loop that cannot be moved as it is stays.
"""

from __future__ import annotations

import ast
import copy
import itertools
import linecache
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from rmtc.capture.user_code import codes_in

_PREFIX = "_rmtc_"
_RUN, _LEFT = f"{_PREFIX}run", f"{_PREFIX}left"

_SEES_ALL = frozenset({"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "f_locals"})
"""Names of functions by which code sees its own variables."""

_STAY = (
    *(ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith, ast.Delete, ast.Match),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom),
)
"""Code for which a loop stays: it leaves the function, or binds names by other means than an assignment."""

_ODD = (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom)
"""Code for which all loops of a function stay: it shares its variables, or returns before it has run."""

_LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.GeneratorExp)
"""Code that may run later, and sees then what its variables hold by then."""

_PASS_ON = frozenset({"enumerate", "zip", "reversed"})
"""Functions of Python's own that give items of what they are given, one after another."""

_MODES = frozenset(
    f"torch.{name}" for name in ("no_grad", "inference_mode", "set_grad_enabled", "autocast", "amp.autocast")
)
"""Contexts that let exceptions pass."""

_PLAIN = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.BinOp, ast.UnaryOp)
"""Expressions that change nothing."""

_Path: TypeAlias = tuple[tuple[list[ast.stmt], int], ...]  # to a statement: blocks, the outermost first, with places


class OwnLoop(NamedTuple):
    """A loop that may be moved into a function.

    Attributes:
        place: which of the function's outermost loops it is.
        reads: local names that it may read.
        leaves: local names that it may bind, and that what follows may read.
        items: the names by which it is handed what it goes over; none if that is a range.
        empty: names of lists and dictionaries that are empty when it begins, with the text that makes one: it makes its
            own, and leaves that.
    """

    place: int
    reads: tuple[str, ...]
    leaves: tuple[str, ...]
    items: tuple[str, ...]
    empty: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Outline:
    """A function whose loops may be moved.

    Attributes:
        function: the function.
        text: that of its file.
        loops: those that may be moved, in order.
    """

    function: FunctionType
    text: str
    loops: tuple[OwnLoop, ...]

    def around(self, run: Callable[[int, tuple[Any, ...], tuple[range, ...]], dict[str, Any]]) -> FunctionType:
        """Return the function with its loops run by another one.

        Args:
            run: takes the number of a loop and what it goes over, and returns the local names that it leaves, with
                their values. The frame that calls it holds the names that the loop reads.
        """
        module, _, node = _parsed(self.text, self.function.__code__)
        paths = list(_loops(node.body, ()))
        for number, loop in reversed([*enumerate(self.loops)]):
            block, at = paths[loop.place][-1]
            statement: Any = block[at]
            lines = [f"{_LEFT} = {_RUN}({number}, (), ())"]
            lines += [f"if {name!r} in {_LEFT}: {name} = {_LEFT}[{name!r}]" for name in loop.leaves]
            kept = (_rebound([statement]) & _locals_of(self.function.__code__)).difference(loop.leaves)
            lines += [f"if False: {name} = None" for name in sorted(kept)]  # keeps it local, unbound or not
            made: list[Any] = ast.parse("\n".join(lines)).body
            made[0].value.args[1].elts = _iterables(statement.iter)
            made[0].value.args[2].elts = copy.deepcopy(_ranges(statement.iter))
            block[at : at + 1] = [_placed(each, statement) for each in made]
        node.args.kwonlyargs.append(_placed(ast.arg(_RUN), node))
        node.args.kw_defaults.append(None)
        made_function = self._made(module, self.function.__code__.co_firstlineno)
        made_function.__defaults__ = self.function.__defaults__
        made_function.__kwdefaults__ = {**(self.function.__kwdefaults__ or {}), _RUN: run}
        return made_function

    def loop(self, number: int, bound: Iterable[str], owner: str | None) -> FunctionType:
        """Return a loop as a function, which returns the local names that it leaves, with their values.

        Args:
            number: that of the loop.
            bound: the names that are bound when it begins, of those that it reads: its parameters, before what it goes
                over.
            owner: the name of a parameter before these.
        """
        loop = self.loops[number]
        module, home, node = _parsed(self.text, self.function.__code__)
        block, at = list(_loops(node.body, ()))[loop.place][-1]
        statement: Any = block[at]
        statement.iter = _given(statement.iter, iter(loop.items))
        given = [*([owner] if owner is not None else []), *bound, *loop.items]
        lines = [f"def {node.name}({', '.join(given)}):", *(f" {name} = {text}" for name, text in loop.empty)]
        lines += [f" {_LEFT} = {{}}"]
        for name in loop.leaves:
            lines += [" try:", f"  {_LEFT}[{name!r}] = {name}", " except NameError:", "  pass"]
        kept = dict.fromkeys((*loop.reads, *loop.leaves))  # an assignment keeps a name local
        lines += [f" return {_LEFT}", *(f" {name} = None" for name in kept)]
        made: Any = _placed(ast.parse("\n".join(lines)).body[0], statement)
        made.body.insert(len(loop.empty), statement)
        home.insert(home.index(node) + 1, made)
        return self._made(module, statement.lineno)

    def _made(self, module: ast.Module, line: int) -> FunctionType:
        function, code = self.function, self.function.__code__
        whole = compile(module, code.co_filename, "exec", dont_inherit=True)
        (made,) = (each for each in codes_in(whole) if each.co_name == code.co_name and each.co_firstlineno == line)
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        closure = tuple(cells[name] for name in made.co_freevars)
        return FunctionType(made, function.__globals__, function.__name__, None, closure)


def outline_of(function: FunctionType) -> Outline | None:
    """Return a function with the loops that may be moved; None if it has none, or if its source is not there.

    Its first parameter is handed to each loop, and to none by name.
    """
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename))
    try:
        whole = compile(text, code.co_filename, "exec", dont_inherit=True)
        _, _, node = _parsed(text, code)
    except (SyntaxError, ValueError):
        return None
    if sum(each == code for each in codes_in(whole)) != 1 or not code.co_argcount:
        return None
    # See that the function looks at none of its variables but by name.
    own, owner = _locals_of(code), set(code.co_varnames[:1])
    named = _named(node)
    names = named | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    hidden = any(name.startswith((_PREFIX, "__")) and not name.endswith("__") for name in own | named)
    odd = any(isinstance(each, _ODD) for each in ast.walk(node))
    if hidden or odd or names & _SEES_ALL or owner & _rebound(node.body):
        return None
    later = {name for each in node.body for name in _seen_later(each)}
    # Take the loops that may be moved.
    loops = []
    for place, path in enumerate(_loops(node.body, ())):
        block, at = path[-1]
        loop: Any = block[at]
        stored = {each.id for each in ast.walk(loop) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        catches = any(_catches(outer[index]) for outer, index in path[:-1])
        empty = {} if catches else _empty_before(path)
        empty = {name: empty[name] for name in sorted((empty.keys() & own & _exposed(loop)) - later)}
        leaves = (stored | empty.keys()) & own & _live_after(path)
        stays = any(isinstance(each, _STAY) for each in ast.walk(loop)) or _disorders(loop.iter)
        stays = stays or any(isinstance(each, ast.ExceptHandler) and each.name is not None for each in ast.walk(loop))
        stays = stays or any(_seen_later(loop) & _rebound_after(step) for step in path)
        if stays or stored & later or (leaves and catches):
            continue
        free = (name for count in itertools.count() if (name := f"items{'_' * count}") not in named | own)
        items = tuple(next(free) for _ in _iterables(loop.iter))
        loop.iter = _given(loop.iter, iter(items))
        reads = (_exposed(loop) & own) - owner
        reads -= empty.keys()
        loops.append(OwnLoop(place, tuple(sorted(reads)), tuple(sorted(leaves)), items, tuple(empty.items())))
    return Outline(function, text, tuple(loops)) if loops else None


def _parsed(text: str, code: CodeType) -> tuple[ast.Module, list[ast.stmt], ast.FunctionDef]:
    """Return a file, the block in it that defines the function of a code, and the definition.

    Raises:
        SyntaxError: if the text is no Python.
        ValueError: if it does not define the function, or does so twice.
    """
    module = ast.parse(text, code.co_filename)
    blocks = [getattr(each, name, None) for each in ast.walk(module) for name in ("body", "orelse", "finalbody")]
    found = [
        (block, node)
        for block in blocks
        if isinstance(block, list)
        for node in block
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name
        if min([node.lineno, *(each.lineno for each in node.decorator_list)]) == code.co_firstlineno
    ]
    ((block, node),) = found
    return module, block, node


def _locals_of(code: CodeType) -> frozenset[str]:
    return frozenset((*code.co_varnames, *code.co_cellvars))


def _loops(block: list[ast.stmt], outer: _Path) -> Iterator[_Path]:
    """Yield the paths of the loops of a block that are in no other loop."""
    for at, statement in enumerate(block):
        path = *outer, (block, at)
        if isinstance(statement, ast.For):
            yield path
        elif isinstance(statement, (ast.If, ast.With, ast.Try)):
            for name in ("body", "orelse", "finalbody"):
                yield from _loops(getattr(statement, name, []), path)


def _calls(node: ast.expr, names: Set[str]) -> TypeGuard[ast.Call]:
    """Tell whether an expression is a call of one of some functions by its name."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _passes_on(node: ast.expr) -> TypeGuard[ast.Call]:
    """Tell whether an expression is a call that gives items of its arguments."""
    if not _calls(node, _PASS_ON):
        return False
    plain = all(isinstance(each.value, ast.Constant) for each in node.keywords)
    return plain and not any(isinstance(each, ast.Starred) for each in node.args)


def _counts(node: ast.expr) -> bool:
    """Tell whether an expression is a number, or a range of them."""
    return _calls(node, {"range"}) or isinstance(node, ast.Constant)


def _parts(node: ast.expr) -> list[ast.expr]:
    """Return the expressions for what a loop goes over, in the order in which they are evaluated."""
    return [each for part in node.args for each in _parts(part)] if _passes_on(node) else [node]


def _iterables(node: ast.expr) -> list[ast.expr]:
    """Return those that are evaluated before a loop."""
    return [each for each in _parts(node) if not _counts(each)]


def _ranges(node: ast.expr) -> list[ast.expr]:
    """Return the ranges that a loop goes over and that may be evaluated twice."""
    return [each for each in _parts(node) if _calls(each, {"range"}) and _is_plain(*each.args)]


def _disorders(node: ast.expr) -> bool:
    """Tell whether it may matter that ranges are evaluated after all else that a loop goes over."""
    parts = _parts(node)
    ranges = (at for at, each in enumerate(parts) if _calls(each, {"range"}))
    rest = parts[next(ranges, len(parts)) :]
    plain = all(_is_plain(each) or each in _ranges(each) for each in rest)
    return not plain and not all(map(_counts, rest))


def _is_plain(*nodes: ast.expr) -> bool:
    """Tell whether expressions change nothing."""
    inside = [each for node in nodes for each in ast.walk(node) if isinstance(each, ast.expr)]
    return all(isinstance(each, _PLAIN) or _calls(each, {"len"}) for each in inside)


def _given(node: Any, names: Iterator[str]) -> ast.expr:
    """Return what a loop goes over with names in place of what :func:`_iterables` returns."""
    if _passes_on(node):
        node.args = [_given(each, names) for each in node.args]
    found: ast.expr = node
    if not _passes_on(node) and not _counts(node):
        found = _placed(ast.Name(next(names), ast.Load()), node)
    return found


def _placed(node: Any, at: ast.AST) -> Any:
    """Give new nodes the place of an old one, as far as they have none of their own."""
    for each in ast.walk(node):
        if isinstance(each, (ast.stmt, ast.expr, ast.arg, ast.excepthandler)):
            ast.copy_location(each, at)
    return node


def _loads(node: ast.AST) -> Iterator[str]:
    """Yield the names whose values code may read."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Store):
            yield each.id
        elif isinstance(each, ast.AugAssign) and isinstance(each.target, ast.Name):
            yield each.target.id


def _catches(statement: ast.stmt) -> bool:
    """Tell whether code may go on after a statement although something inside of it has failed."""
    if isinstance(statement, ast.With):
        calls = [each.context_expr for each in statement.items]
        return not all(isinstance(each, ast.Call) and ast.unparse(each.func) in _MODES for each in calls)
    return isinstance(statement, ast.Try)


def _empty_before(path: _Path) -> dict[str, str]:
    """Return the names of lists and dictionaries that are empty when a loop begins and that nothing else can hold.

    Returns:
        These, each with the text that makes one.
    """
    block, at = path[-1]
    loop: Any = block[at]
    named, found = _named(loop.iter), dict[str, str]()
    for block, at in reversed(path):
        inside = block[at]
        if isinstance(inside, ast.With):
            named = named.union(*map(_named, inside.items))
        elif isinstance(inside, ast.If):
            named |= _named(inside.test)
        for each in reversed(block[:at]):
            if isinstance(each, (ast.Assign, ast.AnnAssign)) and each.value is not None:
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                text = ast.unparse(each.value)
                if isinstance(targets[0], ast.Name) and len(targets) == 1 and text in ("[]", "{}"):
                    found.update(dict.fromkeys(_bound(targets) - named, text))
            named |= _named(each)
    return found


def _named(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} | _rebound([node])


def _rebound(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that code binds or unbinds, in any way that Python has."""
    walked = [each for node in nodes for each in ast.walk(node)]
    texts = [getattr(each, field, None) for each in walked for field in ("name", "asname", "rest")]
    named = {text.partition(".")[0] for text in texts if isinstance(text, str)}  # of imports, handlers and patterns
    return named | {each.id for each in walked if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}


def _rebound_after(step: tuple[list[ast.stmt], int]) -> set[str]:
    """Return the names that what follows a statement in its block binds or unbinds, and so do handlers around it."""
    block, at = step
    parts = [getattr(block[at], name, []) for name in ("handlers", "orelse", "finalbody")]
    return _rebound([*block[at + 1 :], *(each for part in parts for each in part)])


def _seen_later(node: ast.AST) -> set[str]:
    """Return the names that code which may run later reads."""
    return {name for each in ast.walk(node) if isinstance(each, _LATER) for name in _loads(each)}


def _exposed(statement: ast.stmt) -> set[str]:
    """Return the names that a statement may read before it binds them."""
    if not isinstance(statement, ast.For):
        return set(_loads(statement))
    exposed, bound = set[str](), _bound([statement.target])
    for each in statement.body:
        exposed |= _exposed(each) - bound
        bound |= _binds(each)
    return exposed.union(_loads(statement.iter), *map(_loads, [statement.target, *statement.orelse]))


def _binds(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds in any case, once it has read what it reads."""
    if isinstance(statement, ast.AnnAssign):
        return _bound([statement.target]) if statement.value is not None else set()
    return _bound(statement.targets) if isinstance(statement, ast.Assign) else set()


def _bound(targets: Sequence[ast.expr]) -> set[str]:
    nested = [_bound(each.elts) for each in targets if isinstance(each, (ast.Tuple, ast.List))]
    return {each.id for each in targets if isinstance(each, ast.Name)}.union(*nested)


def _live_after(path: _Path) -> set[str]:
    """Return the names that code after a statement may read before it binds them anew."""
    live: set[str] = set()
    bound: set[str] = set()
    for block, at in reversed(path):
        statement = block[at]
        if _catches(statement):  # what follows may be reached from anywhere inside
            bound.clear()
        if isinstance(statement, ast.Try):  # an error may lead there from anywhere
            live |= {name for each in [*statement.handlers, *statement.finalbody] for name in _loads(each)}
        for each in block[at + 1 :]:
            live |= _exposed(each) - bound
            bound |= _binds(each)
        if isinstance(statement, ast.Try):
            live |= {name for each in statement.orelse for name in _loads(each)}
    return live
