"""Pass remove-regions: autocast becomes explicit casts, grad mode goes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmtc.errors import CaptureError
from rmtc.quiet import quiet_fakes

__all__ = ["Autocast", "RemoveRegions"]

logger = logging.getLogger(__name__)

aten = torch.ops.aten


@dataclass(frozen=True)
class Autocast:
    """State of autocast for one device type."""

    device: str
    dtype: torch.dtype | None
    enabled: bool

    @staticmethod
    def ambient() -> tuple[Autocast, ...]:
        """The caller's autocast, for every device type where it is on."""
        return tuple(
            Autocast(device, torch.get_autocast_dtype(device), True)
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        )


@dataclass(frozen=True)
class RemoveRegions:
    """Make the graph independent of the modes it runs under.

    Needs: a functional pre-dispatch graph, with `_enter_autocast`, `_exit_autocast` and `_set_grad_enabled` nodes.
    Gives: the same graph without them; inside a region where autocast is on, the casts that autocast would make are
    operations. The program is to run with autocast off.
    Checks: every region that is entered is left; with the casts, an operation runs inside what it runs under autocast.

        %r = _enter_autocast(cpu, bfloat16)     %c = _to_copy(%x, dtype=bfloat16)
        %y = linear(%x, %w)               ->    %d = _to_copy(%w, dtype=bfloat16)
        _exit_autocast(%r)                      %y = linear(%c, %d)
    """

    ambient: tuple[Autocast, ...] = ()
    name = "remove-regions"

    def apply(self, graph: fx.Graph) -> None:
        enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
        state = {each.device: each for each in self.ambient}
        stack: dict[fx.Node, Autocast | None] = {}
        memo: dict[Any, tuple[torch.dtype | None, ...]] = {}
        for node in list(graph.nodes):
            if node.target is enter:
                device, dtype, enabled = _region(node)
                stack[node] = state.get(device)
                state[device] = Autocast(device, dtype, enabled)
            elif node.target is leave:
                device, *_ = _region(node.args[0])
                before = stack.pop(node.args[0])
                state[device] = before or Autocast(device, None, False)
                graph.erase_node(node)
            elif node.target is torch._C._set_grad_enabled:
                graph.erase_node(node)
            elif node.op == "call_function":
                for region in state.values():
                    if region.enabled:
                        _make_explicit(graph, node, region, memo)
        for node in reversed(list(graph.nodes)):
            if node.target is enter:
                graph.erase_node(node)


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
    """Notes to which dtype each of some tensors, or a view of it, is cast first, and which operations run."""

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
    """Find the casts.

    An operation may cast for itself, autocast or not. Autocast's casts to its own dtype follow that dtype when it is
    another; casts that are there without autocast are the operation's.
    """
    mode: FakeTensorMode = inputs[0].meta["val"].fake_mode
    other = torch.float16 if region.dtype is torch.bfloat16 else torch.bfloat16

    def run(dtype: torch.dtype | None, given: Sequence[torch.dtype | None] = ()) -> _Watch | None:
        values = [each.meta["val"] for each in inputs]
        with mode:
            tensors = {
                each: torch.empty(value.shape, dtype=new or value.dtype, device=value.device)
                for each, value, new in zip(inputs, values, given or [None] * len(inputs), strict=True)
            }
        watch = _Watch(list(tensors.values()))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: tensors.get(each, each.meta.get("val")))
        try:
            with _autocast(region.device, dtype), mode, watch, torch.no_grad(), quiet_fakes():
                node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError) as error:  # these dtypes do not go together
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


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        yield
