"""Values that are read into Python and depend on sizes alone, computed where a fake tensor has none.

A mask made of ``new_ones``, or an ``arange``, is the same for every text of these sizes. Functions that are known to do
nothing else may make further tensors of such tensors alone. Their values are computed when the code reads them
(``mask.any().item()``, ``int(positions.max())``). Another length computes them anew, in its own replay.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rmtc.capture.kinds import is_plain
from rmtc.errors import failures

logger = logging.getLogger(__name__)

UNKNOWN: Any = object()
"""The answer of :meth:`Known.read` for a value that depends on more than sizes."""

_Tensor: Any = torch.Tensor
_READS = {
    *(_Tensor.item, _Tensor.is_nonzero, torch.is_nonzero),
    *(_Tensor.__bool__, _Tensor.__int__, _Tensor.__float__, _Tensor.__index__),
    *(_Tensor.equal, torch.equal, _Tensor.allclose, torch.allclose),
}
"""Functions that read values into Python."""

_LIKE = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
"""Functions that make tensors of another one's metadata, whatever is in it."""

_PURE = """
    arange zeros ones full eye linspace tensor tril_indices triu_indices triu tril diagonal flip roll cat stack
    where masked_fill repeat repeat_interleave view reshape flatten unsqueeze squeeze expand expand_as transpose t
    permute select narrow chunk split unbind __getitem__ gather index_select clone contiguous bool int long float
    double half byte to type_as any all max min amax amin sum mean prod cumsum argmax argmin numel size eq ne lt le
    gt ge logical_and logical_or logical_not isinf isnan maximum __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__
    __or__ __xor__ __invert__ add sub mul div neg abs pow sqrt exp log floor ceil clamp minimum __add__ __radd__
    __sub__ __rsub__ __mul__ __rmul__ __truediv__ __floordiv__ __mod__ __neg__ __pow__ true_divide floor_divide
    remainder matmul einsum outer dim __len__
"""
"""Functions of torch's that write to nothing and give the same each time, by their names in torch and in Tensor."""


class _MadeBy(NamedTuple):
    """The call that makes a tensor.

    Attributes:
        tensor: the tensor, which is kept so that its id stays unique.
        function, args, kwargs: the call.
        part: the number of the tensor among several results; None for a single one.
        settings: the settings of torch that the call ran under.
        version: how often the tensor was written to.
    """

    tensor: torch.Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None
    settings: tuple[Any, ...]
    version: int


class _OtherError(Exception):
    """The error that a value depends on more than sizes."""


