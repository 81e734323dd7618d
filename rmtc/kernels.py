"""The layers of a model as kernels, without a GPU: their sources, their compiled code, and their predicted times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtc.analysis import Analysis, analyze
from rmtc.capture.own_modes import own_modes
from rmtc.codegen.torch.source import Emitted
from rmtc.codegen.triton.configs import bucket_of, configs_text
from rmtc.codegen.triton.emit import TritonBody
from rmtc.codegen.triton.launch import KernelLaunch
from rmtc.codegen.triton.offline import Binary, OfflineError, compile_for
from rmtc.codegen.triton.targets import TARGETS, Target
from rmtc.errors import RefusedError
from rmtc.ir.array import Array, Outside
from rmtc.ir.explanation import FusedKernel, FusedStep
from rmtc.ir.kernel import Multiply
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.passes.bodies.fusion_groups import estimate, kind_of, operations_of, work
from rmtc.runtime.executor import Executor
from rmtc.runtime.lowering import Emission
from rmtc.runtime.specialization import Specialization
from rmtc.runtime.triton import Triton
from rmtc.runtime.weights import Weights


@dataclass(frozen=True)
class BodyKernels:
    """The kernels of a class of cells.

    Attributes:
        name: name of the class.
        body: the body that runs them.
        cells: number of cells in the widest group of the call.
        target: the GPU they are made for.
    """

    name: str
    body: TritonBody
    cells: int
    target: Target

    @property
    def launches(self) -> tuple[KernelLaunch, ...]:
        """The kernels in their order, without operations that are left to torch or to a library."""
        return tuple(self.body.launches.values())

    def __str__(self) -> str:
        lines = [f"# {self.body.nest.name}: {len(self.launches)} kernels, {self.cells} cells at most"]
        lines += [f"# left to torch: {' '.join(each.split())}" for each in self.body.fallbacks]
        return "\n".join([*lines, *self.body.multiplied, "", *(launch.source.text for launch in self.launches)])

    def predicted(self, cells: int | None = None) -> FusedStep:
        """Predict the times of a step of ``cells`` cells, by default of its widest group, by the target's estimate."""
        cells, machine = cells or self.cells, self.target.machine
        found, dtypes = list[FusedKernel](), dict[torch.dtype, float]()
        for group in self.body.groups:
            names = tuple(op.label for op in operations_of(group, self.body.nest))
            if isinstance(group, Outside):
                found.append(FusedKernel("", kind_of(group), names))
                continue
            moved, products = (cells * each for each in work(group, machine))
            dtype = group.written[0].dtype
            name = "" if isinstance(group, Multiply) else self.body.launches[group].source.name
            dtypes[dtype] = dtypes.get(dtype, 0.0) + products
            seconds = estimate(group, machine, cells)
            found.append(FusedKernel(name, kind_of(group), names, moved, products, seconds))
        most = max(dtypes, key=dtypes.__getitem__, default=torch.float32)
        return FusedStep(self.name, cells, str(most).removeprefix("torch."), tuple(found), machine.rate(most))

    def calls(self, device: torch.device, cells: int | None = None) -> list[Callable[[], Any]]:
        """Return the launches of one step on random operands, for measuring: those of :meth:`predicted`, in order.

        Args:
            device: device on which the operands are made, and the kernels launched.
            cells: number of cells in the step; those of its widest group by default.

        Raises:
            RefusedError: if an operation of the body is left to torch.
        """
        cells = cells or self.cells
        if self.body.fallbacks:
            raise RefusedError(f"{self.name} leaves {', '.join(self.body.fallbacks)} to torch")
        tensors = {
            array: _random(self.body.values[leaf], array, cells, device) for array, leaf in self.body.leaves.items()
        }
        return self.body.calls(tensors, cells, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))

    def compile(self) -> list[Binary]:
        """Compile the kernels for the target.

        Raises:
            OfflineError: if one does not compile.
        """
        found = []
        for launch in self.launches:
            tensors = {
                array: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
                for array, each in self.body.launched[launch.kernel].items()
            }
            found.append(compile_for(launch, tensors, self.target, self.cells))
        return found


def _random(like: Any, array: Array, cells: int, device: torch.device) -> torch.Tensor:
    """Return a random operand with the memory layout of another one, except for the number of its cells."""
    if not isinstance(like, torch.Tensor):  # a number that differs from cell to cell
        return torch.zeros(cells if array.grouped else (), dtype=array.dtype, device=device)
    shape, strides = list(like.shape), like.stride()
    if array.grouped:
        shape[0] = cells
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if like.is_floating_point():
        memory = torch.randn(length, device=device).to(like.dtype)
    else:
        memory = torch.randint(0, 2, (length,), device=device).to(like.dtype)
    return memory.as_strided(shape, strides)


