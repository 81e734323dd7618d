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
from rmtc.capture.replay_state import ReplayState
from rmtc.capture.session import Session
from rmtc.errors import RefusedError


@dataclass
class Answer:
    """The result and the effects of a module's call, in terms of the tensors that it made and of its operands.

    Attributes:
        result: the description of what it returned.
        left: the numbers of the attributes in which it left something, with the descriptions of that.
        makes: the tensors that it made.
    """

    result: Any
    left: list[tuple[int, Ref | Plain]]
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
        names = {id(tensor): f"operand {number}" for number, tensor in enumerate(operands)}
        makes: list[torch.Tensor] = []

        def leaf(value: Any, name: str) -> Ref | Plain:
            if not isinstance(value, torch.Tensor):
                return Plain(value, name)
            if id(value) not in names:
                names[id(value)] = f"made {len(makes)}"
                makes.append(value)
            return Ref(names[id(value)])

        changed = state.changes()
        values = (*pytree.tree_leaves(result), *(value for _, value in changed))
        if any(not isinstance(each, torch.Tensor) and not is_plain(each) for each in values):
            return None
        try:
            returned = Describer(session.known, {}).describe(result, "output", leaf, _refused)
        except RefusedError:
            return None
        # An object that existed before may be this module's own, and another module has another one.
        if any(isinstance(part, Kept) and not isinstance(part.value, type) for part in parts_of(returned)):
            return None
        return Answer(returned, [(number, leaf(value, "")) for number, value in changed], makes)

    def same(self, other: Answer) -> bool:
        """Return whether another call returned and left the same."""
        made = [[*map(described, answer.makes)] for answer in (self, other)]
        return self.result == other.result and self.left == other.left and made[0] == made[1]

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
        for number, description in self.left:
            state.put(number, build(description, values, {}))
        return result


def _refused(value: Any, name: str) -> RefusedError:
    return RefusedError(f"a module returns a {type(value).__name__}, whose tensors cannot be told")
