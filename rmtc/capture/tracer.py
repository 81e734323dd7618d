"""A tracer of one run of the user's code, as a functional pre-dispatch FX graph.

This is the only file that uses torch's private tracing API. All tensors are replaced by fake ones, so that nothing is
executed. `make_fx` traces before dispatch, so that linear, attention and einsum stay whole. For code that writes to
tensors, `FunctionalTensorMode` under it turns writes into values.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, dispatch_functionalize
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer, _MakefxTracer, _ProxyTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from rmtc.capture.alike import Alike
from rmtc.capture.arguments import Arguments, show
from rmtc.capture.copies import Copies
from rmtc.capture.effects import Effect, find_effects
from rmtc.capture.fakes import Fakes
from rmtc.capture.frames import current_location
from rmtc.capture.known import memory_of
from rmtc.capture.refused_results import (
    inner_tensor,
    refuse_aliases,
    refuse_backward,
    refuse_changed_containers,
    refuse_parameters,
    refuse_views,
)
from rmtc.capture.results import describer_of, left_behind
from rmtc.capture.session import Session
from rmtc.capture.untold import refuse_flags
from rmtc.errors import CaptureError, RefusedError, failures
from rmtc.passes.graph.hidden_writes import refuse_hidden_writes
from rmtc.passes.graph.remove_regions import writes
from rmtc.passes.registry import enter

aten = torch.ops.aten


@dataclass
class RawTrace:
    """The trace of one run of the user's code.

    Attributes:
        module: the graph. A placeholder's ``meta["source"]`` is ``(kind, name)`` with kind ``parameter``, ``buffer``,
            ``state`` or ``input``. An operation's ``meta["location"]`` is a :class:`Location`, and its
            ``meta["module"]`` is the path of the innermost submodule. Its ``meta["name"]``, if there is one, is the
            user's name for its result, such as ``layers.3.A``.
        outputs: the names of the graph's outputs, such as ``output.logits``, ``state:layers.3.A``, ``write:cache``.
        plain: values that are no tensors and that the run left in places, by name.
        result: the description of the returned value, see :mod:`rmtc.capture.objects`.
        effects: what it left in Python objects.
        same: for each result that is itself a tensor of the arguments or the state, the name of that tensor.
        copied: number of calls of modules that were copied from others, by families of modules that are alike.
    """

    module: fx.GraphModule
    outputs: tuple[str, ...]
    plain: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    effects: tuple[Effect, ...] = ()
    same: dict[str, str] = field(default_factory=dict)
    copied: Counter[int] = field(default_factory=Counter)


class Tracer(PythonKeyTracer):
    """A tracer that notes the place in the user's code of each operation, and the name of each attribute tensor."""

    def __init__(self, paths: dict[int, str]) -> None:
        super().__init__()
        self._paths = paths
        self._stack: list[str] = []
        self._thread = threading.get_ident()
        self._outer, self._inference = torch._C._current_autograd_node(), torch.is_inference_mode_enabled()
        self.attributes: list[tuple[str, torch.Tensor | fx.Node]] = []
        self.inference = False  # whether an operation ran in an inference mode that the call itself enters, or leaves
        self.copies: Copies | None = None

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        graph = super().trace(*args, **kwargs)
        # make_fx goes over all nodes for unused reads of symbolic sizes. A trace of fixed sizes has none.
        graph.eliminate_dead_code = lambda *_: False  # type: ignore[method-assign]
        return graph

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        refuse_backward(self._outer)
        if torch.is_inference_mode_enabled() is not self._inference:
            self.inference = True
        node = super().create_node(*args, **kwargs)
        if node.op == "call_function":
            self._place(node)
        return node

    def _place(self, node: fx.Node) -> None:
        node.meta["location"], variable = current_location(3)
        if node.target is operator.getitem and ", " in variable and "[" not in variable:  # q, k, v = x.chunk(3)
            number: Any = node.args[1]
            variable = dict(enumerate(variable.split(", "))).get(number, variable)
        node.meta["variable"] = variable
        node.meta["module"] = self._stack[-1] if self._stack else ""

    def node(self, tensor: torch.Tensor) -> fx.Node | None:
        """Return the node of a tensor; None if it has none, or if its value is known."""
        tracked = self.tensor_tracker.get(tensor)
        return None if tracked is None or tracked.constant is not None else tracked.proxy.node

    def enter(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Let a node stand for a tensor from now on."""
        self.tensor_tracker[tensor] = _ProxyTensor(fx.Proxy(node, self), None)

    def node_of(self, arg: Any) -> Any:
        """Return an argument with nodes in place of its tensors.

        Raises:
            KeyError: if a tensor is not of this trace, or its value is known.
        """
        if type(arg) is FakeTensor:
            tracked = self.tensor_tracker[arg]
            if tracked.constant is not None:
                raise KeyError(arg)
            return tracked.proxy.node
        if isinstance(arg, (tuple, list)):
            return [self.node_of(item) for item in arg]
        return arg

    def value_of(self, out: Any) -> Any:
        """Return the values, ``meta["val"]``, of the nodes of an operation's results."""
        if isinstance(out, torch.Tensor):
            return self.tensor_tracker[out].proxy.node.meta["val"]
        return [self.value_of(each) for each in out]

    def write(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, out: Any
    ) -> None:
        """Write an operation into the graph without running it.

        Args:
            target, args, kwargs: the operation on nodes.
            value: its result, for the passes.
            out: its result, for the user's code.
        """
        refuse_backward(self._outer)
        name = self.graph._target_to_str(getattr(target, "overloadpacket", target).__name__)
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        self._place(node)
        node.meta["val"] = value
        if isinstance(out, torch.Tensor):
            self.enter(out, node)
        else:
            for number, (each, its) in enumerate(zip(out, value, strict=True)):
                self.write(operator.getitem, (node, number), {}, its, each)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self._paths.get(id(m))
        if path is None or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        self._stack.append(path)
        try:
            if self.copies is not None:
                return self.copies.call(m, forward, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self._stack.pop()
            for key, value in (*m.__dict__.items(), *m._buffers.items()):
                if isinstance(value, torch.Tensor):
                    self.attributes.append((f"{path}.{key}" if path else key, inner_tensor(value)))


class _Mode(ProxyTorchDispatchMode):
    """A mode that takes the results of known operations from the memory of fake tensors.

    `ProxyTorchDispatchMode` takes most of a trace's time for what tensors of fixed sizes do not need.
    """

    def __init__(self, fakes: Fakes, tracer: Tracer, *args: Any, **kwargs: Any) -> None:
        super().__init__(tracer, *args, **kwargs)
        self._fakes, self._tracer = fakes, tracer
        self._values: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap each call
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _respells_a_view(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        # An operation without tensors makes one, which torch copies if anything else holds it.
        modes = _modes() if types and func not in _CHOOSING else None
        key = self._fakes.key(func, args, kwargs) if modes is not None else None
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        key = (modes, *key)
        value = self._values.get(key)
        if value is not None:
            try:
                nodes = tuple(map(self._tracer.node_of, args)), {k: self._tracer.node_of(v) for k, v in kwargs.items()}
            except KeyError:
                return super().__torch_dispatch__(func, types, args, kwargs)
            out = self._fakes.recall(key, args)
            self._tracer.write(func, *nodes, value, out)
            return out
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._fakes.learn(key, args, out):
            self._values[key] = self._tracer.value_of(out)
        return out


_CHOOSING = {aten.scaled_dot_product_attention.default}  # flags choose its kernel, and so its strides
_AUTOCASTS = ("cpu", "cuda")


def _modes() -> tuple[Any, ...] | None:
    """Return the modes that determine an operation's result before dispatch, besides its arguments.

    Returns:
        The modes; None if there are other ones, whose effect is not known.
    """
    if torch._C._len_torch_dispatch_stack() != 1 or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if not torch._C._is_any_autocast_enabled():
        return ()
    autocasts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _AUTOCASTS if torch.is_autocast_enabled(kind))
    return autocasts or None


class _Functional(FunctionalTensorMode):
    """A mode that takes operations apart that return an operand's memory while their schema says that they do not.

    Such operations are `type_as`, `einsum` of one operand, `broadcast_tensors`, and dropout in eval mode. A write to
    the result is one to the operand. `FunctionalTensorMode` goes by the schema, and would write to the result alone::

        x.type_as(y).mul_(2)   ->   x.to(y.dtype).mul_(2), which is a view of x
    """

    def __init__(self, fakes: Fakes) -> None:
        super().__init__(pre_dispatch=True, export=True)
        self._fakes = fakes
        self._known: dict[tuple[Any, ...], bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap each call
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._fakes.known.written(func, args, kwargs)
        if types and _says_nothing_of_memory(func) and self._gives_memory_of_operand(func, args, kwargs):
            with self:
                if func in _OF_VIEWS:
                    return _OF_VIEWS[func](*args, **kwargs)
                if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
                    return func._op_dk(_COMPOSITE, *args, **kwargs)  # torch's decomposition of dropout makes a copy
            raise CaptureError(
                f"{func} gives memory of its operand, which its schema does not say",
                location=current_location(3)[0],
                remedy="take a view (view, split, expand) or a copy (clone) in its place",
            )
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _gives_memory_of_operand(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        args, kwargs = pytree.tree_map_only(torch.Tensor, inner_tensor, (args, kwargs))
        key = self._fakes.key(func, args, kwargs)
        found = self._known.get(key) if key is not None else None
        if found is None:
            # Decompositions in Python differ for some operations: that of dropout in eval mode makes a copy.
            bare = pytree.tree_map_only(torch.Tensor, _bare, (args, kwargs))
            with _disable_current_modes(), no_python_dispatcher():
                try:
                    out = func(*bare[0], **bare[1])
                except failures(RuntimeError):  # it has no kernel for the meta device
                    bare, out = (args, kwargs), func(*args, **kwargs)
            found = not memory_of(bare).isdisjoint(memory_of(out))
            if key is not None:
                self._known[key] = found
        return found


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without content that has the same layout."""
    with torch._C._DisableTorchDispatch():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


_OF_VIEWS = {
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
    aten._unsafe_view.default: aten.view.default,
}
"""Operations on the promise that nobody writes to what they give, and those that need none."""

_OWN_SPELLINGS = frozenset(
    {
        *(aten.chunk.default, aten.contiguous.default, aten.expand_as.default, aten.flatten.using_ints),
        *(aten.movedim.int, aten.movedim.intlist, aten.narrow.default, aten.positive.default, aten.reshape.default),
        *(aten.unflatten.int, *(getattr(aten.to, name) for name in aten.to.overloads())),
        *(aten.coalesce.default, aten.pin_memory.default),
    }
)
"""Views that torch takes apart and passes do not: they know them, or these are no views of plain tensors."""


@functools.cache
def _respells_a_view(func: Any) -> bool:
    """Return whether an operation gives a view that torch makes of other views, as `swapaxes` is a transposition."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or func in _OWN_SPELLINGS:
        return False
    aliases = [each.alias_info for each in func._schema.returns]
    if not aliases or any(alias is None or alias.is_write for alias in aliases):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


@functools.cache
def _says_nothing_of_memory(func: Any) -> bool:
    """Return whether the schema of one of torch's operations says that the result has new memory."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or func in FunctionalTensor.metadata_fns:
        return False
    draws = torch.Tag.nondeterministic_seeded in func.tags and func is not aten.dropout.default
    return not draws and not any(argument.alias_info for argument in func._schema.arguments)


class _Maker(_MakefxTracer):
    """A `make_fx` with rmtc's tracer and rmtc's mode."""

    def __init__(self, fakes: Fakes, paths: dict[int, str]) -> None:
        options: dict[str, Any] = {
            "decomposition_table": {},
            "tracing_mode": "real",
            "_allow_non_fake_inputs": False,
            "pre_dispatch": True,
            "record_module_stack": False,
            "_allow_fake_constant": False,
            "_error_on_data_dependent_ops": True,
        }
        if "_disable_torch_fn_metadata_mode" in inspect.signature(_MakefxTracer).parameters:
            options["_disable_torch_fn_metadata_mode"] = True
        super().__init__(**options)
        self._fakes, self._tracer_paths = fakes, paths

    @contextlib.contextmanager
    def _init_modes_from_inputs(self, f: Callable[..., Any], args: tuple[object, ...]) -> Iterator[None]:
        before = self._checkpoint_modes()
        try:
            self.fx_tracer = Tracer(self._tracer_paths)
            self._construct_modes_with_fx_tracer(self.fx_tracer)
            self.proxy_mode = _Mode(self._fakes, self.fx_tracer, self.tracing_mode, pre_dispatch=True)
            yield
        finally:
            self._restore_modes(*before)


@enter("capture", "the segment loop unrolled over a few segments, as a functional pre-dispatch FX graph")
def trace(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], alike: Alike | None = None) -> RawTrace:
    """Trace one run.

    Code that writes to no tensor is traced as it is, which takes three quarters of the time. The first write that is
    found sends this run and later ones through functionalization.

    Args:
        session: the user's callable.
        args, kwargs: arguments with fake tensors of the wanted sizes.
        alike: the modules of which one's call is copied for another one; None to trace all calls.

    Raises:
        RefusedError: for what no graph can hold: values read into Python, shapes that depend on data, backward.
        CaptureError: for anything else the user's code raised.
    """
    if not session.writes or session.trained:
        raw = _trace(session, args, kwargs, None if session.writes else alike, functionalize=False)
        if session.trained:
            refuse_hidden_writes(raw.module.graph)
        if not any(map(writes, raw.module.graph.nodes)):
            return raw
        session.writes = True
    # A write is one to all that share a tensor's memory: each call of a module has to be seen.
    return _trace(session, args, kwargs, None, functionalize=True)


def _trace(
    session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], alike: Alike | None, functionalize: bool
) -> RawTrace:
    arguments = Arguments(args, kwargs, session.arguments.names)
    inputs = arguments.tensors()
    count = len(session.lifted)
    # A tensor that is given twice, or is state too, is one tensor for the code, with a placeholder in each place.
    first = {id(tensor): number for number, tensor in enumerate(session.fake_tensors)}
    order = [first.setdefault(id(tensor), count + number) for number, tensor in enumerate(inputs.values())]
    distinct = [
        tensor if place == count + number else session.fake_tensor(tensor)
        for number, (tensor, place) in enumerate(zip(inputs.values(), order, strict=True))
    ]
    raw = RawTrace(fx.GraphModule(nn.Module(), fx.Graph()), ())
    paths = {key: slot.name for key, slot in session.modules.items()}
    paths[id(session.function)] = ""
    maker = _Maker(session.fake_mode, paths)

    def program(*flat: torch.Tensor) -> list[torch.Tensor]:
        # Put the traced tensors in place of the fake ones, and run the user's code.
        lifted, given = flat[:count], dict(zip(inputs, (flat[place] for place in order), strict=True))
        for tensor, value in zip(inputs.values(), given.values(), strict=True):
            if tensor.requires_grad:
                value.requires_grad_(True)
        required = {path: value.requires_grad for path, value in given.items()}
        before = [inner_tensor(tensor) for tensor in flat]
        new_args, new_kwargs = arguments.map(lambda path, _: given[path])
        handed = Arguments(new_args, new_kwargs, arguments.names)
        leaves = handed.leaves()
        tracer = maker.fx_tracer
        if isinstance(tracer, Tracer) and alike is not None:
            tracer.copies = Copies(session, alike, tracer, paths)
        with session.installed(lifted):
            slots = session.state()
            result = session.call(new_args, new_kwargs)
            refuse_changed_containers(leaves, handed.leaves())
            describer = describer_of(session, handed)
            after = session.state()
            found, plain, raw.result = left_behind(session, result, session.held(lifted), describer, after)
            raw.effects = find_effects(session, slots, after, {**found, **plain}, describer)
        raw.plain.update(plain)
        if session.trained and isinstance(tracer, Tracer) and tracer.inference:
            raise RefusedError(
                "gradients are asked for, and the forward enters torch.inference_mode(), which no graph shows",
                remedy="use torch.no_grad()",
            )
        # Name the results and the tensors that were written, and refuse what a schedule would not do.
        names = [*(lifted.names[0] for lifted in session.lifted), *(show(path) for path in inputs)]
        sources = {id(tensor): name for tensor, name in zip(flat, names, strict=True)}
        raw.same = {name: sources[id(tensor)] for name, tensor in found.items() if id(tensor) in sources}
        refuse_parameters({name: tensor for name, tensor in found.items() if name not in raw.same})
        refuse_flags(found, flat, {show(path): (value, required[path]) for path, value in given.items()})
        written = {
            name: tensor
            for tensor, inner, name in zip(flat, before, names, strict=True)
            if inner_tensor(tensor) is not inner
        }
        refuse_views(written, {name: tensor for name, tensor in found.items() if id(tensor) not in sources})
        found.update((f"write:{name}", tensor) for name, tensor in written.items())
        raw.outputs = tuple(found)
        refuse_aliases(session, raw.outputs)
        # Note the user's names at the nodes.
        if isinstance(tracer, Tracer):
            raw.copied.update({} if tracer.copies is None else tracer.copies.copied)
            named: list[tuple[str, torch.Tensor | fx.Node]] = [*tracer.attributes, *found.items()]
            for name, place in named:
                entry = tracer.tensor_tracker.get(inner_tensor(place)) if isinstance(place, torch.Tensor) else None
                node = place if isinstance(place, fx.Node) else entry.proxy.node if entry is not None else None
                if node is not None:
                    node.meta.setdefault("name", name.removeprefix("state:"))
        return list(found.values())

    traced: Callable[..., Any] = program
    if functionalize:
        traced = dispatch_functionalize(program, _Functional(session.fake_mode))
    # What torch says of conversions in its tracing means nothing to the user.
    with session.fake_mode, warnings.catch_warnings(action="ignore"), _use_lazy_graph_module(True):
        raw.module = maker.trace(traced, *session.fake_tensors, *distinct)
    # Note at each placeholder where its tensor comes from.
    sources = [(lifted.kind, lifted.names, lifted.tensor.requires_grad) for lifted in session.lifted]
    sources += [("input", (show(path),), tensor.requires_grad) for path, tensor in inputs.items()]
    placeholders = [node for node in raw.module.graph.nodes if node.op == "placeholder"]
    for node, (kind, source_names, required) in zip(placeholders, sources, strict=True):
        node.meta["source"], node.meta["names"] = (kind, source_names[0]), source_names
        node.meta["requires_grad"] = required
    return raw
