"""The reference executor: a flat program run operation by operation, in any order that its operands allow.

The plainest way to run a schedule: torch's own operators on single tensors, no groups, no stacked parameters, no
buffers written in place. Tests hold folded loops and the executor of groups against it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rmtc.errors import VerifyError
from rmtc.ir.program import Op, Program, Src, Val, call_arguments, leaves, map_leaves, show


def execute(program: Program, order: Sequence[int], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the operations of a program in a given order.

    Runs without gradients and with autocast off: the casts that autocast made are operations of the program. Shapes are
    whatever ``values`` give. Dtypes and devices are those the program was captured with, and no operation here adds a
    cast. A value is let go after its last use. Nothing in ``values`` is written to. A result may share memory with
    them, as the result of a view does.

    Args:
        program: the program, such as an unrolled loop. Its constants bring their own values.
        order: indices into ``program.ops``, each at most once. Operations that no result needs may be left out.
        values: the parameters, buffers, state and inputs that the operations read, by the names of ``program.sources``.
            More are ignored.

    Returns:
        The results, by the names of ``program.outputs``.

    Raises:
        VerifyError: if an operation comes twice, or before one of its operands, or a result is never made, or the
            program reads a source that it does not declare.
        ValueError: if a source that is read is not in ``values``, or has another dtype there.
        Exception: whatever torch raises, with a note that says which operation raised it.
    """
    results = tuple(program.outputs.values())
    read = [leaf for number in order for leaf in leaves(program.ops[number].args)]
    left = Counter(leaf.number for leaf in (*read, *leaves(results)) if type(leaf) is Val)
    sources = {
        leaf.name: _source(program, leaf.name, values) for leaf in (*read, *leaves(results)) if type(leaf) is Src
    }
    made: dict[int, Any] = {}
    done: set[int] = set()

    def take(leaf: Any, reader: str) -> Any:
        if type(leaf) is Src:
            return sources[leaf.name]
        if type(leaf) is not Val:
            return leaf
        if leaf.number not in made:
            raise VerifyError(f"{reader} is to run before {_text(program, leaf.number)}, which it needs")
        value = made[leaf.number]
        left[leaf.number] -= 1
        if not left[leaf.number]:
            del made[leaf.number]
        return value

    with torch.no_grad(), _autocast_off({tensor.device.type for tensor in sources.values()}):
        for number in order:
            if number in done:
                raise VerifyError(f"{_text(program, number)} is to run twice")
            done.add(number)
            op, reader = program.ops[number], _text(program, number)
            positional, named = call_arguments(map_leaves(op.args, functools.partial(take, reader=reader)))
            try:
                made[number] = op.target(*positional, **named)
            except Exception as error:
                error.add_note(f"in {reader}, from {op.location}")
                raise
            if not left[number]:
                del made[number]
    return {name: take(result, f"result {name}") for name, result in program.outputs.items()}


def _source(program: Program, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    source = program.sources.get(name)
    if source is None:
        raise VerifyError(f"the program reads {name}, which is none of its sources")
    value = source.value if source.kind == "constant" else values.get(name)
    if value is None:
        raise ValueError(f"the program reads {source.kind} {name}, and no value is given for it")
    if value.dtype != source.dtype:
        raise ValueError(f"{source.kind} {name} is {value.dtype}, and the program was captured with {source.dtype}")
    return value


@contextlib.contextmanager
def _autocast_off(devices: set[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in sorted(devices):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _text(program: Program, number: int) -> str:
    op: Op = program.ops[number]
    return f"%{number} = {op.label}({', '.join(show(arg) for arg in op.args)})"