class Known:
    """The tensors of a run that are made of sizes and constants alone.

    Attributes:
        reads: number of values that were read.
    """

    def __init__(self) -> None:
        self._made: dict[int, _MadeBy] = {}
        self.reads = 0

    def forget(self) -> None:
        """Forget all tensors, at the end of a run."""
        self._made.clear()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is known to depend on sizes alone."""
        return id(tensor) in self._made

    def note(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note the result of a call of one of torch's functions.

        Unless the function is known to write to nothing, the tensors it was given and gave are forgotten.

        Args:
            function, args, kwargs: the call.
            out: its result.
        """
        if function not in _KNOWN or kwargs.get("out") is not None:
            if function not in _READS and not _asks(function, out):
                self._let_go((args, kwargs, out))
            return
        made = out if isinstance(out, (tuple, list)) else (out,)
        if not made or any(not isinstance(each, torch.Tensor) or id(each) in self._made for each in made):
            return
        like = function in _OF_SIZES and bool(args) and isinstance(args[0], torch.Tensor)
        if not all(map(self._is_known, args[like:])) or not all(map(self._is_known, kwargs.values())):
            return
        # Copy the lists, since the code may change its own.
        given = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor, (tuple(args[like:]), dict(kwargs)))
        called = functools.partial(_made_like, function, args[0].dtype, args[0].shape) if like else function
        for number, each in enumerate(made):
            part = None if made is not out else number
            self._made[id(each)] = _MadeBy(each, called, given[0], given[1], part, _settings(), _version(each))

    def read(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the value that a function reads into Python; :data:`UNKNOWN` if it depends on more than sizes.

        Args:
            function, args, kwargs: the call.
        """
        if function not in _READS or not all(map(self._is_known, (*args, *kwargs.values()))):
            return UNKNOWN
        try:
            with _disable_current_modes(), _PureOperations():  # type: ignore[no-untyped-call]
                found = self._call(function, args, kwargs, {})
        except failures(Exception) as error:
            logger.debug("%s depends on more than sizes", function, exc_info=error)
            return UNKNOWN
        self.reads += 1
        return found

    def written(self, operation: Any, args: Any, kwargs: Any) -> None:
        """Forget the tensors that an operation writes to.

        The operation may be one that a function runs inside, where no mode for torch's functions sees it.
        """
        if self._made and isinstance(operation, torch._ops.OpOverload) and operation._schema.is_mutable:
            self._let_go((args, kwargs))

    def _let_go(self, values: Any) -> None:
        """Forget tensors that a function may have written to, and all others in their memory."""
        if self._made and (memory := memory_of(values)):
            self._made = {key: made for key, made in self._made.items() if _memory(made.tensor) not in memory}

    def _is_known(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return id(value) in self._made
        if type(value) in (tuple, list):
            return all(map(self._is_known, value))
        if type(value) is slice:
            return all(map(self._is_known, (value.start, value.stop, value.step)))
        return value is Ellipsis or isinstance(value, torch.memory_format | torch.layout) or is_plain(value)

    def _call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], values: dict[int, Any]
    ) -> Any:
        """Call a function on values in place of the tensors of a run.

        Args:
            function, args, kwargs: the call.
            values: takes up the values of tensors that were computed, by the tensor's id.
        """

        def value(leaf: Any) -> Any:
            if id(leaf) not in values:
                made = self._made.get(id(leaf))
                if made is None or made.settings != _settings() or made.version != _version(leaf):
                    raise _OtherError
                found = self._call(made.function, made.args, made.kwargs, values)
                values[id(leaf)] = found if made.part is None else found[made.part]
            return values[id(leaf)]

        given, named = pytree.tree_map_only(torch.Tensor, value, (tuple(args), dict(kwargs)))
        return function(*given, **named)


class _PureOperations(TorchDispatchMode):
    """A mode that refuses operations that give another value each time, or that are not torch's own."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or func.namespace not in ("aten", "prims", "prim"):
            raise _OtherError
        return func(*args, **(kwargs or {}))


def _made_like(function: Callable[..., Any], dtype: torch.dtype, shape: torch.Size, *args: Any, **kwargs: Any) -> Any:
    """Call a function that makes a tensor of another one's metadata, and give it one of this dtype and shape."""
    return function(torch.zeros((), dtype=dtype).expand(shape), *args, **kwargs)


def _functions(names: Sequence[str]) -> set[Any]:
    return {getattr(place, name) for name in names for place in (torch, torch.Tensor) if hasattr(place, name)}


_OF_SIZES = _functions(_LIKE)
_KNOWN = _functions(_PURE.split()) | _OF_SIZES | {torch.nn.functional.pad}


def _asks(function: Callable[..., Any], out: Any) -> bool:
    """Tell whether a call writes to nothing and gives no tensor through which somebody could write.

    Such a call reads an attribute (a shape, a dtype, a flag), or is an operation whose schemas say so.
    """
    if isinstance(out, torch.Tensor):
        return False
    if isinstance(function, torch._ops.OpOverloadPacket):
        overloads = [getattr(function, name) for name in function.overloads()]
        return out is None and not any(each._schema.is_mutable for each in overloads)
    return getattr(function, "__name__", None) == "__get__"


def memory_of(values: Any) -> set[int | None]:
    """Return the ids of the memory that tensors lie in, but for those whose memory is not of one piece."""
    return {_memory(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)} - {None}


def _memory(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to; -1 for one made in inference mode, which does not count."""
    return -1 if tensor.is_inference() else int(tensor._version)


def _settings() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    autocasts = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return torch.get_default_dtype(), torch._C._get_default_device(), *autocasts
