"""Fake tensors whose operations are remembered, because layers repeat most operations of a run.

`FakeTensorMode` keeps results in a cache too. Making a key takes most of an operation's time there, and a linear of
three dimensions ends in an operation that it does not keep. Here a key is made of the metadata of plain strided
tensors, for operations whose result depends on that alone.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_impls import has_meta
from torch._subclasses.fake_impls import op_implementations_checks as op_implementations
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from rmtc.capture.frames import current_location
from rmtc.capture.indexing import RECURRENT, EverySlice
from rmtc.capture.kinds import tensors_in
from rmtc.capture.operands import CHECKED, check_operands
from rmtc.errors import CaptureError, RefusedError
from rmtc.ir.program import VIEWS, draws
from rmtc.lock import LOCK

_DEVICE = torch.ops.prim.device.default
_INDEX = torch.ops.aten.index.Tensor
_SLICE = torch.ops.aten.slice.Tensor
_BITS = {torch.bool, torch.uint8, torch.int8}  # an index of these selects as many elements as are true
_UNTOLD = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
_ATOMS = {
    *(int, float, complex, bool, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}


class _Result(NamedTuple):
    """The metadata of a tensor that an operation returns.

    Attributes:
        shape, stride, dtype, device: of the tensor.
        offset: where it begins in its memory, in elements, after the argument whose memory it shares.
        source: number of that argument; None if it has memory of its own.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int
    source: int | None


class _OperationResults(NamedTuple):
    """The results of an operation.

    Attributes:
        kind: ``tuple`` or ``list`` of several results; None for one tensor.
        tensors: the results; a number stands for the argument itself.
    """

    kind: type | None
    tensors: list[_Result | int]


Watcher = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]


