"""A text that comes in pieces: each segment is read when it is there."""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch

from rmtc.capture.arguments import Arguments
from rmtc.capture.own_modes import modes
from rmtc.errors import RefusedError, RmtcError, StateError, brief
from rmtc.ir.launches import TextSize
from rmtc.restoring import outermost
from rmtc.runtime.background import waits
from rmtc.runtime.chain import Chain
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.decisions import ReadyRun
from rmtc.runtime.executor import Executor
from rmtc.runtime.failed import reading_on
from rmtc.runtime.hooks import has_hooks
from rmtc.runtime.reading import TextInput
from rmtc.runtime.ready import Ready
from rmtc.runtime.specialization import Specialization

_VERSION = operator.attrgetter("_version")
_LAYOUT = torch.Tensor.data_ptr, operator.attrgetter("dtype", "shape"), torch.Tensor.stride
_PLAIN = (type(None), bool, int, float, str)


class _Segment(NamedTuple):
    """A piece that was one whole segment, which later ones are held against.

    Attributes:
        forms: what tells it from other tensors, by argument.
        alone: whether it was given as a tensor, and not by name.
        ready: the segment made ready.
        given: the tensors among the other arguments.
    """

    forms: dict[str, tuple[Any, ...]]
    alone: bool
    ready: Ready
    given: tuple[str, ...]


