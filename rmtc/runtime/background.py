"""Captures in the background: a forked process fills the cache while calls run as written.

A fork has the call as it is, whatever its model and arguments are: nothing has to be written down for it. The process
has one thread, lives for a limited time, measures nothing, and leaves an entry of the cache or nothing at all. The
parent takes that entry up as it would another process's, so nothing of what the process did is believed.

One such process runs at a time, for all models. Locks of libraries that another thread held when it was forked stay
locked in it: then it ends by its time limit.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from rmtc import heuristics
from rmtc.analysis import Analysis, prove_analysis
from rmtc.cache import cached
from rmtc.capture import capture_of
from rmtc.capture.session import Session
from rmtc.errors import CaptureError, RmtcError
from rmtc.recall import remember

logger = logging.getLogger(__name__)

_REMEDY = "compile the model without background=True: its first call captures, and takes seconds"

_DEVICES = ("cpu", "meta")
"""A forked process cannot use a GPU that its parent has used."""


class _Child:
    """A forked process that captures a call.

    Args:
        work: what it does. If an exception ends that, its exit code is 1.
        key: the fingerprint of the call.
        number: how many there have been for such calls, with this one.

    Attributes:
        owner: the process that forked it.
        code: its exit code, or less than 0 if a signal ended it, as :mod:`subprocess` has it; None while it runs.
    """

    def __init__(self, work: Callable[[], None], key: str, number: int) -> None:
        self.key, self.number = key, number
        self.owner = os.getpid()
        self._lock = threading.RLock()  # a collected model may end it while this thread looks whether it runs
        self.code: int | None = None
        self._deadline = time.monotonic() + heuristics.BACKGROUND_SECONDS
        self._pid = _forked(work)

    @property
    def mine(self) -> bool:
        """Tell whether this process has forked it, and not one that this process was forked from."""
        return self.owner == os.getpid()

    def runs(self) -> bool:
        """Tell whether it runs, and take it off the table of processes if it has ended or its time is over."""
        if not self.mine:
            return False
        with self._lock:
            self._look(kill=time.monotonic() > self._deadline)
            return self.code is None

    def end(self) -> None:
        """End it, if it runs."""
        if self.mine:
            with self._lock:
                self._look(kill=True)

    def _look(self, kill: bool) -> None:
        if self.code is not None:
            return
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if self.code is not None:  # a collected model has ended it meanwhile
                return
            if not pid and kill:  # it is still there, so that no other process has its number
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                self.code = -signal.SIGALRM  # as its own clock would have ended it
                return
        except ChildProcessError:  # code of the user's waits for all processes: the cache tells what this one did
            self.code = 0
            return
        if pid:
            self.code = os.waitstatus_to_exitcode(status)


def _forked(work: Callable[[], None]) -> int:
    """Fork a process, and return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python from 3.12 on, and of others, that there are threads: see above
        # A handler of the user's must not run in the child, where it could go on with the user's program.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if not pid:
                _in_child(work)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _in_child(work: Callable[[], None]) -> NoReturn:
    """Do some work out of sight, and end without anything that a process does at its end.

    What the parent has not yet written to its files, and what it does when it ends, stays the parent's.
    """
    code = 1
    try:
        # An interrupt is the parent's, which ends this process if it ends itself; all other signals do as by default.
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, heuristics.BACKGROUND_SECONDS)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Nothing is printed or logged, and no object of the parent's is collected, for that may do something.
        gc.disable()
        faulthandler.disable()
        logging.disable(logging.CRITICAL)
        # The parent's files, pipes and sockets lead nowhere: whoever waits for their end waits for the parent alone.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for each in {0, 1, 2, *map(int, os.listdir("/proc/self/fd"))} - {nowhere}:
            os.dup2(nowhere, each)
        sys.stdout = sys.stderr = open(nowhere, "w")  # noqa: SIM115 (those of a notebook open connections anew)
        os.nice(heuristics.BACKGROUND_NICE)
        torch.set_num_threads(1)  # before anything waits for threads of OpenMP, which a fork has left behind
        work()
        code = 0
    finally:
        os._exit(code)


