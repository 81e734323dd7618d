"""Copies of traced calls: a call like one that was traced before is copied into the graph and not traced again.

Layers are alike (:mod:`rmtc.capture.alike`), and each is called once per segment. Two of a kind of calls are traced
(:mod:`rmtc.capture.layer_calls`). All further ones are copied::

    %5 = linear(%4, layers.0.up.weight)   ->   %9 = linear(%8, layers.1.up.weight)
    %6 = relu(%5)                              %10 = relu(%9)

The key of a call holds all that it can read: structure, plain values and the metadata of arguments and attributes, the
modes of torch, and the lines that led to it. A call that does anything else than compute tensors, return and keep them
is traced each time.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from rmtc.capture.alike import Alike, LikeCall, Member, Reads
from rmtc.capture.answers import Answer
from rmtc.capture.frames import call_site
from rmtc.capture.layer_calls import LayerCall, LayerCalls
from rmtc.capture.metadata import described
from rmtc.capture.replay_state import ATTRIBUTES
from rmtc.capture.session import Session
from rmtc.passes.graph.remove_regions import REGIONS, writes

if TYPE_CHECKING:
    from rmtc.capture.tracer import Tracer


class _Before(NamedTuple):
    """The state of a trace before a call, with what the call must leave as it is.

    Attributes:
        unchanged: what the call must leave as it is.
        last: the last node of the graph.
        names: number of names in the graph.
    """

    unchanged: Any
    last: fx.Node
    names: int


class _MadeTensor(NamedTuple):
    """A tensor that a call made.

    Attributes:
        tensor: the tensor.
        node: its node.
        memory: the number of the operand whose memory it shares; None if it has its own.
        offset: where it begins in that memory, after the operand.
    """

    tensor: torch.Tensor
    node: fx.Node
    memory: int | None
    offset: int


@dataclass
class _Traced(LayerCall):
    """A traced call.

    Attributes:
        nodes: its nodes, in order.
        made: the tensors that it made.
        attributes: names that it gave, each with the module below its own, the rest of the name, and the node.
        moved: the numbers of operands that another node stands for since, with that node.
    """

    nodes: list[fx.Node]
    made: list[_MadeTensor]
    attributes: list[tuple[int, str, fx.Node]]
    moved: list[tuple[int, fx.Node]]


class Copies(LayerCalls[_Traced]):
    """The calls of one trace that others are copied from.

    Args:
        session: the call that is captured.
        alike: its modules that are alike.
        tracer: writes the graph.
        paths: the paths of modules, by their ids.

    Attributes:
        copied: number of calls that were copied, by the family of the module.
    """

    tries_once = True

    def __init__(self, session: Session, alike: Alike, tracer: Tracer, paths: dict[int, str]) -> None:
        super().__init__(session, alike)
        self._tracer, self._paths = tracer, paths
        self._sites: dict[Any, int] = {}
        self._codes: dict[int, CodeType] = {}
        self._modes = _modes()
        self.copied: Counter[int] = Counter()

    def _prepared(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LikeCall | None:
        like = super()._prepared(module, args, kwargs) if not self._has_other_modes() else None
        if like is None:
            return None
        nodes = [node for tensor in like.operands if (node := self._tracer.node(tensor)) is not None]
        if len(nodes) < len(like.operands) or not all(map(self._is_own, like.operands)):
            return None
        known = self._session.fake_mode.known
        key = like.key, self._site(4), _repeats(nodes), *map(known.holds, like.operands)
        return like._replace(key=key, nodes=nodes)

    def _has_other_modes(self) -> bool:
        """Return whether modes are on whose effect on an operation no key shows."""
        if _modes() != self._modes or torch._C._functorch.peek_interpreter_stack() is not None:
            return True
        return torch._C._is_any_autocast_enabled() and not any(map(torch.is_autocast_enabled, ("cpu", "cuda")))

    def _is_own(self, tensor: torch.Tensor) -> bool:
        """Return whether its metadata describe a tensor completely."""
        plain = type(tensor) is FakeTensor and tensor.fake_mode is self._session.fake_mode
        if not plain or not vars(tensor).keys() <= _ATTRIBUTES:  # the code reads others, too
            return False
        return tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()

    def _site(self, depth: int) -> int:
        """Return a number for the lines that led to a call."""
        site = call_site(depth)
        for code, _ in site:
            self._codes[id(code)] = code
        return self._sites.setdefault(tuple((id(code), line) for code, line in site), len(self._sites))

    def _seen(self, call: LikeCall) -> _Before:
        """Return what a call that can be copied leaves as it is, and where the graph ends."""
        known = self._session.fake_mode.known
        unchanged = known.reads, self._session.snapshot.random_state(), [*map(known.holds, call.operands)]
        return _Before(unchanged, next(iter(reversed(self._tracer.graph.nodes))), len(self._tracer.attributes))

    def _remembered(self, call: LikeCall, reads: Reads, before: _Before, result: Any) -> _Traced | None:
        if self._seen(call).unchanged != before.unchanged:
            return None
        nodes = [*itertools.takewhile(lambda node: node is not before.last, reversed(self._tracer.graph.nodes))][::-1]
        answer = Answer.of(self._session, call.member.state, result, call.operands)
        made = None if answer is None else self._made(answer, call, nodes)
        attributes = self._named(call.member, before.names, {*nodes, *call.nodes})
        if answer is None or made is None or attributes is None or not self._are_copied(nodes, call):
            return None
        # An operation that returns its operand, such as a cast to the dtype that is there, is the operand from now on.
        now = [*map(self._tracer.node, call.operands)]
        pairs = enumerate(zip(call.nodes, now, strict=True))
        moved = [(at, new) for at, (old, new) in pairs if new is not None and new is not old]
        if None in now or not {*nodes}.issuperset(new for _, new in moved):
            return None
        return _Traced(call, reads, answer, nodes, made, attributes, moved)

    def _are_copied(self, nodes: list[fx.Node], call: LikeCall) -> bool:
        """Return whether nodes are operations on each other and on the operands of a call, in modules of its own."""
        there = {*nodes, *call.nodes}
        paths = {self._paths.get(id(module)) for module in call.member.modules} - {None}
        return all(
            node.op == "call_function"
            and _is_copied(node)
            and node.meta.get("module") in paths
            and there.issuperset(node.all_input_nodes)
            for node in nodes
        )

    def _made(self, answer: Answer, call: LikeCall, nodes: list[fx.Node]) -> list[_MadeTensor] | None:
        """Describe the tensors that a call made; return None if they cannot be made again."""
        there, made = {*nodes, *call.nodes}, list[_MadeTensor]()
        memory = {tensor.untyped_storage()._cdata: number for number, tensor in enumerate(call.operands)}
        own: set[int] = set()
        inference = torch.is_inference_mode_enabled()
        for tensor in answer.makes:
            node = self._tracer.node(tensor)
            if node is None or node not in there or not self._is_own(tensor) or tensor.requires_grad:
                return None
            known = self._session.fake_mode.known.holds(tensor)
            if known or tensor.is_inference() is not inference or isinstance(tensor, nn.Parameter):
                return None
            place = tensor.untyped_storage()._cdata
            if place not in memory and (place in own or tensor.storage_offset()):
                return None
            own.add(place)
            of = memory.get(place)
            offset = 0 if of is None else int(tensor.storage_offset() - call.operands[of].storage_offset())
            made.append(_MadeTensor(tensor, node, of, offset))
        return made

    def _named(self, member: Member, since: int, there: set[fx.Node]) -> list[tuple[int, str, fx.Node]] | None:
        """Return the names that a call gave to its tensors; None if one is of another call's."""
        numbers = {self._paths.get(id(module)): number for number, module in enumerate(member.modules)}
        found: list[tuple[int, str, fx.Node]] = []
        for name, tensor in self._tracer.attributes[since:]:
            node = tensor if isinstance(tensor, fx.Node) else self._tracer.node(tensor)
            path, _, rest = name.rpartition(".")
            if node is None or node not in there or path not in numbers:
                return None
            found.append((numbers[path], rest, node))
        return found

    def _same(self, known: _Traced, new: _Traced) -> bool:
        return bool(self._fingerprint(known) == self._fingerprint(new))

    def _fingerprint(self, traced: _Traced) -> Any:
        """Return a description of a traced call that is equal for calls that are copies of each other."""
        places: dict[fx.Node, Any] = {node: ("node", number) for number, node in enumerate(traced.nodes)}
        for number, node in enumerate(traced.call.nodes):
            places.setdefault(node, ("operand", number))
        paths = {self._paths.get(id(each)): number for number, each in enumerate(traced.call.member.modules)}
        operations = [
            (
                *(node.target, _results(node.meta.get("val"))),
                repr(map_arg((node.args, node.kwargs), places.__getitem__)),
                *(node.meta.get("location"), node.meta.get("variable"), paths[node.meta.get("module")]),
            )
            for node in traced.nodes
        ]
        made = [(places[each.node], each.memory, each.offset, described(each.tensor)) for each in traced.made]
        names = [(module, name, places[node]) for module, name, node in traced.attributes]
        moved = [(number, places[node]) for number, node in traced.moved]
        read = traced.reads.own, [number for number, _ in traced.reads.values]
        return operations, made, traced.answer.result, traced.answer.left, names, moved, read

    def _answer(self, traced: _Traced, call: LikeCall) -> Any:
        """Copy a traced call into the graph, and return and leave what it would."""
        self.copied[call.member.family] += 1
        tracer = self._tracer
        pairs = zip(traced.call.member.modules, call.member.modules, strict=True)
        paths = {self._paths.get(id(one)): self._paths.get(id(other), "") for one, other in pairs}
        there = dict(zip(traced.call.nodes, call.nodes, strict=True))
        for node in traced.nodes:
            copy = there[node] = _copied(tracer.graph, node, there)
            copy.meta["module"] = paths[node.meta["module"]]
        modules = [self._paths.get(id(module), "") for module in call.member.modules]
        tracer.attributes += [(f"{modules[at]}.{name}", there[node]) for at, name, node in traced.attributes]
        for number, node in traced.moved:
            tracer.enter(call.operands[number], there[node])
        makes = [self._remake(each, call.operands) for each in traced.made]
        for tensor, each in zip(makes, traced.made, strict=True):
            tracer.enter(tensor, there[each.node])
        return traced.answer.give(call.member.state, makes, call.operands)

    def _remake(self, made: _MadeTensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor, fakes = made.tensor, self._session.fake_mode
        with _disable_current_modes():
            bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            if made.memory is not None:
                with torch._C._DisableTorchDispatch():
                    operand = operands[made.memory]
                    offset = operand.storage_offset() + made.offset
                    bare.set_(operand.untyped_storage(), offset, tensor.shape, tensor.stride())
        return fakes.fresh(bare, tensor.device)


_ATTRIBUTES = {*ATTRIBUTES, "_is_param", "_rmtc_stands_in"}


def _copied(graph: fx.Graph, node: fx.Node, there: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Copy an operation to the end of a graph.

    Operands come second: a node that is made with them has each of them looked at once more, for symbolic sizes.
    """
    copy = graph.create_node("call_function", node.target, name=node.name)
    copy.args = map_arg(node.args, there.__getitem__)
    if node.kwargs:
        copy.kwargs = map_arg(node.kwargs, there.__getitem__)
    copy.meta.update(node.meta)
    return copy


def _modes() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def _results(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return described(value)
    return (*map(_results, value),) if isinstance(value, (tuple, list)) else (type(value), repr(value))


def _repeats(nodes: list[fx.Node]) -> tuple[int, ...]:
    places: dict[fx.Node, int] = {}
    return tuple(places.setdefault(node, number) for number, node in enumerate(nodes))


def _is_copied(node: fx.Node) -> bool:
    """Return whether a node's operation writes to nothing and calls no functions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target in REGIONS or node.target is operator.getitem
    if node.target.namespace != "aten":  # the user's own may run code of the user's
        return False
    return not writes(node)
