"""The places of compiled calls: that of a module in the module, those of its methods beside it.

A method is found through the class, in which a function stands in for it. That looks in the instance for what runs the
method. A copy of the instance, whoever makes it, holds nothing there, so its methods run as written.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

from torch import nn

from rmtc.capture.frames import is_of_user
from rmtc.capture.outline import outline_of
from rmtc.capture.own_modes import undecorated
from rmtc.capture.user_code import STANDS_IN, as_written
from rmtc.runtime.backends import nearest
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.decisions import Options
from rmtc.runtime.own_loops import compiled_method

KEY = "_compiled_call_impl"  # where `nn.Module.compile` keeps its call, too: copies and pickles go without it


_F = TypeVar("_F", bound=Callable[..., Any])
_users: weakref.WeakKeyDictionary[Callable[..., Any], weakref.WeakValueDictionary[int, nn.Module | type]]
_users = weakref.WeakKeyDictionary()  # of each function that stands in for a method in a class, by id
_LOCK = threading.RLock()  # of these, and of the places in classes


def _locked(function: _F) -> _F:
    """Let a function run in one thread at a time."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with _LOCK:
            return function(*args)

    return cast(_F, call)


class OfInstance:
    """A descriptor that compiles an instance of a decorated class when it is first called.

    Args:
        options: how.
        functions: the methods that are compiled, too, by name.
    """

    def __init__(self, options: Options, functions: Mapping[str, FunctionType]) -> None:
        self.options, self.functions = options, functions
        self.disabled = 0
        self.instances: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __get__(self, instance: nn.Module | None, owner: type) -> Any:
        if instance is None:
            return None
        compiled = vars(instance).get(KEY)
        if compiled is None:
            compiled = vars(instance)[KEY] = compiled_module(instance, self.options, self.functions)
            for each in (compiled, *compiled.methods.values()):
                each.disabled = self.disabled
            self.instances.add(instance)
        return compiled

    def forget(self) -> None:
        """Let go of the compiled calls of the instances."""
        for instance in list(self.instances):
            vars(instance).pop(KEY, None)

    def made(self) -> list[Compiled]:
        """Return the compiled calls of the instances and of their methods."""
        found = [vars(instance).get(KEY) for instance in self.instances]
        return [each for made in found if isinstance(made, Compiled) for each in (made, *made.methods.values())]


def compiled_of(target: Any) -> Compiled | None:
    """Return the compiled call of a module or function, or None if it is not compiled."""
    target = getattr(target, "_orig_mod", target)  # the wrapper of torch.compile
    if isinstance(target, nn.Module):
        found = getattr(target, KEY, None)
    elif isinstance(target, MethodType) and hasattr(target, STANDS_IN):
        found = getattr(target, STANDS_IN)(target.__self__)
    else:
        found = getattr(target, "_rmtc", None)
    return found if isinstance(found, Compiled) else None


def compiled_module(module: nn.Module, options: Options, functions: Mapping[str, FunctionType]) -> Compiled:
    """Make the compiled call of a module, with those of its methods.

    Args:
        module: the module.
        options: how.
        functions: what :func:`install` returned.
    """
    made = Compiled(module, options)
    for name, function in functions.items():
        asked = name in options.methods
        made.methods[name] = compiled_method(MethodType(function, module), replace(options, methods=()), asked)
        made.stats.methods[name] = made.methods[name].stats
    return made


def compile_module(module: nn.Module, options: Options) -> None:
    """Compile a module in place, with its methods.

    Raises:
        ValueError: if torch has compiled it, or a name is not that of a method.
    """
    present = vars(module).get(KEY)
    if present is not None and not isinstance(present, Compiled):
        raise ValueError(
            f"{type(module).__name__} is compiled by nn.Module.compile already: leave that out; "
            'rmtc.compile(model, backend="inductor") compiles what a step runs'
        )
    functions = install(module, [*options.methods, *found_in(module, options.methods)])
    if present is None or not is_current(present, options, functions):
        if present is not None:
            release(module, present.methods.keys() - functions.keys())
        vars(module)[KEY] = compiled_module(module, options, functions)  # it may have a __setattr__ of its own


def compile_class(kind: type[nn.Module], options: Options) -> None:
    """Let instances of a class be compiled on their first calls, those that were before anew.

    Raises:
        ValueError: if a name is not that of a method.
    """
    before = vars(kind).get(KEY)
    functions = install(kind, [*options.methods, *found_in(kind, options.methods)])
    if isinstance(before, OfInstance):
        release(kind, before.functions.keys() - functions.keys())
        before.forget()
    setattr(kind, KEY, OfInstance(options, functions))


def compile_method(method: MethodType, before: Compiled | None, options: Options) -> MethodType:
    """Return a method that runs by the schedule.

    It is bound as the given one is. Python binds the copy that it holds in a copy of its owner to that copy, whose
    calls then run as written.

    Args:
        method: the method.
        before: its compiled call, if it has one already.
        options: how.
    """
    if before is None:

        def find(owner: Any) -> Compiled | None:
            return find.compiled if owner is method.__self__ else None  # type: ignore[attr-defined]

        find.compiled = compiled_method(method, options)  # type: ignore[attr-defined]
        return MethodType(_in_place_of(method.__func__, find), method.__self__)
    if before.options == options:
        return method
    made, function = compiled_method(cast(MethodType, before.function), options), cast(Any, method.__func__)
    if function in _users:
        whole = vars(method.__self__)[KEY]
        name = next(name for name, each in whole.methods.items() if each is before)
        whole.methods[name], whole.stats.methods[name] = made, made.stats
    elif STANDS_IN in vars(function):
        getattr(function, STANDS_IN).compiled = made
    else:  # a function that was compiled in the class
        function._rmtc = made
    return method


