"""The result of a call, put together as the user's code would have done, and what the call leaves."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rmtc import heuristics
from rmtc.analysis import Analysis
from rmtc.capture.arguments import Arguments
from rmtc.capture.effects import Effect
from rmtc.capture.kinds import MISSING, fingerprint
from rmtc.capture.objects import ExistingContainer, Label, build
from rmtc.capture.session import Session
from rmtc.capture.sizes import Sizes
from rmtc.capture.snapshot import Snapshot
from rmtc.capture.state import Slot
from rmtc.errors import RefusedError
from rmtc.restoring import restored
from rmtc.runtime.ready import Ready, apart
from rmtc.stages import substage


@dataclass
class Returns:
    """Puts the result of a call together, and leaves what the call leaves.

    Attributes:
        analysis: the capture, with what was proven.
        effects: what a call leaves in Python.
        written: the tensors that a call writes to, by name.
    """

    analysis: Analysis
    effects: tuple[Effect, ...]
    written: tuple[str, ...]
    _own: dict[str, str] = field(init=False)  # results that are written tensors themselves
    _containers: dict[str, Slot] = field(init=False)  # where the state has containers, by name
    _left: tuple[ExistingContainer, ...] = field(init=False)  # those of them that the call leaves in places
    _descriptions: dict[Sizes, Any] = field(default_factory=dict)  # of results, for sizes that are not admitted

    def __post_init__(self) -> None:
        first, slots = self.analysis.probes[0], self.analysis.capture.session.snapshot.slots
        self._own = {name: source for name, source in first.same.items() if source in self.written}
        self._containers = {slot.name: slot for slot in slots if isinstance(slot.value, (list, deque, dict))}
        parts = (each for effect in first.effects for each in effect.parts())
        self._left = tuple(each for each in parts if isinstance(each, ExistingContainer))

    def knows(self, sizes: Sizes) -> bool:
        """Tell whether the result of a call that hands something on is known, see :meth:`learn`."""
        return sizes in self._descriptions

    def learn(self, sizes: Sizes) -> None:
        """Find how the result of a call is put together that hands something on, whose sizes are not admitted."""
        self._descriptions[sizes] = self.of(sizes)
        if len(self._descriptions) > heuristics.DESCRIPTIONS_KEPT:
            del self._descriptions[next(iter(self._descriptions))]

    def of(self, sizes: Sizes) -> Any:
        """Return how the result of a call of some sizes is put together, where it begins as the captured one."""
        try:
            return self.analysis.result(sizes)
        except RefusedError:
            with as_captured(self.analysis.capture.session):
                return self.analysis.run(sizes).result

    def finished(self, ready: Ready, outputs: dict[str, Any], leave: bool = True) -> Any:
        """Return what the user's code would have returned, and leave all that it would have left.

        Args:
            ready: the call.
            outputs: its results, by the names of the loop's outputs.
            leave: whether anything is left.

        Raises:
            RefusedError: if that cannot be done.
        """
        known = ready.sizes in self._descriptions
        description = self._descriptions[ready.sizes] if known else self.analysis.result(ready.sizes)
        written = {name: ready.values[name] for name in self.written}
        own = {name: written[source] for name, source in self._own.items()}
        outputs = {name: value for name, value in outputs.items() if name not in own}
        outputs = apart(outputs, (ready.state or {}).values())  # no result is a part of what was given

        def other(asked: str | ExistingContainer) -> Any:
            if isinstance(asked, ExistingContainer):
                return self._container(asked, ready.arguments)
            return self.plain(asked, ready.sizes.segments)

        kept = [name for name, each in written.items() if each.requires_grad or outputs[f"write:{name}"].requires_grad]
        if ready.gradients and kept:
            raise RefusedError(
                f"gradients are asked for, and the call writes to {kept[0]} what depends on parameters",
                remedy="write there detached values under torch.no_grad(), or keep a new tensor in place of writing to "
                "one; of batch norm, call eval()",
            )
        results = _LazyResults({**_results_apart(outputs, written.values()), **own}, other)
        made: dict[Label, Any] = {}
        result = build(description, results, made)
        if leave:
            for place in self._left:  # before anything is written
                results[place] = results[place]
            self._leave(results, made, written)
        return result

    def _container(self, place: ExistingContainer, arguments: Arguments) -> Any:
        """Return what is in the place of a container that was there before the call."""
        if not isinstance(place.path, str):
            return arguments.containers()[place.path]
        found = self._containers[place.path].get()
        if found is MISSING:
            raise RefusedError(f"{place.path} is gone")
        return found

    def _leave(self, results: _LazyResults, made: dict[Label, Any], written: Mapping[str, torch.Tensor]) -> None:
        """Leave everything that a call leaves, or nothing."""
        effects = [effect if effect.slot.parent is None else effect.here() for effect in self.effects]
        undo = [effect.saved() for effect in effects]
        with torch.no_grad():
            before = {name: tensor.clone() for name, tensor in written.items()}
            try:
                for name, tensor in written.items():
                    tensor.copy_(results[f"write:{name}"])
                for effect in effects:
                    effect.apply(results, made)
            except BaseException:
                for name, tensor in written.items():
                    tensor.copy_(before[name])
                for put_back in undo:
                    put_back()
                raise

    def plain(self, name: str, segments: int) -> Any:
        """Return a value that a call leaves in Python: the same always, or advancing evenly with the segments."""
        first, third = self.analysis.probes
        low, high = first.plain[name], third.plain[name]
        if type(low) not in (int, float) or fingerprint(low) == fingerprint(high):
            return low
        steps, more = third.sizes.segments - first.sizes.segments, segments - first.sizes.segments
        if type(low) is float:
            return low + (high - low) / steps * more
        advance, rest = divmod((high - low) * more, steps)
        if rest:
            raise RefusedError(f"{name.removeprefix('state:')} is no whole number after {segments} segments")
        return low + advance


class _LazyResults(dict[Any, Any]):
    """Tensors by name, and what is no tensor, or in a place, when it is asked for."""

    def __init__(self, outputs: Mapping[str, Any], other: Callable[[Any], Any]) -> None:
        super().__init__(outputs)
        self._other = other

    def __missing__(self, name: Any) -> Any:
        return self._other(name)


_results_apart = substage("results")(apart)


@contextlib.contextmanager
def as_captured(session: Session) -> Iterator[None]:
    """Have everything in reach as the capture found it: its fake tensors go where they went then."""
    put_back = session.snapshot.present()  # what it found may be in reach of the user alone now
    if put_back is not None:
        with restored(put_back):
            session.snapshot.restore()
            yield
        return
    held = [each for each in session.snapshot.owners() if isinstance(each, (list, deque, dict, set))]
    held = [each for each in held if not isinstance(each, dict) or "__builtins__" not in each]
    now = Snapshot({**session.roots, "capture": held})
    with restored(now.restore):
        session.snapshot.restore()
        yield
