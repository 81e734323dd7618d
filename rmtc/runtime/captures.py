"""The captures of a compiled module or function: what serves a call, and what is made for one that none serves."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rmtc import heuristics
from rmtc.analysis import Analysis, prove_analysis
from rmtc.capture import capture_of
from rmtc.capture.arguments import Arguments
from rmtc.capture.binding import Binding
from rmtc.capture.guards import ArgumentGuard
from rmtc.capture.own_modes import modes
from rmtc.capture.session import Session
from rmtc.capture.sizes import Sizes
from rmtc.capture.state_guard import StateGuard
from rmtc.errors import RefusedError, RmtcError, StateError, brief, failures, is_out_of_memory, lean, raised_by_signal
from rmtc.lock import LOCK
from rmtc.recall import entry_of, recalled, remember, taken_up
from rmtc.runtime.background import Background, waits
from rmtc.runtime.choice import New
from rmtc.runtime.counts import Counts
from rmtc.runtime.decisions import (
    BACKGROUND,
    CACHE,
    ONE,
    SELDOM,
    Admit,
    CaptureAnew,
    Eager,
    Few,
    KnownCalls,
    Options,
    Outcome,
    ReadyRun,
    in_generate,
    sentence,
    written_by_choice,
)
from rmtc.runtime.hooks import hook_tables, hooked
from rmtc.runtime.picker import ConflictError
from rmtc.runtime.ready import Ready
from rmtc.runtime.recompute import Recompute
from rmtc.runtime.specialization import Specialization
from rmtc.runtime.weights import refuse_elsewhere
from rmtc.stages import stage, substage

logger = logging.getLogger(__name__)


class Captures:
    """The captures of a compiled module or function, and the decision which of them a call runs by.

    Args:
        function: the module or function.
        options: how it is compiled.
        counts: of its calls.

    Attributes:
        binding: names the arguments of calls.
        specializations: the captures, the last one first.
        known: what is known of calls that are not scheduled, by structure.
        worked: number of captures and admissions, ended or not: what was decided before one is decided anew after it.
        background: captures in processes of their own, if that was asked for.
    """

    def __init__(self, function: Callable[..., Any], options: Options, counts: Counts) -> None:
        self.function, self.options, self.counts, self.stats = function, options, counts, counts.stats
        self.binding = Binding(function)
        self.specializations: list[Specialization] = []
        self.known: dict[Any, KnownCalls] = {}
        self.worked = 0
        self.background = Background() if options.background else None
        self._made = self._replaced = self._probes = self._shorts = 0
        self._hooks: tuple[list[nn.Module], list[Mapping[int, Any]]] | None = None

    def decide(self, arguments: Arguments) -> Outcome:
        """Decide whether a call runs with a schedule, or as written and why: the first reason that holds."""
        given = dict(arguments.named())
        if given.get("past_key_values") is not None or in_generate(self.function):
            return Eager(quiet=CACHE)
        if (short := self._short(arguments)) is not None:
            return short
        if (watched := self.watched()) is not None:
            return Eager(watched)
        # Look for a capture that serves the call.
        differences: list[str] = []
        own: str | None = None  # why what was captured of such calls is refused for this one
        for specialization, sizes in self.matching(arguments, differences):
            if sizes.segments < 2:
                return Eager()
            pick = specialization.pick(sizes)
            if pick is not None and pick.arm.written:
                return Eager(quiet=written_by_choice(pick), chosen=(specialization, pick, sizes))
            failed, entries = specialization.failed.now(sizes), specialization.entries
            refused = entries.why(sizes) if entries.counter is None else None
            ready: Ready | Eager | str | None = None
            if failed is not None:
                ready = Eager(failed.reason, detail=failed.detail)
            else:
                ready = refused or specialization.ready(arguments, sizes, None if pick is None else pick.arm)
            if ready is None and entries.counter is not None and entries.found(sizes.batch) not in entries.known:
                ready = Eager(entries.counter)
            if isinstance(ready, Ready):
                return ReadyRun(specialization, ready, pick)
            anew = refused is not None and ready is refused and self._first_alone(arguments)
            if ready is not None and not anew and specialization.picker.put_off(pick):
                return self.decide(arguments)
            if isinstance(ready, Eager):
                return ready
            if ready is not None:
                differences.append(ready)
                own = refused or own
                continue
            written = specialization.picker.as_written(pick)
            if written is not None and not specialization.picker.profitable(pick, sizes):
                return Eager(quiet=SELDOM, chosen=(specialization, written, sizes))
            return Admit(specialization, sizes, pick)
        # See what is known of such calls, and whether one more may be captured.
        known = self.known.get(self._key(arguments))
        if known is not None and known.kinds != self._kinds():
            known = None
        if known is not None and known.broken is not None and known.errors >= heuristics.FAILED_CAPTURES:
            return known.broken
        tired = known is not None and known.tries > self.options.recompile_limit
        if known is not None and (known.state is None or tired or known.holds(arguments)):
            if (refusal := known.refusal_of(arguments)) is not None:
                if own is not None and own != refusal.reason:  # it is that of another call
                    return Eager(own, known=known)
                return Eager(refusal.reason, refusal, known=known)
            if known.is_short(arguments):
                return Eager(known=known)
        limited = self._limited(differences)
        if limited is not None:
            return limited
        if self._probes > heuristics.SINGLE_SEGMENT_PROBES:
            return Eager(
                f"{heuristics.SINGLE_SEGMENT_PROBES} calls of as many structures were of one segment",
                detail="no more are looked at",
            )
        if self.background is not None and waits():
            return Eager(quiet=BACKGROUND)
        return CaptureAnew(tuple(differences))

    def _first_alone(self, arguments: Arguments) -> bool:
        """Tell whether there is one capture, of a first call, and none for calls as this one has failed."""
        known = self.known.get(self._key(arguments))
        return self._made == 1 and (known is None or (known.refusal is None and known.broken is None))

    def matching(self, arguments: Arguments, differences: list[str]) -> Iterator[tuple[Specialization, Sizes]]:
        """Yield the captures that may serve a call, each with its sizes.

        Args:
            arguments: those of the call.
            differences: takes what the call differs in from each other capture.
        """
        for specialization in list(self.specializations):
            sizes = specialization.match(arguments)
            if isinstance(sizes, str):
                differences.append(sizes)
            else:
                yield specialization, sizes

    def _short(self, arguments: Arguments) -> Eager | None:
        """Return what becomes of a call that is so short that the code as written is faster, told from its sizes alone.

        It is right to run such a call as it is, whatever has changed in the model since. Some go the long way: a model
        that has changed may cut the same text into several segments.
        """
        now, short = modes(), None
        for specialization in list(self.specializations):
            sizes = specialization.arguments.sizes(arguments) if specialization.modes == now else ""
            loop = specialization.program.loop  # where the last segment is apart, one of two may look as one of one
            if not isinstance(sizes, str) and not ("apart" in loop.fixed and loop.other_size(*sizes[1:])):
                pick = specialization.pick(sizes) if sizes.segments > 1 else None
                if sizes.segments > 1 and not (pick is not None and pick.arm.written):
                    return None
                # Of several captures it is not known yet whose call it is: then what it takes does not count.
                chosen = (specialization, pick, sizes) if pick is not None and len(self.specializations) == 1 else None
                short = Eager(quiet=ONE if pick is None else written_by_choice(pick), chosen=chosen)
        if short is not None:
            self._shorts += 1
            return None if self._shorts % heuristics.SHORT_CALLS_PER_LOOK == 1 else short
        known = self.known.get(self._key(arguments))
        if known is None or not known.is_short(arguments):
            return None
        known.calls += 1
        return None if known.calls % heuristics.SHORT_CALLS_PER_LOOK == 1 else Eager(known=known)

    def _limited(self, differences: Sequence[str]) -> Eager | None:
        """Return what becomes of a call that would be one capture too many; None if it would not."""
        limit = self.options.recompile_limit
        if max(self._made, self._replaced) <= limit:
            return None
        why = "; ".join(dict.fromkeys(differences)) or "a call of another structure"
        return Eager(f"recompile_limit = {limit} is reached", detail=why)

    @substage("key of a call")
    def _key(self, arguments: Arguments) -> Any:
        """Return what calls of one structure share."""
        leaves = tuple(
            (path, (leaf.dtype, leaf.ndim, leaf.device) if isinstance(leaf, torch.Tensor) else str(leaf))
            for path, leaf in arguments.leaves().items()
        )
        return leaves, modes(), getattr(self.function, "training", None)

    def _kinds(self) -> frozenset[Any]:
        """Return the kinds of parameters that the model has."""
        if not isinstance(self.function, nn.Module):
            return frozenset()
        return frozenset((type(each), each.dtype, each.device) for each in self.function.parameters())

    def watched(self) -> str | None:
        if self._hooks is None:
            self._watch()
        return hooked(*self._hooks) if self._hooks is not None else None

    def _watch(self, others: Sequence[nn.Module] = ()) -> None:
        """Collect the tables of hooks of every module in reach."""
        known = [*self.function.modules()] if isinstance(self.function, nn.Module) else []
        known += [*others, *(each for specialization in self.specializations for each in specialization.state.modules)]
        modules = [*{id(module): module for module in known if module is not self.function}.values()]
        self._hooks = modules, hook_tables(modules)

    def run_once(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that is ready by its schedule, whatever modes are on: for those who want to watch it.

        Raises:
            RefusedError: if it is not ready.
        """
        arguments = self.binding.bind(args, kwargs)
        with LOCK.shared():
            for specialization, sizes in self.matching(arguments, []):
                pick = specialization.pick(sizes)
                arm = pick.arm if pick is not None and not pick.arm.written else None
                ready = specialization.ready(arguments, sizes, arm)
                if isinstance(ready, Ready):
                    return specialization.run(ready).result
        raise RefusedError("the call has not run by its schedule before")

    def again(self, arguments: Arguments, since: ReadyRun | None) -> ReadyRun | None:
        """Return the call made ready if it is as one before it was; None if it has to be looked at anew."""
        if since is None or self.watched() is not None:
            return None
        sizes = since.specialization.match(arguments)
        if isinstance(sizes, str):
            return None
        values, own = {**since.ready.values, **arguments.named_tensors()}, since.ready.sizes._replace(batch=sizes.batch)
        return replace(since, ready=replace(since.ready, sizes=own, arguments=arguments, values=values))

    def to_hand_on(
        self, arguments: Arguments, state: Mapping[str, torch.Tensor] | None, piece: bool, before: int | None
    ) -> ReadyRun | Admit | CaptureAnew:
        """Decide what it takes to run a call that hands something on; see :meth:`Specialization.tells`.

        Raises:
            StateError, RefusedError, CaptureError: if it is not to run.
        """
        if dict(arguments.named()).get("past_key_values") is not None:
            raise StateError("it is given a cache, which such a call cannot read")
        if (watched := self.watched()) is not None:
            raise StateError(watched)
        differences: list[str] = []
        for specialization, sizes in self.matching(arguments, differences):
            if piece:
                sizes = sizes._replace(segments=1, tail=specialization.program.loop.segment_length)
            told = specialization.tells(sizes, before, piece)
            if (why := specialization.entries.why(told)) is not None:
                raise RefusedError(why)
            if told in specialization.failed:
                raise RefusedError(specialization.failed[told].reason)
            ready = specialization.ready_to_hand_on(arguments, sizes, state, told)
            if isinstance(ready, Ready):
                if piece and ready.gradients:
                    raise StateError("gradients are asked for", remedy="read a stream under torch.no_grad()")
                return ReadyRun(specialization, ready)
            if ready is None:
                return Admit(specialization, sizes, told=told)
            differences.append(ready)
        if piece:
            what = f"; of those that were made, {'; '.join(differences)}" if differences else ""
            raise StateError(
                f"no call of such a text has shown the loop yet{what}",
                remedy="read under torch.no_grad(), and call the model once so with a text of several segments"
                if torch.is_grad_enabled()
                else "call the model once with a text of several segments",
            )
        known = self.known.get(self._key(arguments)) or KnownCalls()
        if (refusal := known.refusal_of(arguments)) and (known.state is None or known.holds(arguments)):
            raise copy.copy(refusal)
        if known.is_short(arguments):
            raise StateError(
                "the text is one segment, and no call has shown the loop yet",
                remedy="call the model once with a text of several segments",
            )
        if (limited := self._limited(differences)) is not None:
            raise RefusedError(sentence(limited))
        return CaptureAnew(tuple(differences), at_once=True)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Try no other way to run calls for now: for those who measure them."""
        specializations = list(self.specializations)
        for specialization in specializations:
            specialization.picker.frozen = True
        try:
            yield
        finally:
            for specialization in specializations:
                specialization.picker.frozen = False

    def broken(self, stage: str, error: Exception) -> Eager:
        """Return what becomes of a call after an error inside rmtc, which breaks no call of the user's.

        Raises:
            RmtcError: in strict mode.
        """
        what = brief(error)
        made = RmtcError(
            f"an error inside rmtc, in {stage}: {what}",
            remedy="report it, please, with the traceback that logging (rmtc, level DEBUG) shows",
        )
        logger.debug("an error inside rmtc, in %s", stage, exc_info=error)
        if self.options.strict:
            raise made from error
        return Eager(f"an error inside rmtc, in {stage}; please report it", made, what)

    def work(self, decision: Admit | CaptureAnew, arguments: Arguments) -> Eager | None:
        """Capture or admit a call, or remember why not.

        Returns:
            What becomes of this call where an error inside rmtc, or the limit, ended it, or where it is captured in the
            background.
        """
        if isinstance(decision, CaptureAnew):
            return self._capture(decision, arguments)
        specialization, sizes, told = decision.specialization, decision.sizes, decision.told or decision.sizes
        entry, start = specialization.entries.found(sizes.batch), time.perf_counter()
        whole = told not in specialization.analysis.admitted and specialization.picker.novelty(told) is New.TRACE
        try:
            if decision.told is not None:
                specialization.admit(told, lambda: self._session(arguments), specialization.scheduled(sizes))
                specialization.returns.learn(sizes)
            else:
                specialization.admit(sizes, lambda: self._session(arguments), decision.pick and decision.pick.arm)
            if whole:
                spent = time.perf_counter() - start
                logger.info("%s: a call of %s took %.1f s more: %s", self.counts.title, told, spent, New.TRACE.value)
        except RmtcError as error:
            # The first call may have filled caches that later ones find: then not this way to run them is at fault.
            first = entry not in specialization.entries.known and self._first_alone(arguments)
            if not first and specialization.picker.put_off(decision.pick, for_good=isinstance(error, ConflictError)):
                logger.info("%s: another way to run calls is left alone: %s", self.counts.title, error.reason)
                return None
            logger.info("%s does not follow the capture: %s", sizes, error.reason)
            specialization.entries.refuse(told, entry, error.reason)
        except failures(Exception) as error:
            if specialization.picker.put_off(decision.pick, failed=not is_out_of_memory(error)):
                logger.info("%s: another way to run calls failed", self.counts.title, exc_info=error)
                return None
            specialization.failed.note(told, error)
            return self.broken("a replay", error)
        return None

    def _session(self, arguments: Arguments) -> Session:
        return Session(self.binding.inner, arguments.args, arguments.kwargs, own_hooks=False, trained=True)

    def _capture(self, decision: CaptureAnew, arguments: Arguments) -> Eager | None:
        key = self._key(arguments)
        # A capture whose parameters were replaced serves nobody any more, and holds the old ones.
        kept = [specialization for specialization in self.specializations if not specialization.stale()]
        gone, self.specializations = len(self.specializations) - len(kept), kept
        self._replaced += gone
        self._made -= gone
        limited = self._limited(decision.differences)
        if limited is not None:
            return limited
        self.binding.refresh()
        known = self.known.setdefault(key, KnownCalls())
        if known.kinds != (kinds := self._kinds()):
            known = self.known[key] = KnownCalls(kinds=kinds)
        known.begin(arguments)
        counts = known.tries, self._made, self.stats.captures, self.stats.recompiles
        known.tries += 1
        try:
            session = self._session(arguments)
            known.state = StateGuard(session, ())
            specialization = self._captured(decision, arguments, known, session)
        except RmtcError as error:
            known.refusal = lean(error)
            logger.info("not scheduled: %s", error.reason)
            return None
        except BaseException as error:
            if not isinstance(error, Exception) or raised_by_signal(error):  # the next call begins anew
                known.tries, self._made, self.stats.captures, self.stats.recompiles = counts
                raise
            known.errors += not is_out_of_memory(error)
            known.broken = self.broken("a capture", error)
            return known.broken
        if isinstance(specialization, Eager):
            known.tries -= 1
            return specialization
        if specialization is not None:
            if self.background is not None:
                self.background.end(key)
            if known.refusal is None and not known.few:
                del self.known[key]  # it would hold on to weights that are replaced later
            self.specializations.insert(0, specialization)
            self._watch()
        return None

    def _captured(
        self, decision: CaptureAnew, arguments: Arguments, known: KnownCalls, session: Session
    ) -> Specialization | Eager | None:
        """Capture a call; None if it is of one segment, or watched; what becomes of it if it is in the background.

        It may be that of whole segments: why it is not the call's is kept in ``known`` then.
        """
        refuse_elsewhere(session)
        options = self.options
        hints = {"layers": options.layers, "segment_length": options.segment_length}
        key = entry_of(session, **hints)
        background = None if decision.at_once else self.background
        if background is not None:
            background.admit(session, key)
        found = None if key is None else recalled(session, key)
        if found is None and background is None:
            found = taken_up((each.analysis for each in self.specializations if each.modes == modes()), session, key)
        if found is None and background is not None and key is not None:
            given = options.layers, options.segment_length, options.skip_python_random
            if background.began(self._key(arguments), session, key, *given):
                return Eager(quiet=BACKGROUND)
        if found is None:
            with stage("probe"):
                analysis = Analysis(capture_of(session, options.segment_length))
        else:
            analysis = found
        analysis.capture.skips_random = options.skip_python_random
        plan, session = analysis.capture.plan, analysis.capture.session
        self._watch(session.all_modules())
        if self.watched() is not None:
            return None
        if plan.sizes.segments < 2:
            self._probes += 1
            known.short = ArgumentGuard(session, plan)
            return None
        self._made += 1
        self.stats.captures += 1
        if self.stats.captures > 1:
            self.stats.recompiles += 1
            logger.info("recompiling: %s", "; ".join(decision.differences) or "another structure of arguments")
        if found is not None:
            self.stats.recalled += 1
            return self._specialization(analysis)
        try:
            lengths = {each.length_apart for each in self.specializations if each.modes == modes()} - {None}
            prove_analysis(analysis, options.layers, apart=len(lengths) < heuristics.LENGTHS_APART)
            if key is not None:
                remember(analysis, key)
        except RefusedError as refusal:
            proven = analysis.proven
            if proven is None:
                raise
            own, least = analysis.capture.plan, proven.loop.fewest
            if proven.checked is not None and own.sizes.segments < least:
                few = Few(ArgumentGuard(session, plan), least + own.apart, lean(refusal))
                known.few[plan.sizes.tail == plan.segment_length] = few
                return self._specialization(analysis)
            if proven.loop.fixed.get("tail", own.sizes.tail) == own.sizes.tail:
                raise
            known.ends = ArgumentGuard(session, plan)
            if any(specialization.is_of_whole_segments(arguments) for specialization in self.specializations):
                raise
            known.refusal = lean(refusal)
        return self._specialization(analysis)

    def _specialization(self, analysis: Analysis) -> Specialization:
        """Make what runs an analysed call, and move its weights into their stacks."""
        options = self.options
        given = options.backend, options.schedule, options.max_group, options.repack_weights
        with stage("make"):
            specialization = Specialization.make(analysis, *given)
            specialization.number, specialization.differentiated = self.stats.captures, self.counts.differentiated
            specialization.recompute = Recompute(options.recompute, options.memory_budget)
            values = specialization.reads.captured()
            if not specialization.weights.in_place(values):
                specialization.weights.move(values)
        if specialization.main.program.draws:
            logger.info("%s draws random numbers by their places in the loop, not those of the code", self.counts.title)
        return specialization
