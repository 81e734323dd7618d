"""Many texts at once: they follow one another in lanes, without a ramp between them."""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from rmtc import heuristics
from rmtc.capture.own_modes import own_modes
from rmtc.errors import PackError, brief, failures, is_no_failure
from rmtc.lock import LOCK
from rmtc.restoring import outermost
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.ready import Ready
from rmtc.runtime.specialization import Specialization

logger = logging.getLogger(__name__)


class PackedCall(NamedTuple):
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Outcome(NamedTuple):
    """The end of a text: its result, or the exception that ended it."""

    text: int
    result: Any
    error: Exception | None = None


class Together(NamedTuple):
    """The end of several texts that were to be read at once.

    Attributes:
        texts: their numbers; none if the first one is to run alone.
        found: the outcomes; none if the run failed or does not pay.
        failed: what tells the run from others, if it failed.
    """

    texts: Sequence[int] = ()
    found: Sequence[Outcome] = ()
    failed: Any = None


class Pack:
    """Reads many texts with a compiled model, several at once; see :func:`rmtc.pack`.

    The results are those of one call after another, in order. Texts that the schedule does not serve run as such calls:
    those of one segment, those of a size that the model has not been called with often enough to pay for its
    admission, and all texts while gradients are asked for, or if a call reads what the one before it has left in the
    model.

    Args:
        compiled: the compiled call.
        lanes: number of texts that are read side by side; None for that which is estimated to be fastest.
        states: whether each result is a pair of the result and the state that the text leaves.
        state: what all texts begin with, an earlier text's; None if they begin anew.
    """

    def __init__(
        self,
        compiled: Compiled,
        lanes: int | None = None,
        states: bool = False,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._compiled, self.lanes, self._states, self._state = compiled, lanes, states, state
        self._said: set[str] = set()
        self._failed: dict[Any, None] = {}  # runs at once that failed, though each of their texts runs by itself

    def __call__(self, texts: Iterable[Any] | Mapping[str, Sequence[Any]], /, **kwargs: Any) -> list[Any]:
        """Read texts.

        Args:
            texts: the texts, each the model's first argument, such as ``input_ids`` (batch, positions), or a dict of
                arguments by name; or one dict of lists, with an item of each for each text. The batch size may differ
                from text to text, and so may the length. A generator must not change what it has given.
            kwargs: arguments that all texts have in common.

        Returns:
            The results in the order of the texts, each as the model returns it; with ``states=True`` pairs of a result
            and what :func:`rmtc.state` would return after a call of that text alone.

        Raises:
            PackError: if texts fail, once all others are read. It has their exceptions and the others' results.
            TypeError, ValueError: if what is given is no texts.
        """
        found: dict[int, Any] = {}
        for text, result in self._results(_calls(texts, kwargs), found):
            found[text] = result
        return [found[text] for text in range(len(found))]

    def as_completed(
        self, texts: Iterable[Any] | Mapping[str, Sequence[Any]], /, **kwargs: Any
    ) -> Iterator[tuple[int, Any]]:
        """Read texts as they come, and yield their results.

        Up to 64 texts are taken before they are read, and no more are held at a time. Results of texts that run
        together are yielded when the last one has ended. Such a run takes no further text once it has 1,024 segments
        and 16 texts. Texts must not change until their results are there, nor must the model be called or changed in
        between: what calls leave in it is that of texts whose results are still to come.

        Args:
            texts, kwargs: as in a call.

        Yields:
            The number of a text and its result.

        Raises:
            PackError: if texts fail, once all others are read; ``results`` is empty.
        """
        yield from self._results(_calls(texts, kwargs), {})

    def _results(self, calls: Iterable[PackedCall], found: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield the results of calls; if some fail, raise an error with those that were found at the end."""
        failed: dict[int, Exception] = {}
        for text, result, error in self._outcomes(calls):
            if error is None:
                yield text, result
            else:
                failed[text] = error
        if failed:
            raise PackError(failed, found)

    def _outcomes(self, calls: Iterable[PackedCall]) -> Iterator[Outcome]:
        """Read texts as they come, as many at once as may be."""
        numbered = enumerate(calls)
        left: deque[tuple[int, PackedCall]] = deque()
        alone: set[int] = set()  # texts that were to run together, which failed or does not pay
        failing: dict[Any, set[int]] = {}  # those of runs that failed, by what tells the run from others
        ended: BaseException | None = None
        while True:
            if not left or left[0][0] not in alone:
                try:
                    left.extend(itertools.islice(numbered, heuristics.PACKED - len(left)))
                except Exception as error:  # noqa: BLE001 (of the user's iterator: raised when what it gave is read)
                    ended, numbered = error, enumerate(())
            if not left:
                break
            if left[0][0] not in alone:
                group, found, failed = self._together(left)
                if found:
                    done = {outcome.text for outcome in found}
                    left = deque(each for each in left if each[0] not in done)
                    yield from found
                    continue
                alone.update(group)
                if failed is not None:
                    failing[failed] = set(group)
            outcome = self._alone(*left.popleft())
            alone.discard(outcome.text)
            self._blame(outcome, failing)
            yield outcome
        if ended is not None:
            raise ended

    def _blame(self, outcome: Outcome, failing: dict[Any, set[int]]) -> None:
        """Remember runs that failed though each of their texts runs by itself: they are not tried again."""
        for run, texts in [*failing.items()]:
            if outcome.text in texts:
                texts.discard(outcome.text)
                if outcome.error is None and not texts:
                    self._failed[run] = None
                    if len(self._failed) > heuristics.PLANS_KEPT:
                        del self._failed[next(iter(self._failed))]
                if outcome.error is not None or not texts:
                    del failing[run]

    def _alone(self, number: int, call: PackedCall) -> Outcome:
        """Read one text in a call of its own."""
        compiled = self._compiled
        target: Callable[..., Any] = compiled.function if isinstance(compiled.function, nn.Module) else compiled
        try:
            if not self._states and self._state is None:
                return Outcome(number, target(*call.args, **call.kwargs))
            result = compiled.hand_on(self._state, *call)
            return Outcome(number, (result, compiled.state) if self._states else result)
        except failures(Exception, but=is_no_failure) as error:
            return Outcome(number, None, error)

    @torch.compiler.disable(reason="rmtc runs these calls")  # type: ignore[untyped-decorator]
    @outermost
    def _together(self, calls: Iterable[tuple[int, PackedCall]]) -> Together:
        """Read at once what is ready of some texts, beginning with the first one."""
        compiled = self._compiled
        if _one_by_one(compiled):
            return Together()
        with compiled.counts.counted(), own_modes(compiled.captures.binding.inner), LOCK.shared():
            start = time.perf_counter()
            group = self._ready_at_once(calls)
            seconds = time.perf_counter() - start
            numbers = [number for number, _, _ in group]
            if len(group) < 2:
                return Together()
            group.sort(key=lambda each: (-each[2].sizes.segments, -each[2].sizes.tail))
            if not self._profitable(group):
                return Together(numbers)
            try:
                return Together(numbers, self._run(group, seconds, numbers[-1]))
            except failures(Exception, but=is_no_failure) as error:
                self._say(brief(error))
                logger.debug("a run of several texts failed", exc_info=error)
                return Together(numbers, failed=_sizes(group))

    def _ready_at_once(self, calls: Iterable[tuple[int, PackedCall]]) -> list[tuple[int, Specialization, Ready]]:
        """The texts that may be read together with the first one.

        They follow one another: a call between them might leave what a later one reads. Where none of them leaves
        anything, those of another kind may come between.
        """
        group: list[tuple[int, Specialization, Ready]] = []
        segments, least = 0, max(heuristics.PACKED_LEAST, 2 * (self.lanes or 0))
        for number, call in calls:
            if segments >= heuristics.PACKED_SEGMENTS and len(group) >= least:
                break
            of = self._ready(call)
            if isinstance(of, str):
                self._say(of)
            if of is None or isinstance(of, str):
                break
            specialization, ready = of
            alike = not group or (ready.made is group[0][2].made and ready.sizes.batch == group[0][2].sizes.batch)
            if alike:
                group.append((number, specialization, ready))
                segments += ready.sizes.segments
            elif specialization.leaves or group[0][1].leaves:
                break
        return group

    def _ready(self, call: PackedCall) -> tuple[Specialization, Ready] | str | None:
        """Return what runs a call beside others, and the call made ready; None or the reason if it is to run alone."""
        compiled, state = self._compiled, self._state
        try:
            arguments = compiled.captures.binding.bind(*call)
            if dict(arguments.named()).get("past_key_values") is not None:
                return None
            for specialization, sizes in compiled.captures.matching(arguments, []):
                told = sizes if state is None else specialization.tells(sizes, None)
                if (
                    (sizes.segments < 2 and state is None)
                    or specialization.entries.counter
                    or told in specialization.failed
                ):
                    return None
                if self._states and specialization.program.loop.ends_short:
                    return None  # by itself it says what is wrong
                if specialization.entries.why(told) is not None:
                    continue
                if state is None:
                    ready = specialization.ready(arguments, sizes, specialization.scheduled(sizes))
                else:
                    ready = specialization.ready_to_hand_on(arguments, sizes, state, told)
                if isinstance(ready, Ready):
                    if self._states and state is None and sizes.segments < ready.made.fewest:
                        return None  # by itself it says what is wrong
                    return specialization.apart(ready) or (specialization, replace(ready, hands_on=self._states))
        except failures(Exception, but=is_no_failure) as error:
            logger.debug("a guard failed", exc_info=error)  # the call by itself says what is wrong
        return None

    def _profitable(self, group: Sequence[tuple[int, Specialization, Ready]]) -> bool:
        """Tell whether to read texts at once: to lay out a run may take longer than it saves."""
        key = _sizes(group)
        if key in self._failed:
            return False
        specialization, ready = group[0][1:]
        if self.lanes is not None or not specialization.picker.arms:
            return True
        return specialization.picker.packing_profitable(ready, tuple(each.sizes for _, _, each in group))

    def _say(self, reason: str) -> None:
        """Say once why texts are read one by one."""
        if reason not in self._said:
            self._said.add(reason)
            logger.info("%s: texts are read one by one: %s", self._compiled.counts.title, reason)

    def _run(self, group: Sequence[tuple[int, Specialization, Ready]], seconds: float, last: int) -> Sequence[Outcome]:
        """Read texts of one program at once; what they leave in the model is what text number ``last`` leaves."""
        specialization, texts = group[0][1], [ready for _, _, ready in group]
        lanes = self.lanes or specialization.picker.lanes_for(tuple(each.sizes for each in texts))[0]
        ended: dict[int, Outcome] = {}

        def done(place: int, result: Any, state: dict[str, torch.Tensor]) -> None:
            if self._states:
                result = result, {name: each.detach().clone() for name, each in state.items()}
            ended[place] = Outcome(group[place][0], result)

        self._compiled.read_several()
        place_of_last = [number for number, _, _ in group].index(last)
        run = specialization.run_packed(texts, lanes, done, place_of_last)
        self._compiled.counts.ran(specialization, texts, run, seconds, lanes=min(lanes, len(texts)))
        return [*ended.values()]


def _one_by_one(compiled: Compiled) -> bool:
    """Tell whether all calls are to run as the model's own calls: rmtc is off, or hooks are to see each of them."""
    module = compiled.function if isinstance(compiled.function, nn.Module) else None
    hooks = module is not None and any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )
    return hooks or compiled.captures_now() or compiled.off() or compiled.captures.watched() is not None


def _sizes(group: Sequence[tuple[int, Specialization, Ready]]) -> Any:
    """Return what tells one run of several texts from another."""
    return weakref.ref(group[0][2].made), tuple(ready.sizes for _, _, ready in group)


def _calls(texts: Iterable[Any] | Mapping[str, Sequence[Any]], kwargs: dict[str, Any]) -> Iterator[PackedCall]:
    """Yield the calls of texts.

    Raises:
        TypeError, ValueError: if what is given is no texts.
    """
    if isinstance(texts, (torch.Tensor, str, bytes)) or not isinstance(texts, Iterable):
        raise TypeError(
            f"rmtc.pack takes a list of texts, or a dict of lists, and not {type(texts).__name__}: of one text, call "
            "the model"
        )
    if isinstance(texts, Mapping):
        lists = dict(texts)
        for name, each in lists.items():
            if isinstance(each, (torch.Tensor, str)) or not isinstance(each, Sequence):
                raise TypeError(f"{name} is a list with an item for each text, and not {type(each).__name__}")
        lengths = {name: len(each) for name, each in lists.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"each list has an item for each text, and these have {lengths}")
        texts = [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
    for text in texts:
        if isinstance(text, Mapping):
            if twice := sorted(kwargs.keys() & text.keys()):
                raise ValueError(f"{twice[0]} is given for all texts and for each")
            yield PackedCall((), {**kwargs, **text})
        else:
            yield PackedCall((text,), kwargs)
