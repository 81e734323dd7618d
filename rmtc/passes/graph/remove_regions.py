"""Pass remove-regions: a graph of known nodes only, with autocast as explicit casts and without grad mode."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmtc.errors import CaptureError, Location, RefusedError, raised_by_signal
from rmtc.ir.program import given
from rmtc.passes.registry import enter
from rmtc.quiet import quiet_fakes

logger = logging.getLogger(__name__)

aten = torch.ops.aten
_ENTER, _LEAVE = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_GRADIENTS = torch._C._set_grad_enabled
REGIONS: tuple[Any, ...] = (_ENTER, _LEAVE, _GRADIENTS)
"""The functions in a graph that begin and end regions."""


@dataclass(frozen=True)
class Autocast:
    """The state of autocast for one device type."""

    device: str
    dtype: torch.dtype | None
    enabled: bool

    @staticmethod
    def ambient() -> tuple[Autocast, ...]:
        """Return the caller's autocast, for every device type where it is on."""
        return tuple(
            Autocast(device, torch.get_autocast_dtype(device), True)
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        )


@enter("remove-regions", "autocast becomes explicit casts, grad mode goes")
@dataclass(frozen=True)
class RemoveRegions:
    """Make the graph independent of the modes it runs under.

    Needs: a functional pre-dispatch graph, with `_enter_autocast`, `_exit_autocast` and `_set_grad_enabled` nodes.
    Gives: the same graph without them. Inside a region where autocast is on, the casts that autocast would make are
    operations. The program is to run with autocast off. If gradients are asked for, what an operation gives inside a
    region without them is detached.
    Checks: every other node is a function of its operands. Every region that is entered is left. With the casts, an
    operation runs inside what it runs under autocast. No result requires gradients because a region turns them on.

        %r = _enter_autocast(cpu, bfloat16)     %c = _to_copy(%x, dtype=bfloat16)
        %y = linear(%x, %w)               ->    %d = _to_copy(%w, dtype=bfloat16)
        _exit_autocast(%r)                      %y = linear(%c, %d)

    Attributes:
        ambient: the caller's autocast.
        gradients: whether the caller has gradients on, or inference mode, in which nothing requires them.
        trained: whether gradients are asked for.
    """

    ambient: tuple[Autocast, ...] = ()
    gradients: bool = False
    trained: bool = False

    def apply(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            _refuse_unknown(node)
            if self.trained and node.target is aten.embedding.default:
                _refuse_counting(node)
        if not self.gradients:
            _refuse_gradients(graph)
        state = {each.device: each for each in self.ambient}
        stack: dict[fx.Node, Autocast | None] = {}
        memo: dict[Any, tuple[torch.dtype | None, ...]] = {}
        off = False
        for node in list(graph.nodes):
            if node.target is _ENTER:
                device, dtype, enabled = _region(node)
                stack[node] = state.get(device)
                state[device] = Autocast(device, dtype, enabled)
            elif node.target is _LEAVE:
                device, *_ = _region(node.args[0])
                before = stack.pop(node.args[0])
                state[device] = before or Autocast(device, None, False)
                graph.erase_node(node)
            elif is_grad_mode(node):
                off = not node.args[0]
                graph.erase_node(node)
            elif node.op == "call_function":
                if off and self.trained and isinstance(node.meta.get("val"), torch.Tensor) and _differentiable(node):
                    _detach(graph, node)
                for region in state.values():
                    if region.enabled:
                        _make_explicit(graph, node, region, memo)
        for node in reversed(list(graph.nodes)):
            if node.target is _ENTER:
                graph.erase_node(node)


def is_grad_mode(node: fx.Node) -> bool:
    """Tell whether a node turns gradients on or off."""
    return node.target is _GRADIENTS


def _detach(graph: fx.Graph, node: fx.Node) -> None:
    """Let what follows an operation read its value without a gradient."""
    if node.target is aten.detach.default:
        return
    with graph.inserting_after(node):
        detached = graph.call_function(aten.detach.default, (node,))
    detached.meta.update(node.meta)
    node.replace_all_uses_with(detached, lambda user: user is not detached)


def generator_refusal(location: Location | None) -> RefusedError:
    """Return the refusal of a forward that draws from a generator of its own."""
    return RefusedError(
        "the forward draws from a torch.Generator of its own: each draw changes the next one, and a schedule draws in "
        "another order",
        location=location,
        remedy="draw from torch's own generator, or before the call, into an argument",
    )


def _refuse_unknown(node: fx.Node) -> None:
    """Refuse a node unless it is a function of its operands, or begins or ends a region that is removed.

    Raises:
        RefusedError: if that is not known.
    """
    target: Any = node.target
    if node.op in ("placeholder", "output") or target in (*REGIONS, operator.getitem):
        return
    if node.op == "get_attr":
        owner = node.graph.owning_module
        held = None if owner is None else getattr(owner, str(target), None)
        if owner is None or isinstance(held, torch.Tensor):
            return
        if isinstance(held, torch.Generator):
            raise generator_refusal(next((user.meta.get("location") for user in node.users), None))
        reason = f"the trace holds {target}, which is no tensor"
        remedy = "keep tensors, numbers and strings in what the forward reads"
    elif not isinstance(target, torch._ops.OpOverload):
        module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", str(target))
        higher = isinstance(target, torch._ops.HigherOrderOperator)
        if module.startswith("torch._functorch"):
            reason = "the forward transforms functions by other means than torch.func's vmap, grad, vjp and jvp, which "
            reason += f"changes what the operations inside do ({name})"
        else:
            reason = f"{module}.{name}".lstrip(".") + f" is {'a higher-order operator' if higher else 'no operator'}: "
            reason += "what it does to the operations around it is not known"
        remedy = "write what it does as operations on tensors, or with these functions of torch.func"
    elif target in (aten._make_dual.default, aten._unpack_dual.default):  # torch 2.11 traces no level around them
        reason = f"the forward computes forward-mode gradients by {target}: what is inside of them is not known"
        remedy = "use torch.func.jvp"
    elif writes(node):
        reason = f"{target} writes to its argument and could not be turned into a value"
        remedy = "use the operation that returns a new tensor"
    elif target.namespace not in ("aten", "prims", "rmtc") and torch.Tag.nondeterministic_seeded in target.tags:
        reason = f"{target} draws random numbers, and whether from torch's generators is not known"
        remedy = "draw with torch's own operations, or before the call"
    elif target.namespace not in ("aten", "prims", "rmtc") and not node.all_input_nodes:
        reason = f"{target} takes no tensor: whether it gives the same each time is not known"
        remedy = "give it a tensor, or call it before the forward and pass what it gives"
    else:
        return
    raise RefusedError(reason, location=node.meta.get("location"), remedy=remedy)


def _refuse_counting(node: fx.Node) -> None:
    """Refuse an embedding whose gradient is sparse, or divided by how often the call has an index."""
    known = given(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    option = next((name for name in ("scale_grad_by_freq", "sparse") if known.get(name)), None)
    if option is not None:
        raise RefusedError(
            f"gradients are asked for, and an embedding with {option}=True has others for several segments at once",
            location=node.meta.get("location"),
            remedy=f"make the embedding without {option}",
        )


def writes(node: fx.Node) -> bool:
    """Tell whether an operation writes to an argument.

    Its schema says so, except where an operation in training mode updates running statistics.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.is_mutable or not _keeps_statistics(target):
        return bool(target._schema.is_mutable)
    known = given(target, node.args, node.kwargs)
    trains = any(known.get(name) for name in ("training", "train", "use_input_stats"))
    return trains and any(known.get(name) is not None for name in ("running_mean", "running_var"))


@functools.cache
def _keeps_statistics(target: torch._ops.OpOverload) -> bool:
    """Tell whether an operation is given running statistics that it writes to in training mode."""
    names = {each.name for each in target._schema.arguments}
    return "functional" not in target.name() and not names.isdisjoint(("running_mean", "running_var"))


def _refuse_gradients(graph: fx.Graph) -> None:
    """Refuse a graph with a result that requires gradients because a region turns them on.

    A caller who has gradients off would get them from the code as written.

    Raises:
        RefusedError: if a result requires gradients, with the place that turns them on.
    """
    on: fx.Node | None = None
    carried: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.meta.get("requires_grad"):
                carried[node] = None
        elif node.target is _GRADIENTS:
            on = node if node.args[0] else None
        elif node.op == "output":
            for each in node.all_input_nodes:
                place = carried.get(each)
                if place is not None:
                    raise RefusedError(
                        "a result requires gradients, which the code turns on: a run by the schedule computes none",
                        location=place.meta.get("location"),
                        remedy="detach the result, or leave it to the caller whether gradients are on",
                    )
        elif node.target is operator.getitem:
            if node.args[0] in carried and _differentiable(node):
                carried[node] = carried[node.args[0]]
        elif node.target is not aten.detach.default:
            # After the region it may still be the same tensor, written to or cast to its own dtype.
            places = [carried[each] or on for each in node.all_input_nodes if each in carried]
            place = next(filter(None, places), None)
            if place is not None and _differentiable(node):
                carried[node] = place


def _differentiable(node: fx.Node) -> bool:
    """Tell whether the value of a node may require gradients."""
    if getattr(node.target, "__name__", "").endswith("_like.default"):
        return False
    values = tree_leaves(node.meta.get("val"))
    return any(isinstance(each, torch.Tensor) and (each.is_floating_point() or each.is_complex()) for each in values)


def _region(node: fx.Node) -> tuple[str, torch.dtype | None, bool]:
    device, dtype, enabled, *_ = (*node.args, *(None,) * 4)
    return str(device), dtype, True if enabled is None else bool(enabled)


def _make_explicit(
    graph: fx.Graph, node: fx.Node, region: Autocast, memo: dict[Any, tuple[torch.dtype | None, ...]]
) -> None:
    """Insert before a node the casts of its floating inputs that autocast makes, found by asking autocast."""
    inputs = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), torch.Tensor)]
    if not isinstance(node.target, torch._ops.OpOverload) or not any(
        each.meta["val"].is_floating_point() and each.meta["val"].device.type == region.device for each in inputs
    ):
        return
    places = {each: number for number, each in enumerate(inputs)}
    structure = repr(fx.node.map_arg((node.args, node.kwargs), lambda each: places.get(each, each)))
    key = (node.target, region, structure, tuple((each.meta["val"].dtype, each.meta["val"].shape) for each in inputs))
    if key not in memo:
        memo[key] = _ask(node, inputs, region)
    for each, dtype in zip(inputs, memo[key], strict=True):
        if dtype is not None:
            with graph.inserting_before(node):
                cast = graph.call_function(aten._to_copy.default, (each,), {"dtype": dtype})
            cast.meta.update({key: value for key, value in node.meta.items() if key != "name"})
            with each.meta["val"].fake_mode:
                cast.meta["val"] = each.meta["val"].to(dtype)
            node.replace_input_with(each, cast)


class _Watch(TorchDispatchMode):
    """A mode that notes the dtype to which each tensor, or a view of it, is cast first, and which operations run."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._index = {id(tensor): i for i, tensor in enumerate(tensors)}
        self._kept: list[torch.Tensor] = []  # ids stay unique while the tensors live
        self.casts: list[torch.dtype | None] = [None] * len(tensors)
        self.ran: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        source = self._index.get(id(args[0])) if args else None
        if func is aten._to_copy.default:
            if source is not None and self.casts[source] is None:
                self.casts[source] = (kwargs or {}).get("dtype")
        elif not func.is_view and func.namespace == "aten":
            self.ran.append((func, *(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))))
        elif source is not None and isinstance(out, torch.Tensor):
            self._index[id(out)] = source
            self._kept.append(out)
        return out


def _ask(node: fx.Node, inputs: list[fx.Node], region: Autocast) -> tuple[torch.dtype | None, ...]:
    """Find the casts of inputs that autocast makes.

    The operation runs with autocast, without it, and with autocast to another dtype. A cast without autocast is the
    operation's own. A cast to autocast's dtype follows that dtype when it is another.

    Returns:
        The dtype to which each input is to be cast, or None for those that stay.

    Raises:
        CaptureError: if the operation does not run under autocast, or runs other operations inside with explicit casts.
    """
    mode: FakeTensorMode = inputs[0].meta["val"].fake_mode
    other = torch.float16 if region.dtype is torch.bfloat16 else torch.bfloat16

    def run(dtype: torch.dtype | None, dtypes: Sequence[torch.dtype | None] = ()) -> _Watch | None:
        values = [each.meta["val"] for each in inputs]
        with mode:
            tensors = {
                each: torch.empty(value.shape, dtype=new or value.dtype, device=value.device)
                for each, value, new in zip(inputs, values, dtypes or [None] * len(inputs), strict=True)
            }
        watch = _Watch(list(tensors.values()))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: tensors.get(each, each.meta.get("val")))
        try:
            on = torch.autocast(region.device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
            with on, mode, watch, torch.no_grad(), quiet_fakes():
                node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError) as error:  # these dtypes do not go together
            if raised_by_signal(error):
                raise
            logger.debug("%s with autocast to %s: %s", node.target, dtype, error)
            return None
        return watch

    asked = run(region.dtype)
    if asked is None:
        raise CaptureError(f"{node.target} does not run under autocast", location=node.meta.get("location"))
    if not any(asked.casts):
        casts: list[torch.dtype | None] = [None] * len(inputs)
    else:
        elsewhere, off = run(other), run(None)
        casts = []
        for number, dtype in enumerate(asked.casts):
            own = off is not None and off.casts[number] == dtype
            follows = elsewhere is not None and elsewhere.casts[number] == other
            casts.append(None if own or (dtype != region.dtype and follows) else dtype)
    explicit = run(None, casts)
    if explicit is None or explicit.ran != asked.ran:
        raise CaptureError(
            f"autocast changes dtypes inside {node.target}, and casts of what it reads do not do the same",
            location=node.meta.get("location"),
            remedy="write it as smaller operations, or run it with autocast disabled",
        )
    return tuple(casts)
