"""A text that comes in pieces: each segment is read when it is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from rmtc.errors import RefusedError, RmtcError, StateError
from rmtc.restoring import outermost
from rmtc.runtime.chain import Chain
from rmtc.runtime.compiled import Compiled, ReadyRun
from rmtc.runtime.executor import Executor
from rmtc.runtime.reading import TextInput
from rmtc.runtime.variant import Ready, Variant


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
        self._compiled, self._kwargs = compiled, dict(kwargs)
        self._state = dict(state) if state is not None else None
        self._chain: Chain | None = None
        self._from: dict[str, torch.Tensor] = {}  # what it goes on from, by the names of the sources
        self._variant: Variant | None = None
        self._batch = 0
        self._waiting: dict[str, torch.Tensor] = {}  # positions that fill no segment, by argument
        self._others: dict[str, Any] = {}  # the other arguments of the last piece
        self._dims: dict[str, int] = {}  # in which arguments grow with the text
        self._flying: deque[Ready] = deque()
        self._weights: list[tuple[str, torch.Tensor, int]] = []
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
        args, kwargs = ((), {**self._kwargs, **text}) if isinstance(text, Mapping) else ((text,), self._kwargs)
        if self._waiting:
            named = dict(self._compiled.named(args, kwargs))
            for name, value in self._waiting.items():
                piece = named.get(name)
                if not isinstance(piece, torch.Tensor) or piece.dim() != value.dim():
                    raise StateError(f"{name} of the piece is no tensor like that of the one before")
                dim = self._dims[name]
                if piece.dtype != value.dtype or piece.shape[:dim] != value.shape[:dim]:
                    raise StateError(f"{name} of the piece is of another batch size or dtype than before")
                named[name] = torch.cat([value, piece], dim)
            args, kwargs = (), named
        return self._read(args, kwargs, last=False)

    @torch.compiler.disable(reason="rmtc runs these calls")  # type: ignore[untyped-decorator]
    @outermost
    def flush(self) -> list[Any]:
        """Read all that is in flight, and the positions that wait, to the end. The next piece begins another segment.

        Returns:
            The results of all segments that are left, in order.

        Raises:
            StateError: if the stream has ended.
        """
        if self._waiting:
            return self._read((), {**self._others, **self._waiting}, last=True)
        self._refuse_ended()
        return self._compiled.with_model(self._finish) if self._chain is not None else []

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
        self._chain = self._variant = self._state = None
        for held in (self._waiting, self._others, self._weights, self._flying, self._from):
            held.clear()

    def _refuse_ended(self) -> None:
        if self._ended is not None:
            raise StateError(self._ended, remedy="begin another stream")

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], last: bool) -> list[Any]:
        """Make a piece ready, and read its whole segments; of the last one all that is there."""
        self._refuse_ended()
        begins = self._state if self._chain is None else None
        found: list[Any] = self._compiled.with_ready(
            args, kwargs, begins, lambda decision, _: self._cut(decision, last), piece=not last
        )
        return found

    def _cut(self, decision: ReadyRun, last: bool) -> list[Any]:
        """Read the whole segments of a piece; of the last one all that is there."""
        variant, ready = decision.variant, decision.ready
        if self._variant not in (None, variant):
            raise StateError("the piece is another call than those before", remedy="give each the same arguments")
        self._dims, length = variant.arguments.growing, variant.program.loop.segment_length
        if not self._dims:
            raise RefusedError("the text is a list, or no argument by itself", remedy="give it as one tensor")
        if self._variant is not None and ready.sizes.batch != self._batch:
            raise StateError(f"the stream has a batch of {self._batch}, and the piece one of {ready.sizes.batch}")
        self._refuse_changed(ready)
        (total,) = {ready.values[name].shape[dim] for name, dim in self._dims.items()}
        whole, rest = (0, total) if last else divmod(total, length)

        def part(start: int, count: int) -> dict[str, torch.Tensor]:
            return {name: ready.values[name].narrow(dim, start, count).clone() for name, dim in self._dims.items()}

        if (whole or last) and self._chain is None:
            self._open(ready, length if whole else 0)
        self._variant, self._batch = variant, ready.sizes.batch
        found: list[Any] = []
        for number in range(whole):
            found += self._go_on(replace(ready, values={**ready.values, **part(number * length, length)}), length)
        waiting = part(whole * length, rest) if rest else {}
        if last:
            return found + self._finish(replace(ready, values={**ready.values, **waiting}), rest)
        self._waiting = waiting
        self._others = {name: value for name, value in ready.arguments.named() if name not in self._dims}
        return found

    def _open(self, ready: Ready, length: int) -> None:
        """Begin to read segments of a length; of no known one, if it is 0.

        Raises:
            RefusedError: if the model cannot go on.
        """
        rows = len(ready.made.resuming().program.loop.rows)  # says why, if not
        runner, batch = ready.runner, ready.sizes.batch
        assert isinstance(runner, Executor)
        known = id(runner.program), batch
        if length and known not in runner.opened:
            # Cells that are not to run at once are found out before anything is in flight.
            given, count = dict(ready.given), rows + len(ready.made.program.loop.rows) + 2
            for name, dim in self._dims.items():
                given[name] = torch.cat([given[name].narrow(dim, 0, length)] * count, dim)
            runner.read([TextInput(given, count, length)], batch, lambda *_: None)
            runner.opened.add((id(runner.program), batch))
        self._chain, self._from = Chain(runner, batch, self._state), dict(ready.state or {})

    def _go_on(self, ready: Ready, length: int) -> list[Any]:
        """Read a segment, and return the results of those that have ended with it."""
        self._flying.append(ready)
        return self._run([TextInput({**ready.values, **self._from}, 1, length, hands_on=False)])

    def _finish(self, ready: Ready | None = None, length: int = 0) -> list[Any]:
        """Read all to the end, with a last segment if there is one."""
        chain, variant = self._chain, self._variant
        assert chain is not None and variant is not None
        if ready is not None:
            self._flying.append(ready)
        fewest = self._flying[0].made.fewest if self._state is None else 0
        last = [TextInput({**ready.values, **self._from}, 1, length)] if ready is not None else []
        found = self._run(last)
        self._state, begun = chain.state, self._state is None
        self._chain, self._waiting = None, {}
        if begun and chain.fed < fewest:
            self._end(f"the stream was flushed after {chain.fed} segment(s), and can go on after {fewest} alone")
        return found

    def _run(self, texts: list[TextInput]) -> list[Any]:
        chain, variant, found = self._chain, self._variant, list[Any]()
        assert chain is not None and variant is not None

        def done(_: int, outputs: dict[str, Any]) -> None:
            found.append(variant.result_of(self._flying.popleft(), outputs))

        try:
            chain.executor.read(texts, self._batch, done, chain=chain)
        except BaseException as error:
            what = error.reason if isinstance(error, RmtcError) else type(error).__name__
            self._end(f"the stream has failed: {what}")
            raise
        self._compiled.streamed(len(texts))
        return found

    def _refuse_changed(self, ready: Ready) -> None:
        """Refuse weights that changed while segments are in flight.

        Raises:
            StateError: with their names.
        """
        values = ready.values
        if self._chain is None:
            sources, written = ready.made.program.loop.sources, ready.made.program.writes()
            self._weights = [
                (name, value, _version(value))
                for name, value in values.items()
                if name not in written and name in sources and sources[name].kind in ("parameter", "buffer")
            ]
            return
        changed = [n for n, one, version in self._weights if values[n] is not one or _version(one) != version]
        if changed:
            self._end(f"weights were changed while segments were in flight: {', '.join(changed)}")
            self._refuse_ended()


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to; of one that was made in inference mode that is not known."""
    return -1 if tensor.is_inference() else tensor._version
