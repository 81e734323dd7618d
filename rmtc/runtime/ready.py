"""A call that may run, and what runs it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rmtc.capture.arguments import Arguments
from rmtc.capture.sizes import Sizes
from rmtc.errors import RefusedError, StateError
from rmtc.ir.launches import TextSize
from rmtc.ir.segment_loop import CARRIED
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.passes.bodies.resume import Carried, carried, fewest, is_free, keeping, resumed
from rmtc.passes.launches.check_launches import check_launches
from rmtc.passes.launches.plan_launches import plan_texts
from rmtc.runtime.backends import Backend, Runner
from rmtc.runtime.executor import Executor, Run
from rmtc.runtime.inductor import Inductor
from rmtc.runtime.read_tensors import metadata, shown
from rmtc.runtime.training import Training
from rmtc.runtime.weights import Weights

ENDS_OTHERWISE = "its last segment may run other operations than the others, and may not leave what these do"
AT_WHOLE = "cut the text at whole segments"
_BATCH = 2  # of the plans that a program is checked with


@dataclass(frozen=True)
class Ready:
    """A call that may run.

    Attributes:
        sizes: its sizes.
        values: every tensor that the program reads, by name.
        arguments: its arguments.
        made: what runs it.
        gradients: whether its results are to be differentiated.
        state: what an earlier call has handed on, by the names of the sources; None if it begins anew.
        hands_on: whether it has to hand something on, whatever that takes.
    """

    sizes: Sizes
    values: dict[str, torch.Tensor]
    arguments: Arguments
    made: Made
    gradients: bool = False
    state: Mapping[str, torch.Tensor] | None = None
    hands_on: bool = False

    @property
    def runner(self) -> Runner:
        """The runner of the call without gradients."""
        return self.made.runner if self.state is None else self.made.resuming()

    @property
    def given(self) -> Mapping[str, torch.Tensor]:
        """Every tensor that this reads, by name."""
        return self.values if self.state is None else {**self.values, **self.state}

    @property
    def keeps(self) -> bool:
        """Return whether it hands something on: if it has to, or if that takes no operation that it would not run."""
        whole = self.sizes.tail == self.made.program.loop.segment_length
        ends = self.made.program.loop.ends_short
        return not ends and (self.hands_on or (not self.gradients and (whole or self.made.hands_on_freely)))

    def handed_on(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Take what the call hands on out of its results, by the user's names."""
        known = {(each.number, each.back): each for each in self.made.state.values()}
        names = [each.name for each in known.values() if CARRIED + each.name in outputs]
        made = apart({name: outputs.pop(CARRIED + name) for name in names}, (self.state or {}).values())
        found: dict[str, torch.Tensor] = {}
        for (number, back), each in known.items():
            if each.name in made:
                found[each.name] = made[each.name]
            elif self.state is not None and back > self.sizes.segments:  # it is older than this call
                found[each.name] = self.state[CARRIED + known[number, back - self.sizes.segments].name]
        return found


