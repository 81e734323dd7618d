"""Refusal of writes that autograd does not see, which no functional graph can tell from others."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rmtc.errors import RefusedError
from rmtc.ir.gradients import stops_gradients
from rmtc.passes.graph.remove_regions import is_grad_mode

aten = torch.ops.aten


def refuse_hidden_writes(graph: fx.Graph) -> None:
    """Refuse a graph that writes past autograd to a value that a gradient flows through.

    Such a write is one without gradients, or to what ``detach`` gave: the value is another one afterwards, and its
    gradient is that of the value before. As a new value it would have a gradient of its own, or none.

    Args:
        graph: a pre-dispatch graph that is not functional. Its placeholders carry ``meta["requires_grad"]``.

    Raises:
        RefusedError: with the first such write.
    """
    flows: set[Any] = set()  # the tensors, each as what it is a view of, that a gradient flows through
    base: dict[Any, Any] = {}
    past: set[Any] = set()  # views past a detach
    on = True
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta.get("requires_grad"):
            flows.add(node)
        elif is_grad_mode(node):
            on = bool(node.args[0])
        elif _is_data(node):
            raise RefusedError(
                "gradients are asked for, and the code reads the data of a tensor, which no graph shows",
                location=next(iter(node.users), node).meta.get("location"),
                remedy="use detach() in place of data",
            )
        if node.op != "call_function":
            continue
        read = [each for each in node.all_input_nodes if each not in past and base.get(each, each) in flows]
        seen, written = _aliased(node)
        for each in written:
            flowing = base.get(each, each) in flows
            if (flowing and (not on or each in past)) or (on and read and each in past):
                raise RefusedError(
                    "gradients are asked for, and the code writes past autograd (without gradients, or through detach) "
                    "to a value that one flows through",
                    location=node.meta.get("location"),
                    remedy="make a new value in place of writing to one, or call the model under torch.no_grad()",
                )
            if on and read:
                flows.add(base.get(each, each))
        of = written[0] if written else seen
        if of is not None:
            base[node] = base.get(of, of)
            if of in past or node.target is aten.detach.default:
                past.add(node)
        elif on and read and not stops_gradients(node.target, getattr(node.meta.get("val"), "dtype", None)):
            flows.add(node)


def _is_data(node: fx.Node) -> bool:
    """Tell whether a node is the data of a tensor, which no operation gives, and no number of the code's."""
    if node.op != "get_attr":
        return False
    numbers = all(each.target in (aten.lift_fresh.default, aten.lift_fresh_copy.default) for each in node.users)
    return isinstance(getattr(node.graph.owning_module, str(node.target), None), FakeTensor) and not numbers


def _aliased(node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """Return the operand that an operation gives a view of, if any, and those that it writes to."""
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return (source if isinstance(source, fx.Node) and _aliased(source)[0] is not None else None), []
    if not isinstance(node.target, torch._ops.OpOverload):
        return None, []
    seen, written = None, list[fx.Node]()
    for number, argument in enumerate(node.target._schema.arguments):
        given = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is None or not isinstance(given, fx.Node):
            continue
        if argument.alias_info.is_write:
            written.append(given)
        else:
            seen = given
    return seen, written