def _in_place_of(function: Callable[..., Any], find: Callable[[Any], Compiled | None]) -> Callable[..., Any]:
    """Return a function that runs by the schedule for the objects that have one, and else as written."""

    @functools.wraps(function)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        compiled = find(self)  # the guards of other captures find the code of `function` in this closure
        return function(self, *args, **kwargs) if compiled is None else compiled(*args, **kwargs)

    setattr(call, STANDS_IN, find)
    return call


def is_current(present: Compiled, options: Options, functions: Mapping[str, FunctionType]) -> bool:
    """Tell whether a module is compiled with options, and so are its methods as they are written now."""
    own = replace(options, methods=())
    return (
        present.options == options
        and present.methods.keys() == functions.keys()
        and all(
            each.options == own and getattr(each.function, "__func__", None) is functions[name]
            for name, each in present.methods.items()
        )
    )


def found_in(user: nn.Module | type, names: Sequence[str]) -> list[str]:
    """Return the names of methods that are compiled without being named: a `generate` of the user's with a loop.

    Args:
        user: a module, or a class of modules.
        names: the names that the user gives.
    """
    kind, name = user if isinstance(user, type) else type(user), "generate"
    home = next((each for each in kind.__mro__ if name in vars(each)), None)
    if home is None or name in names or (name in vars(user) and user is not kind):
        return []
    function = undecorated(as_written(vars(home)[name]))
    if not isinstance(function, FunctionType) or not is_of_user(function.__code__.co_filename):
        return []
    outline = outline_of(function)
    return [name] if outline is not None and any(each.items for each in outline.loops) else []


@_locked
def install(user: nn.Module | type, names: Iterable[str]) -> dict[str, FunctionType]:
    """Let methods of a class run by the schedule for the instances that have one.

    Args:
        user: the module, or the class of all the modules, that is to have one.
        names: names of methods.

    Returns:
        The methods as written, by name.

    Raises:
        ValueError: if a name is not that of a method.
    """
    kind = user if isinstance(user, type) else type(user)
    homes = {name: _home(kind, name) for name in names}
    there: dict[str, Callable[..., Any]] = {name: vars(home)[name] for name, home in homes.items()}
    found = {name: as_written(each) for name, each in there.items()}
    held = {} if isinstance(user, type) else vars(user)
    for name in found.keys() & held.keys():
        own: Any = held[name]
        bound = isinstance(own, MethodType) and own.__self__ is user
        if not bound or inspect.unwrap(own.__func__) is not inspect.unwrap(found[name]):
            raise ValueError(f"{name!r} is an attribute of the module, which hides the method of its class: delete it")
    for name, home in homes.items():
        held.pop(name, None)  # the method itself, as `model.read = rmtc.compile(model.read)` has left it
        call = there[name]
        # A class body may have taken what stands in for another method.
        if call not in _users or getattr(call, STANDS_IN).args != (name, found[name]):
            call = _in_place_of(found[name], functools.partial(_own, name, found[name]))
            _users[call] = weakref.WeakValueDictionary()
            setattr(home, name, call)
        _users[call][id(user)] = user
    return found


@_locked
def release(user: nn.Module | type, names: Iterable[str]) -> None:
    """Undo :func:`install`, where nobody else is left who needs it."""
    kind = user if isinstance(user, type) else type(user)
    for home, name in [(home, name) for name in names for home in kind.__mro__]:
        call = vars(home).get(name)
        users = _users.get(call) if isinstance(call, FunctionType) else None
        if users is not None and users.pop(id(user), None) is not None and not users:
            setattr(home, name, as_written(call))


def _own(name: str, function: FunctionType, instance: Any) -> Compiled | None:
    """Return the compiled call of an instance's method; None if it has none.

    Args:
        name: name of the method.
        function: the method as written. A class and its base may both have a method of the name.
        instance: the instance.
    """
    whole = getattr(instance, KEY, None)
    if not isinstance(whole, Compiled) or whole.function is not instance:
        return None
    found = whole.methods.get(name)
    return found if found is not None and getattr(found.function, "__func__", None) is function else None


def _home(kind: type, name: str) -> type:
    """Return the class that a method is written in.

    Raises:
        ValueError: if the name is not that of a method.
    """
    if hasattr(nn.Module, name):
        hint = ": the call of the module is compiled in any case" if name in ("forward", "__call__") else ""
        raise ValueError(f"methods are those of {kind.__name__}, and {name!r} is one of every nn.Module{hint}")
    home = next((each for each in kind.__mro__ if name in vars(each)), None)
    if home is None:
        own = [each for each in dir(kind) if not (each.startswith("_") or hasattr(nn.Module, each))]
        own = [each for each in own if inspect.isfunction(inspect.getattr_static(kind, each))]
        raise ValueError(f"{kind.__name__} has no method {name!r}{nearest(name, own)}")
    if not isinstance(found := vars(home)[name], FunctionType):
        raise ValueError(f"{kind.__name__}.{name} is a {type(found).__name__}, and no method")
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_kind(found) for is_kind in kinds):
        raise ValueError(f"{kind.__name__}.{name} is a coroutine or a generator, and returns before it has run")
    return home