@dataclass(frozen=True, eq=False)
class Made:
    """A way to run calls by a schedule, made.

    Attributes:
        kind: of the schedule.
        backend: the name of what runs it.
        program, weights: what is run.
        backend_of: makes what runs a program.
        runner: what runs it.
        growing: the dimensions in which each argument grows with the text.
        unmoved: what the program reads that is in no stack.
        trains: what runs calls from which gradients are asked, by whether they begin with what another one has handed
            on, once there is one.
        resumes: what runs calls that begin with what another one has handed on, once there is one.
        shapes: the shapes of what calls have handed on after whole segments, by batch size.
    """

    kind: str
    backend: str
    program: WavefrontProgram
    weights: Weights
    backend_of: Backend
    runner: Runner
    growing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    trains: dict[bool, Training] = field(default_factory=dict)
    resumes: list[Executor] = field(default_factory=list)
    shapes: dict[int, dict[str, torch.Size]] = field(default_factory=dict)

    def forget(self) -> None:
        """Let go of the memory that stays from run to run."""
        for each in (self.runner, *self.resumes, *self.trains.values()):
            if isinstance(each, Executor):
                each.forget()

    @functools.cached_property
    def state(self) -> dict[str, Carried]:
        """The state that a call hands on to one that goes on, by the user's names."""
        return {each.name: each for each in carried(self.program.loop)}

    @property
    def compiler(self) -> Inductor | None:
        """Inductor, to compile bodies with their derivatives, if it was asked for by name."""
        lowering = self.runner.lowering if isinstance(self.runner, Executor) else None
        return lowering if isinstance(lowering, Inductor) and not lowering.lenient else None

    @functools.cached_property
    def hands_on_freely(self) -> bool:
        """Return whether a call hands on what it computes anyway, whatever the length of its last segment."""
        return is_free(self.program.loop)

    @functools.cached_property
    def fewest(self) -> int:
        """The number of segments after which a call can go on."""
        return fewest(self.program.loop)

    def resuming(self) -> Executor:
        """Return what runs calls that begin with what another one has handed on.

        Raises:
            RefusedError: if there is no such thing.
            VerifyError: if the program or a plan of it fails its check.
        """
        if not self.resumes:
            if not isinstance(self.runner, Executor):
                raise RefusedError("its backend runs no call that begins with a state")
            made = self.backend_of(self.going_on, self.weights)
            assert isinstance(made, Executor)
            self.resumes.append(made)
        return self.resumes[0]

    @functools.cached_property
    def going_on(self) -> WavefrontProgram:
        """The program of calls that begin with what another one has handed on.

        Raises:
            RefusedError: if there is no such thing.
            VerifyError: if the program or a plan of it fails its check.
        """
        program = resumed(keeping(self.program), self.growing)
        length = program.loop.segment_length
        least = max(1, program.loop.furthest_result)
        for segments in (least, len(program.loop.rows) + least + 1):
            size = TextSize(segments, length, hands_on=True)
            check_launches(program, plan_texts(program, [size], _BATCH), [size], _BATCH)
        return program

    def checked(
        self, state: Mapping[str, Any], batch: int, probed: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Return a state by the names of the sources.

        Args:
            state: what an earlier call has handed on, by the user's names.
            batch: the number of texts that it is to be of.
            probed: that at which the forms of states are known.
            device: where it is to be.

        Raises:
            StateError: if it is not of such texts.
        """
        known = self.state
        missing, other = sorted(known.keys() - state.keys()), sorted(state.keys() - known.keys())
        what = [f"{title}: {', '.join(names)}" for title, names in (("missing", missing), ("unknown", other)) if names]
        if what:
            raise StateError("; ".join(what), remedy="give what rmtc.state gave after a call of this model")
        for name, value in state.items():
            form = known[name].form
            if not isinstance(value, torch.Tensor):
                raise StateError(f"{name} is no tensor, but {type(value).__name__}")
            if value.device != device:
                raise StateError(f"{name} is on {value.device}, and the model on {device}")
            if form is None:
                continue
            shape, dtype = form
            known_as = zip(value.shape, shape, strict=False)
            like = value.dim() == len(shape) and all(n == m or n * probed == m * batch for n, m in known_as)
            if batch != probed and value.shape == shape and any(m % probed == 0 for m in shape):
                like = False  # of the batch size of a probe
            if (exact := self.shapes.get(batch)) is not None:
                like = exact[name] == value.shape
            if value.dtype != dtype or not like:
                sizes = [m * batch // probed if n == 0 and m % probed == 0 else m for n, m in enumerate(shape)]
                wanted = shown((torch.Size(sizes), dtype, device))
                raise StateError(
                    f"{name} is {shown(metadata(value))}, and for a batch of {batch} the model's is {wanted}",
                    remedy="a state is of one batch size; of a text that ends in the middle of a segment some models' "
                    "states are shorter, and cannot be read on",
                )
        return {CARRIED + name: value.detach() for name, value in state.items()}


class Ended(NamedTuple):
    """The end of a call: what the user's code would have returned, what was done, and what the call hands on."""

    result: Any
    run: Run
    state: dict[str, torch.Tensor]


def apart(values: dict[str, Any], others: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return values, none of which changes when another tensor is written to: what lies in its memory is copied."""
    places = {each.untyped_storage()._cdata for each in others}

    def own(value: Any) -> Any:
        shared = isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in places
        return value.clone() if shared else value

    return {name: own(value) for name, value in values.items()} if places else values
