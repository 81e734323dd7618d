"""Parameters of layers stacked, once, without a second copy: the parameters become views of the stack."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from rmtc.ir.wavefront import Body, WavefrontProgram

__all__ = ["Weights"]

logger = logging.getLogger(__name__)


@dataclass
class _Stack:
    """Parameters of one shape, row by row.

    Attributes:
        names: of the parameters, by row.
        tensor: ``(rows, *shape)``; None until it is made.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor | None = None


@dataclass
class Weights:
    """The tensors that layers own, as the bodies of groups want them.

    A parameter lies in at most one stack, ``(L, out, in)`` row by row as the layers have it. It keeps a storage of its
    own over the same memory, so that writes on either side are seen by the other, and saving one layer saves one layer.
    What cannot be moved (buffers and state, parameters that share their memory) is stacked anew in each call.
    """

    stacks: list[_Stack] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    pointers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @staticmethod
    def plan(program: WavefrontProgram, movable: set[str]) -> Weights:
        """Decide what is stacked with what.

        Args:
            program: the program.
            movable: the names of the parameters that may be moved into a stack.
        """
        weights = Weights()
        bodies = (*program.bodies.values(), *program.merged.values())
        wanted = [_names(body, number) for body in bodies for number in range(len(body.weights))]
        for names in sorted(dict.fromkeys(wanted), key=len, reverse=True):
            free = all(name in movable and name not in weights.places for name in names)
            if free and len(set(names)) == len(names) and len({program.loop.sources[n].shape for n in names}) == 1:
                weights.places.update({name: (len(weights.stacks), row) for row, name in enumerate(names)})
                weights.stacks.append(_Stack(names))
        weights.names = list(weights.places)
        return weights

    def in_place(self, values: Mapping[str, torch.Tensor]) -> bool:
        """Whether every stacked parameter still lies in its stack."""
        return [values[name].data_ptr() for name in self.names] == self.pointers

    def move(self, values: Mapping[str, torch.Tensor]) -> None:
        """Move the parameters into their stacks, one stack after another, so that little memory is held twice.

        Args:
            values: the parameters by name, all of a stack of one shape, dtype and device.
        """
        with torch.inference_mode(False), torch.no_grad():
            for stack in self.stacks:
                parameters = [values[name] for name in stack.names]
                first = parameters[0]
                # Inference mode must not leave its mark on what is trained later.
                tensor = torch.empty((len(parameters), *first.shape), dtype=first.dtype, device=first.device)
                for row, parameter in enumerate(parameters):
                    tensor[row].copy_(parameter.detach())
                for row, parameter in enumerate(parameters):
                    parameter.data = from_dlpack(tensor[row])
                stack.tensor = tensor
        self.pointers = [values[name].data_ptr() for name in self.names]
        logger.info("stacked %d parameters in %d stacks", len(self.names), len(self.stacks))

    def rows(self, body: Body, number: int, layers: Sequence[int], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensors of some layers behind a group axis: a view of the stack, or a copy.

        Args:
            body, number: which weight.
            layers: evenly spaced among the body's.
            values: all tensors by name.
        """
        names = [body.weights[number][layer] for layer in layers]
        places = [self.places.get(name) for name in names]
        if all(place is not None for place in places):
            ids, rows = zip(*(place for place in places if place is not None), strict=True)
            tensor = self.stacks[ids[0]].tensor
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            even = step > 0 and all(row == rows[0] + step * n for n, row in enumerate(rows))
            if len(set(ids)) == 1 and even and tensor is not None:
                view: torch.Tensor = tensor[slice(rows[0], rows[-1] + 1, step)]
                return view
        if len(set(names)) == 1:
            return values[names[0]].detach().unsqueeze(0).expand(len(names), *values[names[0]].shape)
        return torch.stack([values[name].detach() for name in names])

    @staticmethod
    def movable(values: Mapping[str, torch.Tensor]) -> set[str]:
        """The names of the parameters that own their memory, all of it, in order."""
        storages: dict[int, int] = {}
        for tensor in values.values():
            key = tensor.untyped_storage()._cdata
            storages[key] = storages.get(key, 0) + 1
        return {
            name
            for name, tensor in values.items()
            if isinstance(tensor, nn.Parameter)
            and tensor.is_contiguous()
            and tensor.numel()
            and not tensor.is_inference()
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            and storages[tensor.untyped_storage()._cdata] == 1
            and tensor.dtype in _DLPACK
        }


_DLPACK = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _names(body: Body, number: int) -> tuple[str, ...]:
    choice: Mapping[int, str] = body.weights[number]
    return tuple(choice[layer] for layer in sorted(choice))
