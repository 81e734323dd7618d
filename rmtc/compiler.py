"""`rmtc.compile`, and the functions that undo, disable and account for it."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar, cast, overload

from torch import Tensor, nn

from rmtc.restoring import finish
from rmtc.runtime.backends import Backend, backend_named, nearest
from rmtc.runtime.background import refuse_background
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.decisions import Options
from rmtc.runtime.estimate import kind_named
from rmtc.runtime.methods import KEY, OfInstance, compile_class, compile_method, compile_module, release
from rmtc.runtime.methods import compiled_of as compiled_of
from rmtc.runtime.pack import Pack
from rmtc.runtime.recompute import RECOMPUTE
from rmtc.runtime.stats import Stats
from rmtc.runtime.stream import Stream

T = TypeVar("T", bound=Callable[..., Any])

_OPTIONS = ("max_group", "memory_budget", "repack_weights", "skip_python_random")
_KEYWORDS = ["backend", "strict", "disable", "recompile_limit", "layers", "segment_length", "schedule"]
_KEYWORDS += ["recompute", "methods", "background", "options"]
_OF_TORCH = {
    "fullgraph": "strict=True raises where a model would run as before",
    "dynamic": "one capture serves any number of segments and batch size",
    "mode": "a backend and options say how to run",
}


class _UnknownKeyword(TypeError, ValueError):
    """An unknown keyword: a TypeError as in Python, and a ValueError as for other unknown names."""


@overload
def compile(
    model: T,
    *,
    backend: str | Backend = ...,
    strict: bool = ...,
    disable: bool = ...,
    recompile_limit: int = ...,
    layers: str | None = ...,
    segment_length: int | None = ...,
    schedule: str = ...,
    recompute: str = ...,
    methods: Sequence[str] = ...,
    background: bool = ...,
    options: dict[str, Any] | None = ...,
) -> T: ...


@overload
def compile(
    model: None = None,
    *,
    backend: str | Backend = ...,
    strict: bool = ...,
    disable: bool = ...,
    recompile_limit: int = ...,
    layers: str | None = ...,
    segment_length: int | None = ...,
    schedule: str = ...,
    recompute: str = ...,
    methods: Sequence[str] = ...,
    background: bool = ...,
    options: dict[str, Any] | None = ...,
) -> Callable[[T], T]: ...


def compile(
    model: T | None = None,
    *,
    backend: str | Backend = "auto",
    strict: bool = False,
    disable: bool = False,
    recompile_limit: int = 8,
    layers: str | None = None,
    segment_length: int | None = None,
    schedule: str = "best",
    recompute: str = "auto",
    methods: Sequence[str] = (),
    background: bool = False,
    options: dict[str, Any] | None = None,
    **unknown: Any,
) -> T | Callable[[T], T]:
    """Run the loop over segments of a model or function with its proven schedule.

    A module is compiled in place, as `nn.Module.compile` does, and returned: ``rmtc.compile(model) is model``. Its
    class, its parameters and their names stay. Calling it runs the schedule, and ``model.forward`` is the original. A
    function is wrapped.

    The first call captures the loop, which takes seconds. Later calls of any number of segments are checked to be the
    same loop and run, with their backward pass where gradients are asked for. A call that cannot be captured or proven
    runs as before, with one :class:`FallbackWarning` per reason. Dropout draws other numbers than the model as written.

    Args:
        model: an ``nn.Module``, a function that loops over segments, or an ``nn.Module`` class, each instance of which
            is then compiled on its first call. Without it, a decorator.
        backend: one of :func:`list_backends`, ``"auto"`` or a callable.

            - ``"torch"`` keeps the memory of a group of cells for later calls.
            - ``"inductor"`` compiles bodies when a call first runs them. That takes seconds, and is kept on disk.
            - ``"triton"`` runs kernels of several operations each for layers on a GPU. None has run on one yet.
              Therefore the results of each body in its first launch, and in its first one of several cells, are
              compared with those of torch's operations. A difference is an error.
            - ``"auto"`` takes ``"triton"`` on a GPU that it compiles for (compute capability 8.0, 9.0 or 10.0, or
              gfx942), and torch for bodies that cannot run by kernels. Elsewhere, with ``schedule="best"``, it takes
              ``"inductor"`` if that is estimated to be clearly faster for long calls, and else ``"torch"``.
              ``rmtc.stats(model).last_run.backend`` names it.
            - A callable takes a :class:`rmtc.ir.wavefront.WavefrontProgram` and its weights, and returns a runner.
        strict: raise :class:`RefusedError` or :class:`CaptureError` in place of running as before. Any other exception
            of a capture or a scheduled run comes as an :class:`RmtcError` with its cause chained.
        disable: return ``model`` as it is.
        recompile_limit: limit on the captures that are made anew because a call differs from those before in what a
            capture depends on. Captures made anew because weights were replaced or cast have the same limit, and a
            count of their own. A call that would need more runs as before.
        layers: name of the list of layers as ``named_parameters`` spells it, where it is not found.
        segment_length: positions of a segment, where it is not found.
        schedule: the kind of schedule. All but ``"best"`` are run whatever they cost.

            - ``"best"`` is the fastest, at first by estimates, then by the times that calls took. ``rmtc.explain``
              prints the estimates and the origin of their constants. For short calls it may be the model as written.
              The file that ``RMTC_COST_MODEL`` names holds constants that no measurement overrules, nor are calls
              measured under deterministic algorithms.
            - ``"shortest"`` is the proven schedule with the fewest steps.
            - ``"fission"`` runs recurrences apart from the non-recurrent operations, which run for all segments at
              once.
            - ``"diagonal"`` runs at most one cell of each layer in a step.
            - ``"sequential"`` runs one cell after another.
        recompute: what the backward pass of a call computes again, in place of keeping it from the forward pass.

            - ``"none"``: nothing. About as much is kept as of the model as written.
            - ``"pointwise"``: views, copies and pointwise operations inside cells, such as activations. Of a
              transformer about 0.6 is kept.
            - ``"cells"``: all cells. Their operands are kept: hidden states and memories.
            - ``"auto"``: as many cells as it takes to keep at most half, or at most the option ``memory_budget``. Where
              little is kept, nothing is computed again.
        methods: names of methods that are compiled beside the module's call, such as ``("read",)``. The options hold
            for each of them, and ``rmtc.stats(model.read)`` has the counts of one. In copies of the model they run as
            written. Of a method that goes on where no trace can follow the loop is compiled, and of a ``generate`` with
            a loop over something, in a file of the user's, without being named.
        background: fill the cache in the background in place of capturing in the first call, for models on a CPU, on
            Linux. A forked process with one thread does, for at most five minutes. Until it has ended, calls run as
            written; the next one takes up what it has found. ``strict=True`` and ``RMTC_CACHE=0`` do not go with it.
        options: a dict of these.

            - ``{"max_group": 8}`` lets at most so many cells run at once. Where all segments of a layer could, they run
              in blocks of so many, whose memory does not grow with the text. By default a block has as many as keep the
              machine busy.
            - ``{"memory_budget": 2**30}``: the bytes that ``recompute="auto"`` keeps for the backward pass of a call at
              most. Operands of cells are kept in any case.
            - ``{"repack_weights": True}`` has products read transposed copies of weights, which each call makes anew.
              On a CPU without a C++ compiler that is faster for long texts (from some dozens of segments on) of layers
              that are too large for its cache. The copies stay, and take as much memory again as the layers' matrices.
            - ``{"skip_python_random": True}`` allows code that draws random numbers in Python (``random``,
              ``numpy.random``), which are then not drawn: only if the results do not depend on them.

    Returns:
        ``model`` itself if it is a module or class, a wrapped function, or a decorator.

    Raises:
        ValueError: if there is no such backend, option, keyword or method, a number is too small, ``background`` cannot
            be, or torch has compiled ``model`` already.
        TypeError: if ``model`` cannot be called, or an argument is of another type.

    Example:
        >>> fast = rmtc.compile(model)
        >>> with torch.no_grad():
        ...     fast(input_ids)
    """
    # Check the arguments.
    for name in unknown:
        hint = f": {_OF_TORCH[name]}" if name in _OF_TORCH else nearest(name, _KEYWORDS)
        if name in _OPTIONS:
            hint = f"; it is an option: options={{{name!r}: ...}}"
        raise _UnknownKeyword(f"rmtc.compile has no argument {name!r}{hint}")
    backend_made = backend_named(backend)
    for name, flag in (("strict", strict), ("disable", disable), ("background", background)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is True or False, not {flag!r}")
    _check_number("recompile_limit", recompile_limit, 0)
    if segment_length is not None:
        _check_number("segment_length", segment_length, 1)
    if layers is not None and not isinstance(layers, str):
        raise TypeError(f"layers is a name such as 'model.layers', not {layers!r}")
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"options is a dict of names and values, not {options!r}")
    for name, value in (options or {}).items():
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{nearest(str(name), list(_OPTIONS))}")
        if name in ("max_group", "memory_budget"):
            _check_number(f"option {name!r}", value, 1)
        elif not isinstance(value, bool):
            raise ValueError(f"option {name!r} is True or False, not {value!r}")
    if recompute not in RECOMPUTE:
        hint = nearest(str(recompute), [*RECOMPUTE])
        raise ValueError(f"there is no recompute {recompute!r}{hint}")
    # Refuse what does not go together.
    if recompute != "auto" and (options or {}).get("memory_budget") is not None:
        raise ValueError(f"option 'memory_budget' is of recompute='auto', not of {recompute!r}")
    if not isinstance(methods, (tuple, list)):
        hint = f": write methods=({methods!r},)" if isinstance(methods, str) else ""
        raise TypeError(f"methods is a tuple of names, not {methods!r}{hint}")
    for wrong in (name for name in methods if not isinstance(name, str)):
        hint = f": write {wrong.__name__!r}" if hasattr(wrong, "__name__") else ""
        raise TypeError(f"methods is a tuple of names, and one is of type {type(wrong).__name__}{hint}")
    for name in methods:
        if list(methods).count(name) > 1:
            raise ValueError(f"methods has {name!r} twice")
    if callable(backend) and (options or {}).get("repack_weights"):
        raise ValueError("option 'repack_weights' is one of rmtc's own backends: copies are made anew when these run")
    if background:
        refuse_background(strict)
    # Compile, or make a decorator that does.
    made = Options(
        strict=strict,
        recompile_limit=recompile_limit,
        layers=layers,
        segment_length=segment_length,
        backend=backend_made,
        repack_weights=bool((options or {}).get("repack_weights", False)),
        skip_python_random=bool((options or {}).get("skip_python_random", False)),
        schedule=kind_named(schedule),
        max_group=(options or {}).get("max_group"),
        recompute=recompute,
        memory_budget=(options or {}).get("memory_budget"),
        methods=tuple(methods),
        background=background,
    )

    def apply(target: T) -> T:
        if not callable(target):
            raise TypeError(f"rmtc.compile takes a module, a function or a module class, not a {type(target).__name__}")
        return target if disable else _compile(target, made)

    return apply if model is None else apply(model)


def _check_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} is at least {least}, not {value}")


def _compile(target: T, options: Options) -> T:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    optimised = dynamo is not None and isinstance(target, dynamo.OptimizedModule)
    if optimised or hasattr(target, "_torchdynamo_orig_callable"):
        raise ValueError(f"{_name(target)} is compiled by torch.compile already: hand over what it was made from")
    if isinstance(target, nn.Module):
        compile_module(target, options)
        return target
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"{target.__name__} is no nn.Module class")
        compile_class(target, options)
        return target
    if options.methods:
        raise ValueError(f"methods={options.methods!r} are those of a module, and {_name(target)} is a function")
    before = compiled_of(target)
    if isinstance(target, MethodType):
        return cast(T, compile_method(target, before, options))
    if before is not None:
        if before.options != options:
            target._rmtc = Compiled(before.function, options)  # type: ignore[attr-defined]
        return target

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The guards of others that call this find the code of `target` in the closure.
        return (call._rmtc or target)(*args, **kwargs)  # type: ignore[attr-defined]

    call._rmtc = Compiled(target, options)  # type: ignore[attr-defined]
    return cast(T, call)


def _name(target: Any) -> str:
    return str(getattr(target, "__qualname__", type(target).__name__))


def restore(target: T) -> T:
    """Undo :func:`compile`, of a module that of its methods, too.

    Args:
        target: a result of :func:`compile`; or an instance of a decorated class, which its class then leaves alone.

    Returns:
        The module or class itself, or the function or method that was wrapped. A target that is not compiled comes back
        as it is.
    """
    finish()
    if isinstance(target, type):
        of_instance = vars(target).get(KEY)
        if isinstance(of_instance, OfInstance):
            delattr(target, KEY)
            release(target, of_instance.functions)
            of_instance.forget()
        return target
    if isinstance(target, nn.Module):
        if isinstance(compiled := vars(target).get(KEY), Compiled):
            release(target, compiled.methods)
            del vars(target)[KEY]
        if _of_class(type(target)) is not None:
            vars(target)[KEY] = None  # or its class would compile it again
        return target
    compiled = compiled_of(target)
    return cast(T, compiled.function) if compiled is not None else target


@contextlib.contextmanager
def disabled(target: Callable[..., Any]) -> Iterator[None]:
    """Run a compiled model, with its methods, or a function as before, within the block.

    Args:
        target: a result of :func:`compile`.
    """
    finish()
    of_instance = _of_class(target)
    compiled = compiled_of(target)
    counted: list[OfInstance | Compiled] = [each for each in (of_instance, compiled) if each is not None]
    counted += compiled.methods.values() if compiled is not None else []
    counted += of_instance.made() if of_instance is not None else []
    for each in counted:
        each.disabled += 1
    try:
        yield
    finally:
        for each in {id(each): each for each in (*counted, *(of_instance.made() if of_instance else ()))}.values():
            each.disabled -= 1


def _of_class(target: Any) -> OfInstance | None:
    """Return the descriptor that compiles the instances of a decorated class."""
    kinds = target.__mro__ if isinstance(target, type) else ()
    found = next((vars(kind)[KEY] for kind in kinds if KEY in vars(kind)), None)
    return found if isinstance(found, OfInstance) else None


def stats(target: Callable[..., Any]) -> Stats:
    """Return what a compiled model or function has done so far.

    Args:
        target: a result of :func:`compile`.

    Raises:
        ValueError: if it is not compiled.
    """
    return _compiled(target).stats


def pack(target: Callable[..., Any], *, lanes: int | None = None, states: bool = False) -> Pack:
    """Read many texts with a compiled model, several at once.

    Texts follow one another in lanes. A text begins while the one before it is still in the upper layers, so that no
    step is left idle between them. The results are those of one call after another.

    Args:
        target: a result of :func:`compile`, or of :func:`resume`: then all texts go on from one state, as questions do
            that are asked of what was read.
        lanes: number of texts that are read side by side; by default that which is estimated to be fastest.
        states: return pairs of a text's result and its state, see :func:`state`.

    Returns:
        A callable that takes the texts and returns a list of results, see :class:`rmtc.runtime.pack.Pack`.

    Raises:
        ValueError: if the target is not compiled, or ``lanes`` is below 1.
        TypeError: if ``lanes`` is no whole number, or ``states`` neither True nor False.

    Example:
        >>> fast = rmtc.compile(model)
        >>> with torch.no_grad():
        ...     outputs = rmtc.pack(fast)([short_ids, long_ids, other_ids])
    """
    if lanes is not None:
        _check_number("lanes", lanes, 1)
    if not isinstance(states, bool):
        raise TypeError(f"states is True or False, not {states!r}")
    return Pack(_compiled(target), lanes, states, getattr(target, "_rmtc_state", None))


def state(target: Callable[..., Any]) -> dict[str, Tensor]:
    """Return what the last call of this thread has handed on from segment to segment, to go on from later.

    These are the values that segments read from earlier ones, such as memories. A name is that of the attribute or
    result where a value ends up (``layers.3.memory``), else that of the module and the variable. The tensors are
    copies: they may be changed, moved, put together for a batch, or saved with ``safetensors``.

    Args:
        target: a result of :func:`compile`.

    Returns:
        Tensors by name, detached.

    Raises:
        ValueError: if the target is not compiled.
        StateError: if the last call ran as written, asked for gradients, failed, was a pack or has no state, or if a
            tensor was written to since.

    Example:
        >>> fast(first_ids)
        >>> state = rmtc.state(fast)
        >>> output = rmtc.resume(fast, state)(more_ids)
    """
    return _compiled(target).state


def resume(target: T, state: Mapping[str, Tensor] | None) -> T:
    """Return the model as it goes on from a state: its calls are the later segments of the text that left it.

    Such a call runs by the schedule, also of one segment. Its results are of its own text alone, but for sums that the
    loop adds up from segment to segment: these go on. In the model it leaves what it makes of this text, memories as
    they are after all segments so far. Each call of what is returned begins with the same state; the one that it leaves
    is ``rmtc.state(target)``.

    Where a call ends in the middle of a segment, the next one begins another segment.

    Gradients flow through each call alone: a state is detached. So a long text is trained on in parts, as by truncated
    backpropagation through time.

    Args:
        target: a result of :func:`compile`.
        state: what :func:`state` returned, on the model's device; None to begin anew, by the schedule in any case.

    Returns:
        A function of the model's arguments.

    Raises:
        ValueError: if the target is not compiled.
        TypeError: if the state is no dict of tensors.

    The function raises :class:`StateError` if the state is not of this model, and :class:`RefusedError` if the model
    cannot go on: if a segment depends on its place in the text, the loop would do something else.
    """
    compiled = _compiled(target)
    if state is not None and not (isinstance(state, Mapping) and all(isinstance(name, str) for name in state)):
        raise TypeError(f"a state is a dict of tensors, as rmtc.state returns it, and not {type(state).__name__}")
    held = None if state is None else {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in state.items()}

    @functools.wraps(target.forward if isinstance(target, nn.Module) else target)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled.hand_on(held, args, kwargs)

    call._rmtc, call._rmtc_state = compiled, held  # type: ignore[attr-defined]
    return cast(T, call)


def stream(target: Callable[..., Any], **kwargs: Any) -> Stream:
    """Read a text as it comes: each segment costs one step of the schedule, and none is read twice.

    The model has been called with a text of several segments before. Results come as segments have passed all layers:
    those of the last ones with ``flush``.

    Args:
        target: a result of :func:`compile`, or of :func:`resume`: then the text goes on from a state.
        kwargs: arguments of the model that all pieces have in common.

    Returns:
        A stream, see :class:`rmtc.runtime.stream.Stream`. Several may read with one model at a time.

    Raises:
        ValueError: if the target is not compiled.

    Example:
        >>> with torch.no_grad(), rmtc.stream(fast) as stream:
        ...     for piece in pieces:
        ...         for output in stream.feed(piece):
        ...             use(output)
        ...     rest = stream.flush()
        ...     state = stream.state
    """
    return Stream(_compiled(target), getattr(target, "_rmtc_state", None), kwargs)


def _compiled(target: Callable[..., Any]) -> Compiled:
    """Return the compiled call of a target.

    Raises:
        ValueError: if it is not compiled.
    """
    compiled = compiled_of(target)
    if compiled is None:
        hint = ": each of its instances is, ask one" if _of_class(target) is not None else ""
        raise ValueError(f"{_name(target)} is not compiled by rmtc.compile{hint}")
    return compiled
