"""A session for one capture of one call, which runs the user's code on fake tensors and puts everything back.

Every tensor in reach gets a fake tensor in its place.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import os
import random
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from rmtc.capture.ambient import Ambient
from rmtc.capture.arguments import Arguments, argument_names, container_attributes, show
from rmtc.capture.fakes import Fakes
from rmtc.capture.frames import is_of_models
from rmtc.capture.kinds import is_closed, is_plain
from rmtc.capture.objects import named_leaves
from rmtc.capture.snapshot import Snapshot
from rmtc.capture.state import LOOKS_UP, REPLACED, Code, Slot, replace_tensors, unmoved, unseen, user_code, walk
from rmtc.capture.transforms import transforms_shown
from rmtc.capture.translation import (
    UNWATCHED,
    refuse_sharded,
    refuse_unknown,
    refused_unseen,
    strides_refused,
    translate,
)
from rmtc.capture.untold import stands_in
from rmtc.capture.user_code import named_globals, named_in_code, tells_identity
from rmtc.errors import CaptureError, RmtcError, failures
from rmtc.quiet import quiet_fakes
from rmtc.restoring import replaced, restored

logger = logging.getLogger(__name__)

_IDENTITY = (id, hash, operator.is_, operator.is_not)


@dataclass(frozen=True)
class Lifted:
    """A tensor that the user's code reaches other than through an argument.

    Attributes:
        names: every name it goes by, such as ``layers.3.A``; the first is the one shown.
        kind: ``"parameter"``, ``"buffer"`` or ``"state"``.
        tensor: the user's tensor.
    """

    names: tuple[str, ...]
    kind: str
    tensor: torch.Tensor


class Session:
    """The user's callable with its arguments and everything else a call can see.

    Args:
        function: a module or a function.
        args, kwargs: the call's arguments; tensors may be on the meta device.
        own_hooks: whether the module's own hooks are part of its call.
        trained: whether what the call gives may be differentiated, if a tensor in reach requires gradients.

    Attributes:
        trained: whether gradients are asked for.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        own_hooks: bool = True,
        trained: bool = False,
    ) -> None:
        while isinstance(function, functools.partial):
            args, kwargs, function = (*function.args, *args), {**function.keywords, **kwargs}, function.func
        self.function, self._own_hooks, self._trained = function, own_hooks, trained
        call = function.forward if isinstance(function, nn.Module) else function
        self.arguments = Arguments(tuple(args), dict(kwargs), argument_names(call, len(args)))
        named = None if isinstance(function, nn.Module) else getattr(function, "__qualname__", None)
        self.name = named or type(function).__name__
        for path, tensor in self.arguments.tensors().items():
            refuse_unknown(show(path), tensor)
        for path, container in self.arguments.containers().items():
            for key, value in container_attributes(container).items():
                if not is_plain(value):
                    raise CaptureError(
                        f"{show(path)} is a {type(container).__name__} whose attribute {key} is no plain value",
                        remedy="pass it as an argument of its own",
                    )
        self.roots: dict[str, Any] = {"": function}
        for name, value in self.arguments.named():
            for at, leaf in named_leaves(value, name):
                if not isinstance(leaf, torch.Tensor) and not is_closed(leaf):
                    self.roots[at] = leaf
        hidden: tuple[Any, ...] = ()
        if isinstance(function, nn.Module) and not own_hooks:
            hidden = function._forward_hooks, function._forward_pre_hooks
        self.without = frozenset(map(id, hidden))
        self.snapshot = Snapshot(self.roots, self.without)
        slots = (slot for slot in self.snapshot.slots if not isinstance(slot.owner, tuple))
        self._replaceable = [slot for slot in slots if isinstance(slot.value, REPLACED)]
        self.modules: dict[int, Slot] = {}
        for slot in self.snapshot.slots:
            if isinstance(slot.value, nn.Module):
                self.modules.setdefault(id(slot.value), slot)
        refuse_sharded(self.all_modules())
        self.fake_mode = Fakes()
        self.lifted = self._lift(self.snapshot.slots)
        self._index = {id(lifted.tensor): i for i, lifted in enumerate(self.lifted)}
        self._fake_tensors: list[torch.Tensor] | None = None
        self._requiring: list[tuple[torch.Tensor, bool]] = []  # installed tensors, and whether they required gradients
        tensors = [*(lifted.tensor for lifted in self.lifted), *self.arguments.tensors().values()]
        self.trained = trained and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        self.lost: str | None = None  # what the code was seen to do and no program does
        self.hashed = False  # whether the code was seen to hash a tensor, as a key of a dict or in a set
        self.drawn = False  # whether the code drew random numbers in Python, which are others in each call
        self.ran: set[CodeType] | None = None  # the code that calls ran, if it has to be known
        self.writes = False  # whether the code was seen to write to a tensor
        self.own_backward: str | None = None  # a torch.autograd.Function that the code was seen to call

    def again(self) -> Session:
        """Open the same call anew, as everything is now."""
        return Session(self.function, self.arguments.args, self.arguments.kwargs, self._own_hooks, self._trained)

    def _lift(self, slots: list[Slot]) -> list[Lifted]:
        buffers = {id(module._buffers) for module in self.all_modules()}
        tables = {id(module._modules) for module in self.all_modules()}
        given = {show(path) for path in self.arguments.tensors()}
        names: dict[int, list[str]] = {}
        kinds: dict[int, str] = {}
        tensors: dict[int, torch.Tensor] = {}
        for slot in slots:  # the items of a tuple have slots of their own
            if isinstance(tensor := slot.value, torch.Tensor):
                refuse_unknown(slot.name, tensor)
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "state"
                kinds.setdefault(id(tensor), "buffer" if id(slot.owner) in buffers else kind)
                names.setdefault(id(tensor), []).append(f"self.{slot.name}" if slot.name in given else slot.name)
                tensors[id(tensor)] = tensor
        for slot in slots:
            first = self.modules.get(id(slot.value))
            # A module that is registered twice has two names. One that a list holds too has only its first name.
            if first is not None and first is not slot and {id(first.owner), id(slot.owner)} <= tables:
                for named in (slot.value.named_parameters, slot.value.named_buffers):
                    for name, tensor in named(prefix=slot.name, remove_duplicate=False):
                        names[id(tensor)].append(name)
        return [Lifted(tuple(dict.fromkeys(names[key])), kinds[key], tensors[key]) for key in tensors]

    @functools.cached_property
    def code(self) -> Code:
        """The user's code that the call may run."""
        return user_code(self.roots, self.snapshot.slots)

    @functools.cached_property
    def known(self) -> frozenset[int]:
        """The ids of the objects that existed before the call, except tensors and plain values."""
        values = (*self.roots.values(), *(slot.value for slot in self.snapshot.slots), *self.snapshot.owners())
        return frozenset(id(value) for value in values if not is_plain(value) and not isinstance(value, torch.Tensor))

    @functools.cached_property
    def _asked(self) -> frozenset[str]:
        return frozenset(name for function in self.code.functions for name in named_in_code(function.__code__))

    @property
    def asks_for_gradients(self) -> bool:
        """Tell whether the user's code asks whether tensors require gradients, or sets it."""
        return not self._asked.isdisjoint(("requires_grad", "requires_grad_"))

    @property
    def asks_for_strides(self) -> bool:
        """Tell whether the user's code asks how tensors lie in memory."""
        return not self._asked.isdisjoint(("is_contiguous", "stride", "storage_offset"))

    @property
    def tells_identity(self) -> bool:
        """Tell whether the user's code compares objects by identity, or has hashed a fake tensor."""
        functions = self.code.functions
        if self.hashed or any(tells_identity(function.__code__) for function in functions):
            return True
        held = [slot.value for slot in self.snapshot.slots]  # by another name, too
        held += [value for function in functions for _, _, value in named_globals(function)]
        return any(value is each for value in held for each in _IDENTITY)

    @property
    def fake_tensors(self) -> list[torch.Tensor]:
        """The fake tensors for :attr:`lifted`, made once."""
        if self._fake_tensors is None:
            self._fake_tensors = [self.fake_tensor(lifted.tensor) for lifted in self.lifted]
        return self._fake_tensors

    def fake_tensor(self, tensor: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Make a fake tensor with a tensor's dtype, device and layout, in its shape or another one.

        In place of the meta device it is on the CPU.

        Args:
            tensor: the tensor.
            shape: the shape; the tensor's own, with the same strides, if it is None.
        """
        device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
        shape = tuple(tensor.shape if shape is None else shape)
        with self.fake_mode:
            if shape == tuple(tensor.shape):
                made = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=device)
            elif tensor.is_contiguous():
                made = torch.empty(shape, dtype=tensor.dtype, device=device)
            else:
                made = torch.empty_strided(shape, strides_refused(tensor, shape), dtype=tensor.dtype, device=device)
        return self._alike(made, tensor)

    def _alike(self, fake_tensor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Make a fake tensor answer the user's code as the tensor would."""
        if isinstance(tensor, nn.Parameter):
            fake_tensor._is_param = True
        if tensor.requires_grad and self.asks_for_gradients and not torch.is_grad_enabled():
            fake_tensor.requires_grad_(True)
        return stands_in(fake_tensor)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model, and then those of the arguments, by name."""
        return {**{lifted.names[0]: lifted.tensor for lifted in self.lifted}, **self.arguments.named_tensors()}

    def lifted_fake(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the fake tensor for a tensor in an attribute, global or closure; None for any other tensor."""
        number = self._index.get(id(tensor))
        return None if number is None else self.fake_tensors[number]

    @contextlib.contextmanager
    def installed(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Replace every lifted tensor by another one, and on exit put everything back.

        Args:
            values: the other tensors, in the order of :attr:`lifted`.
        """
        pairs = zip(self.lifted, values, strict=True)
        environment = dict(os.environ)
        mapping = {id(lifted.tensor): self._alike(value, lifted.tensor) for lifted, value in pairs}
        generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [(random.getstate, random.setstate)]
        generators.append((torch.random.get_rng_state, torch.random.set_rng_state))
        if (numpy := sys.modules.get("numpy")) is not None:
            generators.append((numpy.random.get_state, numpy.random.set_state))
        drawn = [(write, read()) for read, write in generators]
        ambient = Ambient()

        def put_back() -> None:
            self.snapshot.restore()
            for value, required in self._requiring:
                if value.requires_grad is not required:
                    value.requires_grad_(required)
            self._requiring = []
            if os.environ != environment:
                os.environ.clear()
                os.environ.update(environment)
            ambient.put_back()
            for write, state in drawn:
                write(state)

        with restored(put_back):
            for slot in self._replaceable:
                value = replace_tensors(slot.value, lambda tensor: mapping.get(id(tensor), tensor))
                if value is not slot.value:
                    slot.put(value)
            self._requiring = [(value, value.requires_grad) for value in values]
            yield

    def state(self) -> list[Slot]:
        """Return every slot as it is now.

        It is to be read while fake tensors are installed.
        """
        return self.snapshot.now()

    def all_modules(self) -> list[nn.Module]:
        """Return every module in reach, the function itself included."""
        found = [slot.value for slot in self.modules.values()]
        return [self.function, *found] if isinstance(self.function, nn.Module) else found

    def held(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensor that each place holds before the user's code runs, by name, for places of tensors.

        Args:
            values: the tensors that are installed.
        """
        held = (slot for slot in self.snapshot.slots if isinstance(slot.value, torch.Tensor))
        return {slot.name: values[self._index[id(slot.value)]] for slot in held}

    @functools.cached_property
    def inert(self) -> frozenset[int]:
        """The ids of the slots that hold no tensor: they are what they were wherever the slot is the same."""
        return frozenset(id(slot) for slot in self.snapshot.slots if not isinstance(slot.value, torch.Tensor))

    @functools.cached_property
    def containers(self) -> list[Slot]:
        """The first place of each list, deque and dictionary that existed before the call."""
        slots = [slot for slot in self.snapshot.slots if isinstance(slot.value, (list, deque, dict))]
        return [*{id(slot.value): slot for slot in reversed(slots)}.values()]

    def refuse_unseen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse code that reads what no guard can see.

        It is to be called once, before anything is traced. If the code names such a thing, a call shows whether that
        code runs. Later calls are watched then, too.

        Args:
            args, kwargs: arguments with fake tensors.

        Raises:
            UntoldError: with what it is.
        """
        hidden = self._unseen()
        if hidden is None:
            return
        if not self._asked.isdisjoint(UNWATCHED):
            raise refused_unseen(hidden)
        self.ran = set()
        with self.installed(self.fake_tensors), self.fake_mode:
            self.call(args, kwargs)

    def _unseen(self) -> str | None:
        """Describe something that the code can read and no guard can see; return None if there is nothing.

        If the code that has run is known, only that counts.
        """
        slots, functions = self.snapshot.slots, self.code.functions
        if self.ran is not None:
            slots = walk(self.roots, self.without, self.ran)
            functions = [each for each in functions if each.__code__ in self.ran]
        return unseen(self.roots, slots, functions)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Note the code that runs, and refuse it if it reads what no guard can see.

        Raises:
            UntoldError: with what it reads.
        """
        if self.ran is None:
            yield
            return
        ran, before = self.ran, sys.getprofile()
        known = len(ran)

        codes = {function.__code__ for function in self.code.functions}
        looked_up = False  # by eval under whatever name

        def note(frame: FrameType, event: str, argument: object) -> None:
            nonlocal looked_up
            ran.add(frame.f_code)
            looked_up |= event == "c_call" and frame.f_code in codes and any(argument is each for each in LOOKS_UP)

        with restored(functools.partial(sys.setprofile, before)):
            sys.setprofile(note)
            yield
        if looked_up:
            raise refused_unseen("the code looks names up by eval(), exec() or globals() under another name")
        if len(ran) > known and (hidden := self._unseen()) is not None:
            raise refused_unseen(hidden)

    @contextlib.contextmanager
    def _hashes_noted(self) -> Iterator[None]:
        """Note whether a model's code hashes a fake tensor, which is by identity."""

        def hashed(tensor: FakeTensor) -> int:
            self.hashed |= is_of_models(sys._getframe(1))
            return id(tensor)

        def put_back() -> None:
            if "__hash__" in vars(FakeTensor):
                del FakeTensor.__hash__

        with restored(put_back):
            FakeTensor.__hash__ = hashed  # type: ignore[method-assign, assignment]
            yield

    @contextlib.contextmanager
    def _functions_noted(self) -> Iterator[None]:
        """Note whether the code calls a `torch.autograd.Function`, whose backward no trace shows."""
        if not self.trained:
            yield
            return
        own, thread = torch.autograd.Function.__dict__["apply"], threading.get_ident()

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                self.own_backward = cls.__qualname__
            return own.__get__(None, cls)(*args, **kwargs)

        with restored(lambda: setattr(torch.autograd.Function, "apply", own)):
            torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
            yield

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the user's code under fake tensors.

        Raises:
            RmtcError: whatever the user's code raised, with the place and the reason.
        """
        if any(isinstance(leaf, Iterator) for leaf in pytree.tree_leaves((args, kwargs))):
            args, kwargs = pytree.tree_map_only(Iterator, unmoved, (args, kwargs))
        flags = _COMPILER_FLAGS if self._asked.isdisjoint(_OF_COMPILERS) else ()
        try:
            with replaced(*flags), quiet_fakes():  # an error is raised, so torch need not log it
                drawn, environment, ambient = self.snapshot.random_state(), dict(os.environ), Ambient()
                with self._watched(), self._hashes_noted(), self._functions_noted(), transforms_shown(self.trained):
                    result = self._call_user(args, kwargs)
                self.drawn |= self.snapshot.random_state() != drawn
                self.lost = self.snapshot.lost() or self.lost
                if (setting := ambient.changed()) is not None:
                    self.lost = f"the call leaves a setting of torch changed ({setting})"
                if any(value.requires_grad is not required for value, required in self._requiring):
                    self.lost = "the call changes whether a tensor requires gradients"
                if os.environ != environment:
                    self.lost = "the call changes an environment variable"
                return result
        except RmtcError:
            raise
        except failures(Exception, SystemExit) as error:  # the code may end the process for a longer text
            _clear(error)
            raise translate(error) from error

    def _call_user(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.function(*args, **kwargs)


_OF_COMPILERS = ("is_compiling", "is_dynamo_compiling", "is_exporting")


_COMPILER_FLAGS = [(torch.compiler, name, True) for name in ("_is_compiling_flag", "_is_exporting_flag")]
"""The flags that `torch.export` sets while it runs a forward, so that libraries take their traceable paths."""


def _clear(error: BaseException) -> None:
    """Clear the frames that an error of a transform of torch.func has come through.

    Objects in these frames set torch's state once more when they are freed, whenever that is.
    """
    at = error.__traceback__
    while at is not None:
        if "_functorch" in at.tb_frame.f_code.co_filename:
            traceback.clear_frames(error.__traceback__)
            return
        at = at.tb_next