class Stream:
    """Reads a text as it comes, with a compiled model; see :func:`rmtc.stream`.

    The hidden states of the last segments stay in flight between calls. The result of a segment is there when it has
    passed all layers, which is when as many more have come as there are layers, less one; or with :meth:`flush`.

    A stream leaves nothing in the model, and reads nothing that calls or other streams leave there. It is for one
    thread. At the end of a ``with`` block it lets go of what it holds.

    Args:
        compiled: the compiled call.
        state: what the text goes on from, see :func:`rmtc.resume`; None if it begins anew.
        kwargs: arguments that all pieces have in common.
    """

    def __init__(self, compiled: Compiled, state: Mapping[str, torch.Tensor] | None, kwargs: Mapping[str, Any]) -> None:
        self._compiled = compiled
        self._kwargs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
        self._state = dict(state) if state is not None else None
        self._chain: Chain | None = None
        self._from: dict[str, torch.Tensor] = {}  # what it goes on from, by the names of the sources
        self._fewest = 0  # number of segments after which it can go on
        self._specialization: Specialization | None = None
        self._since: ReadyRun | None = None  # the last piece that was made ready
        self._batch = 0
        self._waiting: dict[str, torch.Tensor] = {}  # positions that fill no segment, by argument
        self._others: dict[str, Any] = {}  # the other arguments of the last piece
        self._dims: dict[str, int] = {}  # in which arguments grow with the text
        self._flying: deque[Ready] = deque()
        self._weights: dict[str, torch.Tensor] = {}
        self._lies: list[list[Any]] = []
        self._part: Ready | None = None  # the last segment of the last piece
        self._last: _Segment | None = None  # the last piece, if it was one segment
        self._as_of: int | None = None  # the version of the state's guard with which they were all in their places
        self._held: dict[str, torch.Tensor] = {}  # copies of what calls may change
        self._ended: str | None = None

    @torch.compiler.disable(reason="rmtc runs these calls")  # type: ignore[untyped-decorator]
    @outermost
    def feed(self, text: Any, /) -> list[Any]:
        """Read a piece of the text.

        Args:
            text: the piece, of any number of positions: the model's first argument, or a dict of arguments by name,
                such as ids and their mask. It may change afterwards.

        Returns:
            The results of the segments that have passed all layers with it, in order. Each is what the model returns
            for a text of this segment alone that goes on from those before.

        Raises:
            StateError, RefusedError, CaptureError: if the piece cannot be read. The stream stays as it was, unless
                weights have changed or the run itself failed.
        """
        self._refuse_ended()
        if self._chain is not None:
            self._chain.refuse_elsewhere()
        if (pieces := self._alike(text)) is not None:
            read: list[Any] | None = self._compiled.with_model(functools.partial(self._again, pieces))
            if read is not None:
                return read
        named = self._named(text)
        for name, value in self._waiting.items():
            piece, dim = named.get(name), self._dims[name]
            if not isinstance(piece, torch.Tensor) or piece.dim() != value.dim():
                raise StateError(f"{name} of the piece is no tensor like that of the one before")
            shapes = [(*each.shape[:dim], *each.shape[dim + 1 :]) for each in (piece, value)]
            if (piece.dtype, piece.device) != (value.dtype, value.device) or shapes[0] != shapes[1]:
                raise StateError(f"{name} of the piece is of another batch size, shape, dtype or device than before")
            named[name] = torch.cat([value, piece], dim)
        dims, length = self._growth(named)
        lengths = {name: named[name].shape[dim] for name, dim in dims.items()}
        if len({*lengths.values()}) > 1:
            raise StateError(f"the arguments of the piece differ in length: {lengths}")
        total = next(iter(lengths.values()))
        whole = total // length * length
        if not whole:  # nothing is read yet
            self._wait(named, dims, 0, total)
            return []
        cut = {name: value.narrow(dims[name], 0, whole) if name in dims else value for name, value in named.items()}
        found: list[Any] = self._with_ready(cut, last=False)
        self._wait(named, dims, whole, total - whole)
        self._last = self._segment(text, named) if total == length else None
        return found

    @torch.compiler.disable(reason="rmtc runs these calls")  # type: ignore[untyped-decorator]
    @outermost
    def flush(self) -> list[Any]:
        """Read all that is in flight, and the positions that wait, to the end. The next piece begins another segment.

        Returns:
            The results of all segments that are left, in order.

        Raises:
            StateError: if the stream has ended.
        """
        self._refuse_ended()
        if self._chain is not None:
            self._chain.refuse_elsewhere()
        if self._waiting:
            found: list[Any] = self._with_ready({**self._others, **self._waiting}, last=True)
            return found
        if self._chain is None:
            return []
        rest: list[Any] = self._compiled.with_model(self._finish)
        return rest

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The state of the text so far, as :func:`rmtc.state` returns it; to be asked for after :meth:`flush`.

        Raises:
            StateError: if segments are in flight, or nothing was read.
        """
        self._refuse_ended()
        if self._chain is not None or self._waiting:
            raise StateError("segments are in flight, or positions wait for a whole one", remedy="flush the stream")
        if self._state is None:
            raise StateError("nothing was read yet")
        return {name: value.detach().clone() for name, value in self._state.items()}

    def close(self) -> None:
        """Let go of all that the stream holds. Nothing more can be read."""
        self._end("the stream was closed")

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        if self._chain is not None:
            self._chain.close()
        self._chain = self._specialization = self._since = self._state = self._part = self._last = None
        for held in (self._waiting, self._others, self._weights, self._flying, self._from, self._held):
            held.clear()

    def _refuse_ended(self) -> None:
        if self._ended is not None:
            raise StateError(self._ended, remedy="begin another stream")

    def _named(self, text: Any) -> dict[str, Any]:
        """The arguments of a piece by name.

        Raises:
            TypeError: if it is no piece.
        """
        if isinstance(text, torch.Tensor):
            found = self._compiled.named((text,), self._kwargs)
        elif isinstance(text, Mapping) and all(isinstance(name, str) for name in text):
            found = self._compiled.named((), {**self._kwargs, **text})
        else:
            kind = type(text).__name__
            raise TypeError(f"a piece of a text is a tensor, or a dict of arguments by name, and not {kind}")
        own = text if isinstance(text, Mapping) else {name for name, value in found if value is text}
        if twice := sorted(self._kwargs.keys() & own):
            raise TypeError(f"{twice[0]} is given for all pieces and for this one")
        return dict(found)

    def _growth(self, named: Mapping[str, Any]) -> tuple[dict[str, int], int]:
        """The dimension in which each argument of a piece grows with the text, and the length of a segment.

        Raises:
            StateError: if no call of such arguments has shown them.
            RefusedError: if the text is no tensor by itself.
        """
        tensors = {name for name, value in named.items() if isinstance(value, torch.Tensor)}
        for specialization in (
            [self._specialization] if self._specialization is not None else list(self._compiled.specializations)
        ):
            growing = specialization.arguments.growing
            if growing and growing.keys() <= tensors:
                if any(len(dims) != 1 or named[name].dim() <= dims[0] for name, dims in growing.items()):
                    raise RefusedError("the text has several dimensions that grow, or fewer than before")
                return {name: dims[0] for name, dims in growing.items()}, specialization.program.loop.segment_length
        if self._compiled.options.background and waits():
            raise StateError(
                "no call of such a text has shown the loop yet, and a process in the background captures",
                remedy="wait until a call has run by the schedule, or call rmtc.resume(model, None) with the text",
            )
        raise StateError(
            "no call of such a text has shown the loop yet",
            remedy="call the model once, under torch.no_grad(), with a text of several segments as a tensor",
        )

    def _wait(self, named: Mapping[str, Any], dims: Mapping[str, int], start: int, count: int) -> None:
        """Keep the positions that fill no segment."""
        self._dims = dict(dims)
        self._waiting = {n: named[n].narrow(dim, start, count).clone() for n, dim in dims.items()} if count else {}
        self._others = {name: value for name, value in named.items() if name not in dims}

    def _segment(self, text: Any, named: Mapping[str, Any]) -> _Segment | None:
        """Return what later pieces are held against, if this one was a segment and no other argument can change.

        Args:
            text: the piece.
            named: its arguments by name, with the positions that have waited.
        """
        assert self._since is not None and self._part is not None
        alone, dims, arguments = isinstance(text, torch.Tensor), self._dims, self._since.ready.arguments.named()
        if (len(dims) > 1 if alone else text.keys() != dims.keys()) or not dims.keys().isdisjoint(self._kwargs):
            return None
        if not all(isinstance(value, torch.Tensor) or type(value) in _PLAIN for _, value in arguments):
            return None
        given = tuple(n for n, value in arguments if isinstance(value, torch.Tensor) and n not in dims)
        return _Segment({name: _form(named[name]) for name in dims}, alone, self._part, given)

    def _alike(self, text: Any) -> dict[str, torch.Tensor] | None:
        """Return the arguments of a piece by name, if it is a segment as the last one was."""
        last = self._last
        if last is None or self._chain is None or self._waiting:
            return None
        pieces = dict.fromkeys(last.forms, text) if last.alone else text
        if type(pieces) is not dict or not all(isinstance(each, torch.Tensor) for each in pieces.values()):
            return None
        if len(pieces) > 1 and len({*map(id, pieces.values())}) < len(pieces):
            return None
        return pieces if {name: _form(each) for name, each in pieces.items()} == last.forms else None

    def _again(self, pieces: Mapping[str, torch.Tensor]) -> list[Any] | None:
        """Read a segment that is as the last one was; return None if there is more to be looked at."""
        last, since, specialization, compiled = self._last, self._since, self._specialization, self._compiled
        assert last is not None and since is not None and specialization is not None
        if has_hooks(compiled.function) or compiled.captures.watched() is not None or specialization.modes != modes():
            return None
        ready = last.ready
        arguments = Arguments(ready.arguments.args, {**ready.arguments.kwargs, **pieces}, ready.arguments.names)
        if specialization.state.differs(arguments) is not None:
            return None
        self._refuse_changed(guarded=True)

        def read() -> list[Any]:
            values = {**ready.values, **{name: piece.clone() for name, piece in pieces.items()}}
            for name in last.given:
                values[name] = since.ready.values[name].clone()
            each = Ready(ready.sizes, values, arguments, ready.made, ready.gradients, ready.state, ready.hands_on)
            return self._read([each])

        return reading_on(read)

    def _with_ready(self, named: dict[str, Any], last: bool) -> Any:
        """Make a piece ready, and read it."""
        begins = self._state if self._chain is None else None
        before = None if self._state is not None else 0 if self._chain is None else self._chain.fed

        def run(decision: ReadyRun, _: float) -> list[Any]:
            return self._cut(decision, last)

        since = self._since if self._chain is not None and not last else None
        return self._compiled.with_ready((), named, begins, run, not last, since, before)

    def _cut(self, decision: ReadyRun, last: bool) -> list[Any]:
        """Read the segments of a piece, which are whole but for the last one of all."""
        specialization, ready = decision.specialization, decision.ready
        if self._specialization not in (None, specialization):
            what = (
                "under other modes (grad, inference, autocast)"
                if specialization.modes != self._specialization.modes
                else ""
            )
            raise StateError(f"the piece is another call than those before {what}".strip(), remedy="feed each alike")
        if self._specialization is not None and ready.sizes.batch != self._batch:
            raise StateError(f"the stream has a batch of {self._batch}, and the piece one of {ready.sizes.batch}")
        dims = {name: sizes[0] for name, sizes in specialization.arguments.growing.items()}
        (total,) = {ready.values[name].shape[dim] for name, dim in dims.items()}
        length = total if last else specialization.program.loop.segment_length
        if self._chain is None:
            self._hold(ready)
        parts = []
        for start in range(0, total, length):
            part = {name: ready.values[name].narrow(dim, start, length).clone() for name, dim in dims.items()}
            parts.append(replace(ready, values={**self._own(ready, dims), **part}))
        if self._chain is None:
            self._dims = dims
            self._open(ready, 0 if last else length)
        else:
            self._refuse_changed(guarded=True)
        self._specialization, self._batch = specialization, ready.sizes.batch
        self._since, self._part = (decision, parts[-1]) if not last else (self._since, self._part)
        return self._read(parts, length if last else 0)

    def _read(self, parts: Sequence[Ready], last: int = 0) -> list[Any]:
        """Read segments, or a last one of all of some length."""
        found: list[Any] = []
        try:
            for each in parts:
                found += self._finish(each, last) if last else self._go_on(each)
        except BaseException as error:  # also between two of them
            self._end(f"the stream has failed: {error.reason if isinstance(error, RmtcError) else brief(error)}")
            raise
        return found

    def _hold(self, ready: Ready) -> None:
        """Tell the model's tensors that must not change from those that calls may change, which are copied."""
        sources, outputs = ready.made.program.loop.sources, ready.made.program.loop.outputs
        left = {str(name).partition(":")[2] for name in outputs if str(name).startswith(("state:", "write:"))}
        own = [name for name in ready.values if name in sources and sources[name].kind != "input"]
        changing = {
            n for n in own if left & {n, *sources[n].names, *(e.removeprefix("self.") for e in sources[n].names)}
        }
        self._weights = {name: ready.values[name] for name in own if name not in changing}
        self._lies = _lie(self._weights.values())
        self._held = {name: ready.values[name].clone() for name in changing}

    def _own(self, ready: Ready, dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return what a segment reads besides its text: weights, and copies of what may change meanwhile."""
        given = {name for name, _ in ready.arguments.named()} - dims.keys()
        return {**ready.values, **{n: v.clone() for n, v in ready.values.items() if n in given}, **self._held}

    def _open(self, ready: Ready, length: int) -> None:
        """Begin to read segments of a length; of no known one, if it is 0.

        Raises:
            RefusedError: if the model cannot go on.
        """
        goes_on = ready.made.resuming()  # says why, if not
        runner, batch, loop = ready.runner, ready.sizes.batch, ready.made.program.loop
        assert isinstance(runner, Executor)
        if length and runner.opened.get(batch) is not runner.program:
            # Cells that are not to run at once are found out before anything is in flight.
            given, count = dict(ready.given), len(goes_on.program.loop.rows) + len(loop.rows) + 2
            for name, dim in self._dims.items():
                given[name] = torch.cat([given[name].narrow(dim, 0, length)] * count, dim)
            runner.read([TextInput(given, TextSize(count, length))], batch, lambda *_: None)
            runner.opened[batch] = runner.program
        self._chain = Chain(runner, batch, self._state)
        self._from, self._fewest = dict(ready.state or {}), ready.made.fewest

    def _go_on(self, ready: Ready) -> list[Any]:
        """Read a segment, and return the results of those that have ended with it."""
        self._flying.append(ready)
        values = {**ready.values, **self._from} if self._from else ready.values
        return self._run([TextInput(values, TextSize(1, ready.made.program.loop.segment_length))])

    def _finish(self, ready: Ready | None = None, length: int = 0) -> list[Any]:
        """Read all to the end, with a last segment if there is one."""
        chain, specialization = self._chain, self._specialization
        assert chain is not None and specialization is not None
        if ready is None:
            if specialization.modes != modes():
                raise StateError("the stream is under other modes than before (grad, inference, autocast)")
            differs = specialization.state.differs()
            self._refuse_changed(guarded=differs is None)
            if differs is not None:  # a layer in the place of another, say
                self._end(f"the model was changed while segments were in flight: {differs}")
                self._refuse_ended()
        else:
            self._flying.append(ready)
        fewest = self._fewest if self._state is None else 0
        values = {} if ready is None else {**ready.values, **self._from}
        found = self._run([TextInput(values, TextSize(1, length, hands_on=True))] if ready is not None else [])
        self._state, begun = chain.state, self._state is None
        self._chain, self._waiting = None, {}
        if begun and chain.fed < fewest:
            self._end(f"the stream was flushed after {chain.fed} segment(s), and can go on after {fewest} alone")
        return found

    def _run(self, texts: list[TextInput]) -> list[Any]:
        chain, specialization, found = self._chain, self._specialization, list[Any]()
        assert chain is not None and specialization is not None

        def done(_: int, outputs: dict[str, Any]) -> None:
            found.append(specialization.result_of(self._flying.popleft(), outputs))

        try:
            chain.executor.read(texts, self._batch, done, chain=chain)
        except BaseException as error:
            self._end(f"the stream has failed: {error.reason if isinstance(error, RmtcError) else brief(error)}")
            raise
        self._compiled.counts.streamed(len(texts))
        return found

    def _refuse_changed(self, guarded: bool) -> None:
        """Refuse weights, and other tensors of the model, that changed while segments are in flight.

        Args:
            guarded: whether the state's guard has just seen the state, as it does for a piece.

        Raises:
            StateError: with their names.
        """
        assert self._specialization is not None
        reads, held, version = self._specialization.reads, self._weights, self._specialization.state.version
        lies, were = _lie(held.values()), self._lies
        if guarded and version == self._as_of and lies == were:
            return
        now = reads.values() if guarded else reads.now(held)
        places = [*map(now.get, held, held.values())]
        if lies == were and all(map(operator.is_, places, held.values())):
            self._as_of = version if guarded and all(map(reads.keeps, held)) else None
            return
        moved = [one != other for one, other in zip(zip(*lies, strict=True), zip(*were, strict=True), strict=True)]
        changed = [
            name for (name, was), has, place in zip(held.items(), moved, places, strict=True) if has or place is not was
        ]
        self._end(f"weights were changed while segments were in flight: {', '.join(changed)}")
        self._refuse_ended()


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from others, but for what it holds."""
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return type(tensor), tensor.shape, strides, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad


def _lie(tensors: Collection[torch.Tensor]) -> list[list[Any]]:
    """Return how and where tensors lie, and how often each was written to; of those of inference mode no one knows."""
    try:
        written = [*map(_VERSION, tensors)]
    except RuntimeError:
        written = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    return [[*map(of, tensors)] for of in _LAYOUT] + [written]
