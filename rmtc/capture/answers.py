"""Answers of modules' calls, that is results and effects on attributes, that other calls can be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtc.capture.kinds import is_plain
from rmtc.capture.metadata import described
from rmtc.capture.objects import Describer, Kept, Plain, Ref, build, parts_of
from rmtc.capture.replay_state import ReplayState, fingerprint_of
from rmtc.capture.session import Session
from rmtc.errors import RefusedError


@dataclass
class Answer:
    """The result and the effects of a module's call, in terms of the tensors that it made and of its operands.

    Attributes:
        result: the description of what it returned.
        tensors: the numbers of the attributes in which it left tensors. Each has ``("made", number)`` or
            ``("operand", number)``.
        plain: the numbers of the attributes in which it left plain values, with these.
        makes: the tensors that it made.
    """

    result: Any
    tensors: list[tuple[int, tuple[str, int]]]
    plain: list[tuple[int, Any]]
    makes: list[torch.Tensor]

    @staticmethod
    def of(session: Session, state: ReplayState, result: Any, operands: Sequence[torch.Tensor]) -> Answer | None:
        """Describe what a call returned and left.

        Args:
            session: the call that is captured.
            state: the state of the module, as of when its values were read before the call.
            result: what the call returned.
            operands: the tensors that it could read.

        Returns:
            The answer; None if it cannot be given again.
        """
        if not state.whole():
            return None
        index = {id(tensor): number for number, tensor in enumerate(operands)}
        makes: list[torch.Tensor] = []
        made: dict[int, int] = {}

        def describe(tensor: torch.Tensor) -> tuple[str, int]:
            if id(tensor) in index:
                return "operand", index[id(tensor)]
            if id(tensor) not in made:
                made[id(tensor)] = len(makes)
                makes.append(tensor)
            return "made", made[id(tensor)]

        def leaf(value: Any, name: str) -> Any:
            return Ref("{} {}".format(*describe(value))) if isinstance(value, torch.Tensor) else Plain(value, name)

        if any(not isinstance(each, torch.Tensor) and not is_plain(each) for each in pytree.tree_leaves(result)):
            return None
        try:
            returned = Describer(session.known, {}).describe(result, "output", leaf, _refused)
        except RefusedError:
            return None
        # An object that existed before may be this module's own, and another module has another one.
        if any(isinstance(part, Kept) and not isinstance(part.value, type) for part in parts_of(returned)):
            return None
        changed = state.changes()
        if any(not isinstance(value, torch.Tensor) and not is_plain(value) for _, value in changed):
            return None
        tensors = [(number, describe(value)) for number, value in changed if isinstance(value, torch.Tensor)]
        plain = [(number, value) for number, value in changed if is_plain(value)]
        return Answer(returned, tensors, plain, makes)

    def same(self, other: Answer) -> bool:
        """Return whether another call returned and left the same."""
        made = [[*map(described, answer.makes)] for answer in (self, other)]
        plain = [[(number, fingerprint_of(value)) for number, value in answer.plain] for answer in (self, other)]
        left = self.result == other.result and self.tensors == other.tensors
        return left and made[0] == made[1] and plain[0] == plain[1]

    def give(self, state: ReplayState, makes: Sequence[torch.Tensor], operands: Sequence[torch.Tensor]) -> Any:
        """Return what the call returned and leave what it left, for another call.

        Args:
            state: the state of that call's module.
            makes: new tensors in place of those that the call made.
            operands: the tensors that the other call can read.
        """
        values = {f"made {n}": each for n, each in enumerate(makes)}
        values.update((f"operand {n}", each) for n, each in enumerate(operands))
        result = build(self.result, values, {})
        for number, (kind, which) in self.tensors:
            state.put(number, makes[which] if kind == "made" else operands[which])
        for number, value in self.plain:
            state.put(number, value)
        return result


def _refused(value: Any, name: str) -> RefusedError:
    return RefusedError(f"a module returns a {type(value).__name__}, whose tensors cannot be told")