def kernels_of(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    targets: Sequence[str] = ("sm_90",),
    schedule: str = "shortest",
    layers: str | None = None,
    segment_length: int | None = None,
) -> dict[str, tuple[BodyKernels, ...]]:
    """Return the kernels that the layers of a call would run as on GPUs, by target, without computing anything.

    Args:
        function, args, kwargs: the call.
        targets: names of :data:`rmtc.codegen.triton.targets.TARGETS`.
        schedule, layers, segment_length: as in :func:`rmtc.compile`.

    Raises:
        RefusedError, CaptureError: if the call has no schedule, or cannot be captured.
    """
    with own_modes(function):
        analysis = analyze(function, args, kwargs or {}, layers=layers, segment_length=segment_length)
    if analysis.proven is None:
        raise RefusedError("no schedule was found")
    return {name: kernels_on(TARGETS[name], analysis, schedule) for name in targets}


def kernels_on(target: Target, analysis: Analysis, schedule: str) -> tuple[BodyKernels, ...]:
    """Return the kernels of an analysed call on one target.

    Raises:
        RefusedError, CaptureError: if the call has no such schedule.
    """

    def backend(program: WavefrontProgram, weights: Weights) -> Executor:
        return Executor(
            program, Weights(), _KernelsNoted(given=target)
        )  # without stacks: the model's own stay in place

    specialization = Specialization.make(analysis, backend, kind=schedule)
    runner = specialization.runner
    assert isinstance(runner, Executor) and isinstance(runner.lowering, _KernelsNoted)
    run = analysis.probes[-1]
    sources = {**specialization.program.loop.sources, **run.program.sources}  # sources of the run have its sizes
    read = specialization.program.reads() & sources.keys()
    plan = runner.plan(*run.sizes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = {name: torch.empty(sources[name].shape, dtype=sources[name].dtype) for name in read}
        runner.run(values, *run.sizes)
    widths: dict[str, int] = {}
    for launch in plan.launches:
        widths[launch.body.name] = max(widths.get(launch.body.name, 1), len(launch.cells))
    return tuple(BodyKernels(name, body, widths.get(name, 1), target) for name, body in runner.lowering.bodies.items())


def resource_table(binaries: Sequence[Binary]) -> str:
    """Print the resources that kernels need of their targets, one line per kernel."""
    head = (
        *("target", "kernel", "registers", "spilled", "shared", "occupancy", "matrix instructions"),
        *("MB moved", "GFLOP", "roofline"),
    )
    rows = [head]
    for each in binaries:
        occupancy = each.occupancy
        rows.append(
            (
                each.target.name,
                each.launch.source.name,
                "-" if each.registers is None else str(each.registers),
                "-" if each.spilled is None else f"{each.spilled} B",
                f"{each.shared} of {each.target.shared}{'' if each.shared <= each.target.shared else ' !'}",
                "-" if occupancy is None else f"{100 * occupancy:.0f} %",
                ", ".join(f"{count} {name}" for name, count in each.instructions.items()) or "-",
                f"{each.moved / 1e6:.3f}",
                f"{each.operations / 1e9:.3f}",
                f"{each.seconds * 1e6:.2f} us",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    cards = dict.fromkeys(each.target for each in binaries)
    lines += ["", *(f"{each.name}: {each.card}, {each.shared} bytes of shared memory a block" for each in cards)]
    lines += ["Bytes, operations and the roofline's time are of a launch for all its cells; the time is a prediction."]
    return "\n".join(lines)


def written(bodies: Sequence[BodyKernels], binaries: Sequence[Binary], folder: Path) -> int:
    """Write sources, configurations and compiled code into a folder, and return the number of files.

    Raises:
        OfflineError: if the folder cannot be written.
    """
    files: dict[Path, str | bytes] = {}
    for body in bodies:
        for launch in body.launches:
            head = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
            files[folder / body.target.name / f"{launch.source.name}.py"] = head + launch.source.text
    for each in binaries:
        cuda = each.target.backend == "cuda"
        name = folder / each.target.name / each.launch.source.name
        files[name.with_suffix(".ptx" if cuda else ".amdgcn")] = each.assembly
        files[name.with_suffix(".cubin" if cuda else ".hsaco")] = each.code
    launches = [(launch, body.target) for body in bodies for launch in body.launches]
    files[folder / "configs.json"] = configs_text(
        (bucket_of(launch.kernel, target, each is launch.big), each.config)
        for launch, target in launches
        for each in (launch.plain, launch.big)
        if each is not None
    )
    if binaries:
        files[folder / "resources.txt"] = resource_table(binaries) + "\n"
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise OfflineError(f"{folder} cannot be written: {error}", remedy="name a folder that can be made") from error
    return len(files)


@dataclass
class _KernelsNoted(Triton):
    """Keeps the kernels that a run on fake tensors would launch."""

    bodies: dict[str, TritonBody] = field(default_factory=dict)
    given: Target | None = None

    def target(self, device: torch.device) -> Target | None:
        """Return the target that was asked for, since nothing is launched."""
        return self.given

    def lower(self, executor: Executor, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Make kernels of a launch's body, and keep it. Fake tensors have no memory to bind."""
        kernel, results = super().lower(executor, replace(of, bind=False))
        body = getattr(kernel.function, "__self__", None)
        if isinstance(body, TritonBody):
            self.bodies.setdefault(of.launch.body.name, body)
        return kernel, results
