"""Many texts at once: they follow one another in lanes, without a ramp between them."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from rmtc import heuristics
from rmtc.capture.own_modes import own_modes
from rmtc.errors import PackError, brief, is_no_failure
from rmtc.lock import LOCK
from rmtc.restoring import outermost
from rmtc.runtime.compiled import Compiled, has_cache
from rmtc.runtime.stats import LastRun
from rmtc.runtime.variant import Ready, Variant

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Outcome(NamedTuple):
    """What came of a text: its result, or the exception that ended it."""

    text: int
    result: Any
    error: Exception | None = None


class Pack:
    """Reads many texts with a compiled model, several at once; see :func:`rmtc.pack`.

    The results are those of one call after another, in order. Texts that the schedule does not serve run as such calls:
    those of one segment, those of a size that the model has not been called with often enough to pay for its
    admission, and all texts while gradients are asked for, or if a call reads what the one before it has left in the
    model.

    Args:
        compiled: the compiled call.
        lanes: number of texts that are read side by side; None for that which is estimated to be fastest.
    """

    def __init__(self, compiled: Compiled, lanes: int | None = None) -> None:
        self._compiled, self.lanes = compiled, lanes
        self._said: set[str] = set()

    def __call__(self, texts: Iterable[Any] | Mapping[str, Sequence[Any]], /, **kwargs: Any) -> list[Any]:
        """Read texts.

        Args:
            texts: the texts, each the model's first argument, such as ``input_ids`` (batch, positions), or a dict of
                arguments by name; or one dict of lists, with an item of each for each text. The batch size may differ
                from text to text, and so may the length.
            kwargs: arguments that all texts have in common.

        Returns:
            The results in the order of the texts, each as the model returns it.

        Raises:
            PackError: if texts fail, once all others are read. It has their exceptions and the others' results.
            TypeError, ValueError: if what is given is no texts.
        """
        found: dict[int, Any] = {}
        failed: dict[int, Exception] = {}
        for text, result, error in self._outcomes(_calls(texts, kwargs)):
            if error is None:
                found[text] = result
            else:
                failed[text] = error
        if failed:
            raise PackError(failed, found)
        return [found[text] for text in range(len(found))]

    def as_completed(
        self, texts: Iterable[Any] | Mapping[str, Sequence[Any]], /, **kwargs: Any
    ) -> Iterator[tuple[int, Any]]:
        """Read texts as they come, and yield results as they are done.

        No more than 64 texts are held at a time.

        Args:
            texts, kwargs: as in a call.

        Yields:
            The number of a text and its result.

        Raises:
            PackError: if texts fail, once all others are read; ``results`` is empty.
        """
        failed: dict[int, Exception] = {}
        for text, result, error in self._outcomes(_calls(texts, kwargs)):
            if error is None:
                yield text, result
            else:
                failed[text] = error
        if failed:
            raise PackError(failed, {})

    def _outcomes(self, calls: Iterable[Call]) -> Iterator[Outcome]:
        numbered = enumerate(calls)
        while window := list(itertools.islice(numbered, heuristics.PACKED)):
            yield from self._window(dict(window))

    def _window(self, calls: dict[int, Call]) -> Iterator[Outcome]:
        """Read some texts: what is ready at once, and the rest one after another."""
        last, state = max(calls), None
        failed: set[int] = set()
        while calls:
            if state != (state := self._state()):  # a call has made others ready
                found: dict[int, Outcome] = {}
                self._together(calls, last, found, failed)
                yield from found.values()
                calls = {number: call for number, call in calls.items() if number not in found}
            if calls:
                number = next(iter(calls))
                yield self._alone(number, calls.pop(number))

    def _state(self) -> Any:
        """What decides which texts may be read at once."""
        variants = list(self._compiled.variants)
        return [(id(each), frozenset(each.settled), len(each.analysis.admitted)) for each in variants]

    def _alone(self, number: int, call: Call) -> Outcome:
        """Read one text in a call of its own."""
        compiled = self._compiled
        target: Callable[..., Any] = compiled.function if isinstance(compiled.function, nn.Module) else compiled
        try:
            return Outcome(number, target(*call.args, **call.kwargs))
        except Exception as error:
            if is_no_failure(error):
                raise
            return Outcome(number, None, error)

    @torch.compiler.disable(reason="rmtc runs these calls")  # type: ignore[untyped-decorator]
    @outermost
    def _together(self, calls: Mapping[int, Call], last: int, found: dict[int, Outcome], failed: set[int]) -> None:
        """Read at once all texts that are ready.

        Args:
            calls: the calls, by the number of the text.
            last: the number of the text that is to leave its state in the model.
            found: takes the outcomes.
            failed: the texts that are to run alone, where it is said what is wrong with one.
        """
        compiled = self._compiled
        if _one_by_one(compiled):
            return
        with own_modes(compiled._inner), LOCK.shared():
            start = time.perf_counter()
            groups: dict[Any, list[tuple[int, Variant, Ready]]] = {}
            for number, call in calls.items():
                of = None if number in failed else _ready(compiled, call)
                if isinstance(of, str):
                    self._say(of)
                elif of is not None:
                    groups.setdefault((id(of[1].made), of[1].sizes.batch), []).append((number, *of))
            seconds = time.perf_counter() - start
            for group in groups.values():
                if len(calls) > sum(map(len, groups.values())) and group[0][1].leaves:
                    group = [each for each in group if each[0] != last]
                if len(group) < 2:
                    continue
                leave = group[-1][0] == last
                rest = group[: -1 if leave else None]
                group = sorted(rest, key=lambda each: -each[2].sizes.segments) + group[len(rest) :]
                try:
                    self._run(group, leave, found, seconds)
                except Exception as error:
                    if is_no_failure(error):
                        raise
                    self._say(brief(error))
                    logger.debug("a run of several texts failed", exc_info=error)
                    failed.update(number for number, _, _ in group)
                    for number, _, _ in group:
                        found.pop(number, None)

    def _say(self, reason: str) -> None:
        """Say once why texts are read one by one."""
        if reason not in self._said:
            self._said.add(reason)
            logger.info("%s: texts are read one by one: %s", self._compiled._title, reason)

    def _run(
        self, group: Sequence[tuple[int, Variant, Ready]], leave: bool, found: dict[int, Outcome], seconds: float
    ) -> None:
        """Read texts of one program at once."""
        compiled, variant, made = self._compiled, group[0][1], group[0][2].made
        sizes = [ready.sizes for _, _, ready in group]
        lanes = self.lanes or variant.lanes_for(sizes)

        def done(place: int, result: Any) -> None:
            number = group[place][0]
            found[number] = Outcome(number, result)

        run = variant.run_packed([ready for _, _, ready in group], lanes, done, leave)
        schedule, segments = made.program.schedule, sum(each.segments for each in sizes)
        with compiled._counts:
            compiled.stats.runs += len(group)
            compiled.stats.last_run = LastRun(
                segments=segments,
                layers=schedule.layers,
                batch=sizes[0].batch,
                tail=variant.last_length(max(sizes)),
                steps=run.steps,
                parts=max(schedule.parts, default=1),
                sequential_steps=segments * schedule.layers,
                makespan=run.steps,
                groups=run.groups,
                widths=run.widths,
                guard_seconds=seconds,
                schedule=made.kind,
                backend=made.backend,
                texts=len(group),
                lanes=min(lanes, len(group)),
            )


def _one_by_one(compiled: Compiled) -> bool:
    """Whether all calls are to run as the model's own calls: rmtc is off, or hooks are to see each of them."""
    module = compiled.function if isinstance(compiled.function, nn.Module) else None
    hooks = module is not None and any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )
    return hooks or compiled.captures_now() or compiled._off() or compiled._watched() is not None


def _ready(compiled: Compiled, call: Call) -> tuple[Variant, Ready] | str | None:
    """What runs a call together with others, and the call made ready; None or the reason if it is to run alone."""
    arguments = compiled._arguments(*call)
    if has_cache(dict(arguments.named())):
        return None
    for variant in list(compiled.variants):
        sizes = variant.match(arguments)
        if isinstance(sizes, str):
            continue
        if sizes.segments < 2 or variant.counter or sizes in variant.failed:
            return None
        if variant.refused and (sizes, variant.entry(sizes.batch)) in variant.refused:
            continue
        ready = variant.ready(arguments, sizes, variant.scheduled(sizes))
        if isinstance(ready, Ready):
            return variant.apart(ready) or (variant, ready)
    return None


def _calls(texts: Iterable[Any] | Mapping[str, Sequence[Any]], kwargs: dict[str, Any]) -> Iterator[Call]:
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
            yield Call((), {**kwargs, **text})
        else:
            yield Call((text,), kwargs)
