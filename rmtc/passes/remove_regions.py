"""Pass remove-regions: autocast becomes explicit casts, grad mode goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Autocast", "RemoveRegions"]

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
    Checks: every region that is entered is left.

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
        casts: dict[Any, list[torch.dtype | None]] = {}
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
                        _cast_inputs(graph, node, region, casts)
        for node in reversed(list(graph.nodes)):
            if node.target is enter:
                graph.erase_node(node)


def _region(node: fx.Node) -> tuple[str, torch.dtype | None, bool]:
    device, dtype, enabled, *_ = (*node.args, *(None,) * 4)
    return str(device), dtype, True if enabled is None else bool(enabled)  # type: ignore[return-value]


def _cast_inputs(graph: fx.Graph, node: fx.Node, region: Autocast, memo: dict[Any, list[torch.dtype | None]]) -> None:
    """Insert before a node the casts of its floating inputs that autocast makes, found by asking autocast."""
    inputs = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), torch.Tensor)]
    if not isinstance(node.target, torch._ops.OpOverload) or not any(
        each.meta["val"].is_floating_point() and each.meta["val"].device.type == region.device for each in inputs
    ):
        return
    key = (node.target, region, tuple((each.meta["val"].dtype, each.meta["val"].shape) for each in inputs))
    if key not in memo:
        memo[key] = _observe(node, inputs, region)
    for each, dtype in zip(inputs, memo[key], strict=True):
        if dtype is not None and dtype != each.meta["val"].dtype:
            with graph.inserting_before(node):
                cast = graph.call_function(aten._to_copy.default, (each,), {"dtype": dtype})
            cast.meta.update(node.meta)
            with each.meta["val"].fake_mode:
                cast.meta["val"] = each.meta["val"].to(dtype)
            node.replace_input_with(each, cast)


class _Watch(TorchDispatchMode):
    """Notes to which dtype autocast casts each of some tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._index = {id(tensor): i for i, tensor in enumerate(tensors)}
        self.casts: list[torch.dtype | None] = [None] * len(tensors)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._to_copy.default and id(args[0]) in self._index:
            self.casts[self._index[id(args[0])]] = (kwargs or {}).get("dtype")
        return func(*args, **(kwargs or {}))


def _observe(node: fx.Node, inputs: list[fx.Node], region: Autocast) -> list[torch.dtype | None]:
    mode: FakeTensorMode = inputs[0].meta["val"].fake_mode
    with mode:
        tensors = {
            each: torch.empty(each.meta["val"].shape, dtype=each.meta["val"].dtype, device=each.meta["val"].device)
            for each in inputs
        }
    watch = _Watch(list(tensors.values()))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: tensors.get(each, each.meta.get("val")))
    if node.target in (aten._to_copy.default, aten.to.dtype):
        return [None] * len(inputs)
    with _autocast(region), mode, watch, torch.no_grad():
        node.target(*args, **kwargs)  # type: ignore[operator]
    return watch.casts


@contextlib.contextmanager
def _autocast(region: Autocast) -> Iterator[None]:
    with torch.autocast(region.device, dtype=region.dtype, cache_enabled=False):
        yield