class Fakes(FakeTensorMode):
    """The mode under which tensors have metadata and no content.

    Attributes:
        known: the tensors that depend on sizes alone.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=False)
        # Results are remembered here. In torch's own cache of them an operation of a new shape costs a third more.
        self._remembers, self.cache_enabled = self.cache_enabled, False
        self._told: dict[int, bool] = {}
        self._direct: dict[int, bool] = {}  # whether an operation's kernel for the meta device may run at once
        self._known: dict[tuple[Any, ...], _OperationResults | None] = {}
        self._fresh: dict[torch.device, dict[str, Any]] = {}
        self._watcher: Watcher | None = None
        self._depth = 0
        self._inside: int | None = None  # the thread that has entered last
        self._entering = threading.RLock()
        self._dtype = torch.get_default_dtype()
        self.indexing = EverySlice(self.whole)
        self.known = self.indexing.known

    def __enter__(self) -> Fakes:
        me = threading.get_ident()
        with self._entering:  # torch keeps one list of entered modes for all threads
            if LOCK.shut or (self._depth and self._inside != me):
                raise CaptureError(
                    "another thread captures a compiled model that has these weights: they are fakes for so long",
                    remedy="while a first call of a kind captures, run the plain model or its layers nowhere else",
                )
            super().__enter__()
            self._depth, self._inside = self._depth + 1, me
        if self._depth == 1:  # torch enters it again inside operations
            self._dtype = torch.get_default_dtype()
            self.indexing.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        with self._entering:
            try:  # an interrupt in one of these leaves the others to be done
                if self._depth == 1:
                    self.known.forget()
            finally:
                try:
                    if self._depth == 1:
                        self.indexing.__exit__(*error)  # type: ignore[no-untyped-call]
                finally:
                    try:
                        super().__exit__(*error)
                    finally:
                        self._depth -= 1

    def trace_outside(self, watch: Callable[..., Any] | None) -> None:
        """Set a trace function of Python, or none, that is off inside of torch's functions."""
        self.indexing.watch = watch
        sys.settrace(watch)

    @contextlib.contextmanager
    def watched(self, watcher: Watcher | None) -> Iterator[None]:
        """Show every operation to a watcher, with its positional arguments, keyword arguments and result.

        A watcher set inside, or none, takes the place of the one outside. If torch runs other operations to find the
        result of one, these are not shown.
        """
        before, self._watcher = self._watcher, watcher
        try:
            yield
        finally:
            self._watcher = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap each operation, and nothing here compiles them
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.dispatch(func, types, args, kwargs)

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:  # asked for more often than anything is computed
            return args[0].device
        kwargs = kwargs or {}
        if torch.get_default_dtype() is not self._dtype:
            raise RefusedError(
                "the code changes the default dtype of torch for operations, which run later under the caller's",
                location=current_location(3)[0],
                remedy="give the operations a dtype",
            )
        self.known.written(func, args, kwargs)
        key = self.key(func, args, kwargs)
        out = self.recall(key, args)
        if out is None:
            if func in CHECKED:
                check_operands(self._run_unwatched, func, args, kwargs)
            out = self._run_on_meta(func, args, kwargs) if key is not None else None
            if out is None:
                with self.watched(None):
                    out = super().dispatch(func, types, args, kwargs)
            if func is not _SLICE:  # no other segment takes the same slice
                self.learn(key, args, out)
        if self._watcher is not None:
            self._watcher(func, args, kwargs, out)
        return out

    def _run_unwatched(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
        with self.watched(None):
            return self.dispatch(func, (), args, kwargs)

    def key(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return the key that determines an operation's result; None if the result may depend on more."""
        told = self._told.get(id(func))
        if told is None:
            told = self._told[id(func)] = self._remembers and _is_told(func)
        if not told:
            return None
        default = torch.get_default_dtype(), torch._C._get_default_device()
        key: list[Any] = [id(func), *default, torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
        told = self._extend(key, args) and (not kwargs or self._extend(key, chain(*kwargs.items())))
        if _asks_for_offset(func):
            key += map(torch.Tensor.storage_offset, tensors_in(args))
        return tuple(key) if told and not (func is _INDEX and not _BITS.isdisjoint(key)) else None

    def whole(self, func: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Find the result of a recurrent layer or cell of torch, which runs operations of its own for each position.

        Args:
            func: the function.
            args: positional arguments of the operation.

        Returns:
            The result, as :meth:`dispatch` returns that of an operation. None if a tracer is to see the operation,
            autocast casts its operands, or it may draw random numbers.
        """
        operation = RECURRENT[func]
        traced = torch._C._dispatch_tls_local_include_set().has(torch._C.DispatchKey.PreDispatch)
        cast = torch.is_autocast_enabled(args[0].device.type)
        if traced or cast or isinstance(args[3], (list, tuple)) or draws(operation, args, {}):  # a list: if packed
            return None
        key = self.key(operation, args, {})
        out = self.recall(key, args)
        if out is None:
            with self.watched(None):
                out = func(*args)
            self.learn(key, args, out)
        if self._watcher is not None:
            self._watcher(operation, args, {}, out)
        return out

    def _run_on_meta(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation's kernel for the meta device, without the rules and caches that `FakeTensorMode` asks first.

        Args:
            func, args, kwargs: an operation whose result its arguments' metadata determine.

        Returns:
            The result; None if `FakeTensorMode` may find another one, or there is no such kernel.
        """
        direct = self._direct.get(id(func))
        if direct is None:
            direct = self._direct[id(func)] = _runs_on_meta(func)
        devices = {tensor.device for tensor in tensors_in((*args, *kwargs.values()))} if direct else ()
        if len(devices) != 1 or "device" in kwargs or any(type(each) is torch.device for each in args):
            return None
        try:
            with in_kernel_invocation_manager(self):
                out = func(*args, **kwargs)
        except NotImplementedError:  # an operation inside of it has no such kernel; the mode knows what to do
            self._direct[id(func)] = False
            return None
        (device,) = devices
        with torch._C._DisableTorchDispatch():
            made = out if type(out) is tuple else (out,)
            if not all(type(each) is torch.Tensor and _is_plain(each) for each in made):
                return None
            made = tuple(self.fresh(each, device) for each in made)
        return made if type(out) is tuple else made[0]

    def recall(self, key: tuple[Any, ...] | None, args: Sequence[Any]) -> Any:
        """Make the result of an operation that was seen before; return None if it was not."""
        known = self._known.get(key) if key is not None else None
        if known is None:
            return None
        with torch._C._DisableTorchDispatch():
            made = [args[each] if isinstance(each, int) else self._make(each, args) for each in known.tensors]
        return made[0] if known.kind is None else known.kind(made)

    def learn(self, key: tuple[Any, ...] | None, args: Sequence[Any], out: Any) -> bool:
        """Remember the result of an operation; return False if it cannot be made again."""
        if key is not None and key not in self._known:
            self._known[key] = _describe(out, args)
        return key is not None and self._known[key] is not None

    def fresh(self, bare: torch.Tensor, device: torch.device) -> FakeTensor:
        """Make a fake tensor on a device with the metadata of a tensor on the meta device, as `FakeTensor` makes it."""
        attributes = self._fresh.get(device)
        if attributes is None:
            attributes = self._fresh[device] = dict(vars(FakeTensor(self, bare, device)))
        made: FakeTensor = torch.Tensor._make_subclass(
            FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device
        )
        if self._allow_unsafe_data_ptr_access:
            torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
        else:
            torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__ = attributes.copy()  # takes a third of the time of filling the one that is there
        return made

    def _extend(self, key: list[Any], values: Iterable[Any]) -> bool:
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if not self._is_own(value):
                    return False
                key += (value.shape, value.stride(), value.dtype, value.device)
                key += (value.is_inference(), value.requires_grad)
            elif kind is list or kind is tuple or kind is torch.Size:
                key.append(len(value))
                if not self._extend(key, value):
                    return False
            elif kind in _ATOMS:
                key += (kind, value)  # 1, 1.0 and True are equal
            else:
                return False
        return True

    def _is_own(self, value: Any) -> bool:
        """Return whether a value is a fake tensor of this mode that its metadata describes completely."""
        return type(value) is FakeTensor and value.fake_mode is self and value.constant is None and _is_plain(value)

    def _make(self, result: _Result, args: Sequence[Any]) -> FakeTensor:
        shape, stride, dtype, device, offset, source = result
        bare = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if source is not None:
            bare.set_(args[source].untyped_storage(), args[source].storage_offset() + offset, shape, stride)
        return self.fresh(bare, device)


def _is_told(func: Any) -> bool:
    """Return whether the result of an operation depends on its arguments' metadata alone."""
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace == "aten"
        and not func._schema.is_mutable
        and (func is _INDEX or not any(tag in func.tags for tag in _UNTOLD))
        and func not in FakeTensorMode.lift_fns
    )


@functools.cache
def _asks_for_offset(func: Any) -> bool:
    """Return whether an operation is told where its result begins in memory."""
    return any(argument.name == "storage_offset" for argument in func._schema.arguments)


def _runs_on_meta(func: Any) -> bool:
    """Return whether an operation's kernel for the meta device tells its result, and not a rule of `FakeTensorMode`'s.

    Its rules for views are about symbolic sizes.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return False  # it is divided into others, and may return its operand
    if not has_meta(func) or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    if not all(type(each.type) is torch.TensorType for each in func._schema.returns):
        return False
    return func in VIEWS or not any(asks(func) for asks, _ in op_implementations)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


def _describe(out: Any, args: Sequence[Any]) -> _OperationResults | None:
    """Describe the result of an operation so that it can be made again.

    Returns:
        The description; None if the result is more than new tensors, views of the only tensor given as it is, and
        arguments themselves.
    """
    kind = type(out) if type(out) in (tuple, list) else None
    given = list(tensors_in(args))
    memory = [tensor.untyped_storage()._cdata for tensor in given]
    results: list[_Result | int] = []
    for each in (out,) if kind is None else out:
        if type(each) is not FakeTensor or each.constant is not None or each.requires_grad or not _is_plain(each):
            return None
        itself = next((number for number, arg in enumerate(args) if arg is each), None)
        if itself is not None and sum(each is tensor for tensor in given) == 1:
            results.append(itself)
            continue
        if any(each is tensor for tensor in given):
            return None
        source = None
        if each.untyped_storage()._cdata in memory:
            source = next((index for index, arg in enumerate(args) if arg is given[0]), None)
            if source is None or len(given) > 1 or each.dtype != given[0].dtype:  # offsets count other elements then
                return None
        elif each.storage_offset():  # in memory of its own: torch itself describes it differently the next time
            return None
        offset = int(each.storage_offset()) - (0 if source is None else int(given[0].storage_offset()))
        results.append(_Result(each.shape, each.stride(), each.dtype, each.device, offset, source))
    return _OperationResults(kind, results)