def _fill(session: Session, key: str, layers: str | None, segment_length: int | None, skips_random: bool) -> None:
    """Capture a call and write what was recognised into the cache."""
    try:
        analysis = Analysis(capture_of(session, segment_length))
        if analysis.capture.plan.sizes.segments < 2:
            return
        analysis.capture.skips_random = skips_random
        prove_analysis(analysis, layers)
    except RmtcError:  # the next call meets the same in the foreground, and says it
        return
    # The entry says what a capture takes. This process waited for others, so that only its work counts.
    analysis.seconds.clear()
    analysis.seconds["capture"] = time.process_time()
    remember(analysis, key)


_latest: list[_Child] = []  # of all models


def waits() -> bool:
    """Tell whether a process captures in the background, of whatever model."""
    return any(child.runs() for child in _latest)


class Background:
    """The captures of one compiled model that are made in the background.

    The process that makes one ends with the model, and with the program.
    """

    def __init__(self) -> None:
        self._children: dict[Any, _Child] = {}  # the last one for calls of a kind
        weakref.finalize(self, _end_all, self._children)

    def admit(self, session: Session, key: str | None) -> None:
        """Check that a call may be captured in the background.

        Args:
            session: the call. Nothing of it has run.
            key: its fingerprint; None if it has none.

        Raises:
            CaptureError: if it may not.
        """
        places = session.arguments.named_tensors()
        places |= {lifted.names[0]: lifted.tensor for lifted in session.lifted}
        for name, tensor in places.items():
            if tensor.device.type not in _DEVICES:
                raise CaptureError(
                    f"background=True is for models on the CPU, and {name} is on {tensor.device}", remedy=_REMEDY
                )
        if key is None:
            why = "the call has no fingerprint to be found by" if cached() else "RMTC_CACHE=0 turns that off"
            raise CaptureError(f"background=True fills the cache, and {why}", remedy=_REMEDY)

    def began(
        self, kind: Any, session: Session, key: str, layers: str | None, length: int | None, skips_random: bool
    ) -> bool:
        """Begin to capture a call that the cache does not have; return False if it is to be captured at once.

        That is where a process has ended and left no entry, or one that is not for this call, again and again.

        Args:
            kind: what calls have in common that one capture may serve.
            session: the call. Nothing of it has run.
            key: its fingerprint.
            layers, length, skips_random: the user's options.

        Raises:
            CaptureError: if a process was ended by its time limit or something else, or could not begin.
        """
        if waits():
            return True
        last, number = self._children.pop(kind, None), 0
        if last is not None and last.code is not None:
            number = last.number
            if last.code < 0:
                late = f"it took longer than {heuristics.BACKGROUND_SECONDS:g} s"
                why = late if last.code == -signal.SIGALRM else f"by signal {-last.code}"
                raise CaptureError(
                    f"the process that captured the call in the background was ended: {why}", remedy=_REMEDY
                )
            if last.key == key or number >= heuristics.BACKGROUND_PROCESSES:
                logger.info("the process in the background left nothing for the call, which is captured at once")
                return False
        try:
            child = _Child(lambda: _fill(session, key, layers, length, skips_random), key, number + 1)
        except OSError as error:
            raise CaptureError(f"no process could begin in the background: {error}", remedy=_REMEDY) from None
        self._children[kind] = child
        _latest[:] = [child]
        return True

    def end(self, kind: Any) -> None:
        """Note that such calls are captured."""
        if (child := self._children.pop(kind, None)) is not None:
            child.end()


def _end_all(children: dict[Any, _Child]) -> None:
    for child in children.values():
        child.end()


def refuse_background(strict: bool) -> None:
    """Check that captures can be made in the background.

    Raises:
        ValueError: if they cannot, whatever the calls are.
    """
    why = None
    if sys.platform != "linux":
        why = f"forks a process as it is safe on Linux alone, not on {sys.platform}"
    elif not cached():
        why = "fills the cache, which RMTC_CACHE=0 turns off"
    elif strict:
        why = "runs calls as written while it captures, where strict=True raises"
    if why is not None:
        raise ValueError(f"background=True {why}; without it, the first call captures")
