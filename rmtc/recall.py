"""Recognitions of calls, taken up for other such calls without probing, folding or tracing long runs.

A recognition says what grows, how long a segment is, and what the loop is. It may come from an entry of the cache that
another process has written (:mod:`rmtc.cache`), or from a call without a state, for one that is given a state. It is a
guess, whoever made it, and held against the call:

- the shortest run is traced. Of an entry, its canonical program must be the one that the loop was found in, by its
  hash. Else the loop must pass the checker on a run of a third size, as one that is folded;
- the loop must pass its own ``verify()``, and the checker on that run and on a whole trace of the call's own sizes;
- the schedule is proven anew;
- the call is admitted as any call of new sizes is, by a replay of its Python for all segments.

So nothing of a guess is believed, and nothing of an entry runs. A guess that fails one of these is a miss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from rmtc.analysis import Analysis
from rmtc.cache import cached, read_entry, write_entry
from rmtc.capture import Capture, Reading, alike_of, refuse_known
from rmtc.capture.arguments import Growth
from rmtc.capture.drift import refuse_drift
from rmtc.capture.guards import ArgumentGuard
from rmtc.capture.ingredients import digest_of, fingerprint_of, ingredients
from rmtc.capture.probe import with_batch
from rmtc.capture.session import Session
from rmtc.capture.sizes import Probed, Sizes
from rmtc.capture.user_code import imported
from rmtc.errors import VerifyError, brief, failures
from rmtc.ir.program import Program
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.ir.stored import Json, StoredError, read_loop, write_loop
from rmtc.passes.bodies.given_state import given_state
from rmtc.passes.bodies.resume import carried
from rmtc.passes.fold.dependences import find_dependences
from rmtc.passes.fold.streams import Family
from rmtc.passes.graph.joins import Pieces
from rmtc.passes.pipeline import check_against, prove_loop
from rmtc.passes.registry import watched
from rmtc.quiet import uncollected
from rmtc.stages import stage, timed

__all__ = ["Recognition", "entry_of", "recalled", "remember", "taken_up"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recognition:
    """The result of recognising a call.

    Attributes:
        plan: what grows, and the length of a segment. The sizes are those of the call that it was found in.
        reading: how slices and constants were read.
        cut: the places of slices that take less in a shorter last segment.
        family: the parameters of the layers.
        sizes: those of the shortest run.
        digest: the hash of that run's program; None if the loop was found in runs of another call.
        seconds: what the analysis took that it was found in.
        loop: reads the loop, given that run's program and the names of inputs that grow.
        further: the sizes of further runs against which the loop is held.
    """

    plan: Probed
    reading: Reading
    cut: frozenset[str]
    filled: frozenset[str]
    family: Family | None
    sizes: Sizes
    digest: str | None
    seconds: float
    loop: Callable[[Program, frozenset[str]], SegmentLoop]
    further: tuple[Sizes, ...] = ()

    @staticmethod
    def read(data: Json) -> Recognition:
        """Read what :func:`remember` wrote.

        Raises:
            StoredError: if the data are no recognition.
        """
        try:
            growth, family = data["growth"], data["family"]
            plan = Probed(
                Growth(
                    dims=frozenset((_path(path), _size(dim, 0)) for path, dim in growth["dims"]),
                    lists=frozenset(map(_path, growth["lists"])),
                    batch=frozenset(map(_path, growth["batch"])),
                    item_dims=frozenset((_path(path), _size(dim, 0)) for path, dim in growth["item_dims"]),
                    item_length=_size(growth["item_length"], 1),
                ),
                _size(data["segment_length"], 1),
                Sizes(0, _size(data["batch"], 0), 1),
                _flag(data["free_batch"]),
                _flag(data["free_tail"]),
                _whole(data["extra"]),
                _flag(data["drops"]),
            )
            segments, batch, tail = data["sizes"]
            length, loop = plan.segment_length, data["loop"]
            return Recognition(
                plan,
                Reading(*map(_flag, data["reading"])),
                frozenset(map(str, data["cut"])),
                frozenset(map(str, data["filled"])),
                family if family is None else _family(*family),
                Sizes(_size(segments, 2), _size(batch, 0), _size(tail, 1)),
                str(data["digest"]),
                _size(data["milliseconds"], 0) / 1e3,
                lambda program, grows: read_loop(loop, _targets(program), program.sources, grows, length),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StoredError(f"no recognition: {type(error).__name__}: {error}") from error


def _family(prefixes: Json, layers: Json, first: Json, listed: Json) -> Family:
    return Family(tuple(map(str, prefixes)), _size(layers, 1), _size(first, 0), _flag(listed))


def _path(data: Json) -> tuple[Any, ...]:
    if not data or any(type(each) not in (str, int) for each in data):
        raise StoredError(f"{data} is no path")
    return tuple(data)


def _size(data: Json, least: int) -> int:
    if type(data) is not int or data < least:
        raise StoredError(f"{data} is no size")
    return data


def _whole(data: Json) -> int:
    if type(data) is not int:
        raise StoredError(f"{data} is no whole number")
    return data


def _flag(data: Json) -> bool:
    if type(data) is not bool:
        raise StoredError(f"{data} is neither true nor false")
    return data


def _targets(program: Program) -> dict[str, Callable[..., Any]]:
    """Return the operations of a program by label: the only ones that a loop which was found in it may run.

    Raises:
        StoredError: if two operations have one label.
    """
    found: dict[str, Callable[..., Any]] = {}
    for op in program.ops:
        if found.setdefault(op.label, op.target) is not op.target:
            raise StoredError(f"two operations are labelled {op.label}")
    return found


def entry_of(session: Session, **options: object) -> str | None:
    """Return the fingerprint of a call, by which an entry of the cache is found; None where there is no cache.

    Args:
        session: the call. Nothing of it has run.
        options: the user's hints.
    """
    if not cached() or watched():
        return None
    try:
        with stage("fingerprint"):
            return fingerprint_of(ingredients(session, options))
    except failures(Exception) as error:  # an object of the user's that cannot be described
        logger.info("the call has no fingerprint, and is not looked for in the cache: %s", brief(error))
        return None


def recalled(session: Session, key: str) -> Analysis | None:
    """Return the analysis of a call by what an entry of the cache says of it; None on a miss.

    Args:
        session: the call. Nothing of it has run.
        key: its fingerprint.
    """
    data = read_entry(key)
    if data is None:
        return None
    try:
        # In a session of its own, which notes what runs of a wrong guess do.
        return confirmed(session.again(), Recognition.read(data))
    except failures(Exception) as error:  # whatever a wrong guess leads to
        logger.debug("a guess of the cache does not hold", exc_info=error)
        logger.info("the cache has another call, or one that does not hold: %s", brief(error))
        return None


def taken_up(known: Iterable[Analysis], session: Session, key: str | None) -> Analysis | None:
    """Return the analysis of a call that is given a state, by that of the last one without; None on a miss.

    Args:
        known: the analyses of calls under the same modes of torch.
        session: the call. Nothing of it has run.
        key: its fingerprint, by which other processes find what was recognised.
    """
    given = session.arguments.tensors().keys()
    fewer = [each for each in known if each.capture.session.arguments.tensors().keys() < given]
    try:
        guess = _given_state(fewer[-1], session) if fewer else None
        found = confirmed(session.again(), guess) if guess is not None else None
    except failures(Exception) as error:  # whatever a wrong guess leads to
        logger.debug("a guess of another call does not hold", exc_info=error)
        logger.info("the call does not go on as one without its state does: %s", brief(error))
        return None
    if found is not None and key is not None:
        remember(found, key)
    return found


def _given_state(known: Analysis, session: Session) -> Recognition | None:
    """Guess that a call is given what segments of another one hand on; None if they hand nothing on."""
    proven = known.proven
    if proven is None or len(known.probes) < 2 or not carried(proven.loop):
        return None
    loop, family, plan, (short, longer) = proven.loop, proven.family, known.capture.plan, known.probes
    batch = with_batch(session, plan.growth)[0].batch if plan.free_batch else plan.growth.batch
    # Constants may be sizes that happen to be the same: another batch size tells.
    further = next((at for at in known.runs if at.batch != short.sizes.batch), longer.sizes)
    return Recognition(
        replace(plan, growth=replace(plan.growth, batch=batch)),
        known.capture.reading,
        known.capture.cut,
        known.capture.pieces.filled,
        family,
        short.sizes,
        None,
        sum(known.seconds.values()),
        lambda program, grows: find_dependences(
            replace(given_state(loop, program, short.sizes), growing=grows), family
        ),
        (further,),
    )


@uncollected()
def confirmed(session: Session, guess: Recognition) -> Analysis:
    """Hold a recognition against a call.

    Args:
        session: the call. Nothing of it has run.
        guess: what was recognised in another such call.

    Returns:
        The analysis of the call, with its sizes admitted.

    Raises:
        RmtcError: with what does not hold.
    """
    analysis, short = _opened(session, guess)
    plan, session = analysis.capture.plan, analysis.capture.session
    if guess.digest is not None and digest_of(short.program) != guess.digest:
        raise VerifyError("its shortest run is another program")
    loop = guess.loop(short.program, analysis.capture.growing)
    loop.verify()
    with timed(analysis.seconds, "prove"):
        proven = prove_loop(loop, guess.family, plan.sizes.segments)
    # A second run has another number of segments, and the batch size and last length of the call.
    few = max(loop.fewest, short.sizes.segments + 1)
    *others, other = (analysis.run(sizes) for sizes in (*guess.further, plan.sizes._replace(segments=few)))
    refuse_drift([short, *others, other], plan.segment_length)
    with timed(analysis.seconds, "check"):
        for run in (short, *others, other):
            proven.checked = check_against(proven, run.program, *run.sizes)
            proven.checked_at = run.sizes
            analysis.traced.add(run.sizes)
    analysis.proven, analysis.probes, analysis.fresh = proven, [short, other], guess.seconds
    analysis.admit(plan.sizes)
    return analysis


def _opened(session: Session, guess: Recognition) -> tuple[Analysis, Any]:
    """Open a call by what is said to grow in it, and trace its shortest run.

    Raises:
        RmtcError: if the call has other arguments, is of one segment, or cannot be traced.
    """
    while True:
        before = imported(session.code.functions)
        plan = _plan(session, guess.plan)
        refuse_known(session, plan)
        session.refuse_unseen(*plan.arguments(session, plan.sizes))
        capture = Capture(
            session,
            plan,
            alike_of(session),
            reading=guess.reading,
            cut=guess.cut,
            pieces=Pieces(guess.filled),
            learns=False,
        )
        analysis = Analysis(capture)
        short = analysis.run(guess.sizes)
        if imported(session.code.functions) == before:
            return analysis, short
        session = session.again()  # the code imported modules when it ran


def _plan(session: Session, plan: Probed) -> Probed:
    """Return a plan with the sizes of a call."""
    tensors, lists = session.arguments.tensors(), session.arguments.lists()
    known = all(path in tensors and dim < tensors[path].ndim for path, dim in plan.growth.dims)
    known = known and plan.growth.lists <= lists.keys() and bool(plan.growth.dims or plan.growth.lists)
    if not known or any(path not in tensors and path not in lists for path in plan.growth.batch):
        raise VerifyError("its arguments are others")
    guard = ArgumentGuard(session, plan)
    sizes = guard.sizes(session.arguments)
    if isinstance(sizes, str):
        raise VerifyError(sizes)
    if sizes.segments < 2:
        raise VerifyError("the call is of one segment")
    return replace(plan, sizes=sizes)


def remember(analysis: Analysis, key: str) -> None:
    """Write what was recognised in a call into the cache, for later processes.

    Args:
        analysis: a call that was proven, checked and admitted.
        key: the fingerprint of the call, as of before anything of it ran.
    """
    try:
        content = _written(analysis)
    except failures(Exception) as error:  # a constant or an operand that has no stored form
        logger.info("what was recognised is not kept for other processes: %s", brief(error))
        return
    write_entry(key, content)


def _written(analysis: Analysis) -> Json:
    proven, plan, run = analysis.proven, analysis.capture.plan, analysis.probes[0]
    if proven is None:
        raise StoredError("nothing was recognised")
    if plan.apart:  # in the place of that of whole segments, which is wanted more often
        raise StoredError("its last segment runs after the loop")
    loop, growth, targets = proven.loop, plan.growth, _targets(run.program)
    ops = [op for part in (loop.before, *loop.rows, loop.steady, loop.after) for op in part]
    if any(targets.get(op.label) is not op.target for op in ops):
        raise StoredError("the shortest run has not all operations of the loop")
    if any(run.program.sources.get(name) != source for name, source in loop.sources.items()):
        raise StoredError("the shortest run reads other tensors than the loop")
    family = proven.family
    return {
        "growth": {
            "dims": sorted(([[*path], dim] for path, dim in growth.dims), key=repr),
            "lists": sorted(([*path] for path in growth.lists), key=repr),
            "batch": sorted(([*path] for path in growth.batch), key=repr),
            "item_dims": sorted(([[*path], dim] for path, dim in growth.item_dims), key=repr),
            "item_length": growth.item_length,
        },
        "segment_length": plan.segment_length,
        "batch": plan.sizes.batch,
        "free_batch": plan.free_batch,
        "free_tail": plan.free_tail,
        "extra": plan.extra,
        "drops": plan.drops,
        "reading": [*analysis.capture.reading],
        "cut": sorted(analysis.capture.cut),
        "filled": sorted(analysis.capture.pieces.filled),
        "family": family if family is None else [family.prefixes, family.layers, family.first, family.listed],
        "sizes": [*run.sizes],
        "digest": digest_of(run.program),
        "milliseconds": round(1e3 * sum(analysis.seconds.values())),
        "loop": write_loop(loop),
    }
