"""Kernels as launches, made of their source."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import linecache
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from rmtc.codegen.triton.configs import config_of
from rmtc.codegen.triton.source import source_of
from rmtc.codegen.triton.spelling import WIDE, is_wide
from rmtc.codegen.triton.style import KernelSource, Style
from rmtc.codegen.triton.targets import Target
from rmtc.errors import RefusedError
from rmtc.ir.array import Array
from rmtc.ir.kernel import Attend, Kernel
from rmtc.passes.bodies.tiles import Config, is_big

_files = itertools.count()


@functools.lru_cache(maxsize=4096)
def jitted(name: str, text: str) -> Any:
    """Return the function of a source, as Triton compiles or interprets it."""
    import triton
    import triton.language

    file = f"<rmtc {name} {next(_files)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space: dict[str, Any] = {"tl": triton.language, "__name__": f"rmtc.kernels.{name}"}
    exec(compile(text, file, "exec"), space)
    return triton.jit(space[name])


@dataclass(frozen=True)
class Printed:
    """A printed kernel, with its launch configuration."""

    source: KernelSource
    config: Config

    def arguments(self, tensors: Mapping[Array, torch.Tensor], cells: int) -> list[tuple[str, torch.Tensor | int]]:
        """Return the arguments of a launch by name, but for the sizes of tiles.

        Raises:
            RefusedError: if elements of a cell lie further apart than its source counts.
        """
        values: list[torch.Tensor | int] = []
        for array in self.source.pointers:
            tensor, lead = tensors[array], int(array.grouped)
            sizes = zip(tensor.shape[lead:], tensor.stride()[lead:], strict=True)
            if sum((size - 1) * stride for size, stride in sizes) >= WIDE and not is_wide(array):
                raise RefusedError(
                    f"what {self.source.name} reads lies {WIDE} elements apart",
                    remedy='make it contiguous, or use backend="torch"',
                )
            values += [tensor, *tensor.stride()]
        values += [symbol.value for symbol in self.source.sizes]
        values += [cells] if self.source.persistent else []
        return list(zip(self.source.parameters, values, strict=True))

    def takes(self, tensors: Mapping[Array, torch.Tensor]) -> bool:
        """Tell whether tensors lie as its descriptors need them.

        They must be contiguous along one dimension. Their first element and all other strides must be at whole 16
        bytes.
        """
        for array, along in self.source.described:
            tensor = tensors[array]
            dim = along + array.grouped
            size = tensor.element_size()
            strides = [stride for place, stride in enumerate(tensor.stride()) if place != dim]
            known = tensor.device.type == "meta" or tensor.data_ptr() % 16 == 0
            if tensor.stride(dim) != 1 or any(stride * size % 16 for stride in strides) or not known:
                return False
        return True

    @property
    def options(self) -> dict[str, int]:
        """The sizes of tiles and the options of a launch, by Triton's names."""
        blocks = {name: self.config.blocks[name] for name in self.source.blocks}
        return {**blocks, "num_warps": self.config.warps, "num_stages": self.config.stages}

    @functools.cached_property
    def operator(self) -> Any:
        """The kernel as an operator of torch: ``(Tensor[] read, Tensor(a!)[] written, int[] sizes, int[] grid)``."""
        source, options = self.source, self.options
        key = hashlib.sha256(f"{source.text}{sorted(options.items())}".encode()).hexdigest()[:16]
        return _operator(f"rmtc_kernels::{source.name}_{key}", source.name, source.text, tuple(options.items()))


@functools.cache
def _operator(qualified: str, name: str, text: str, options: tuple[tuple[str, int], ...]) -> Any:
    """Make a kernel an operator of torch, into which torch looks when it traces.

    Where Triton interprets, there is no kernel to look into.
    """
    import triton

    function = jitted(name, text)
    register: Any = torch.library.custom_op
    launched = function
    if isinstance(function, triton.JITFunction):  # torch 2.11 wraps nothing else
        register, launched = torch.library.triton_op, torch.library.wrap_triton(function)

    def launch(read: list[torch.Tensor], written: list[torch.Tensor], sizes: list[int], grid: list[int]) -> None:
        args: list[Any] = []
        for tensor in (*read, *written):
            args += [tensor, *tensor.stride()]
        launched[tuple(grid)](*args, *sizes, **dict(options))

    schema = "(Tensor[] read, Tensor(a!)[] written, int[] sizes, int[] grid) -> ()"
    made: Any = register(qualified, launch, mutates_args={"written"}, schema=schema)
    made.register_fake(lambda read, written, sizes, grid: None)
    return made


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel that can be launched.

    Attributes:
        kernel: what it computes.
        plain: the kernel printed for tensors however they lie.
        big: the kernel printed so that its product runs fastest on the target, if tensors lie as that needs them. None
            if it is no such product.
        target: the target that these were chosen for.
    """

    kernel: Kernel | Attend
    plain: Printed
    big: Printed | None
    target: Target | None

    @property
    def source(self) -> KernelSource:
        """The source of ``big`` if there is one, else that of ``plain``."""
        return (self.big or self.plain).source

    def printed(self, tensors: Mapping[Array, torch.Tensor]) -> Printed:
        """Return the printed kernel to launch for tensors."""
        return self.big if self.big is not None and self.big.takes(tensors) else self.plain

    def bind(self, tensors: Mapping[Array, torch.Tensor], cells: int, scratch: Scratch) -> BoundLaunch:
        """Return what launches the kernel for tensors that keep their addresses.

        Args:
            tensors: for each of the source's pointers, the tensor, of a group of cells if it is grouped.
            cells: number of cells.
            scratch: memory that Triton asks for. Launches that run one after another may share it.
        """
        printed = self.printed(tensors)
        return BoundLaunch(printed, dict(printed.arguments(tensors, cells)), self.grid(printed, cells), scratch)

    def call(self, tensors: Mapping[Array, torch.Tensor], cells: int) -> None:
        """Launch the kernel as an operator of torch."""
        printed = self.printed(tensors)
        pointers = printed.source.pointers
        count = len(pointers) - printed.source.written
        read, written = ([tensors[array] for array in each] for each in (pointers[:count], pointers[count:]))
        sizes = [symbol.value for symbol in printed.source.sizes]
        sizes += [cells] if printed.source.persistent else []
        given = Scratch((*read, *written)[0].device).given() if printed.source.described else contextlib.nullcontext()
        with given:
            printed.operator(read, written, sizes, list(self.grid(printed, cells)))

    def grid(self, printed: Printed, cells: int) -> tuple[int, int, int]:
        """Return the grid: tiles of rows and columns, cells, and z.

        For a persistent kernel it is the number of programs that go through all of these.
        """
        kernel, blocks = self.kernel, printed.config.blocks
        tiles = math.ceil(kernel.m.size.value / blocks["BLOCK_M"])
        if isinstance(kernel, Kernel):
            tiles *= math.ceil(kernel.n.size.value / blocks["BLOCK_N"])
        cells = cells if any(array.grouped for array in kernel.written) else 1
        if printed.source.persistent:
            most = self.target.multiprocessors if self.target is not None else 2
            return min(most, tiles * cells * kernel.z.size.value), 1, 1
        return tiles, cells, kernel.z.size.value


class Scratch:
    """Memory that a kernel with descriptors asks for at each launch, made once.

    Args:
        device: where it lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.int8, device=device)

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Have this thread's launches ask for memory here within a block; after it they ask where they did before."""
        import triton
        from triton.runtime import _allocation

        held = getattr(_allocation, "_allocator", None)  # private: without it, nothing tells what was set before
        former = held.get() if isinstance(held, ContextVar) else held
        triton.set_allocator(self)
        try:
            yield
        finally:
            if former is not None:
                triton.set_allocator(former)

    def __call__(self, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        """Return so many bytes, as Triton asks for them."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.int8, device=self._memory.device)
        return self._memory


class BoundLaunch:
    """A kernel with all that a launch passes, for tensors that keep their addresses.

    The first launch has Triton look at each argument and compile the kernel. Later ones hand the same arguments to the
    compiled kernel, on the stream that is current then. An interpreted kernel is launched anew each time.

    Args:
        printed: the kernel.
        arguments: of the launch, by name, but for the sizes of tiles.
        grid: the grid.
        scratch: memory that Triton asks for.
    """

    def __init__(
        self,
        printed: Printed,
        arguments: Mapping[str, torch.Tensor | int],
        grid: tuple[int, int, int],
        scratch: Scratch,
    ) -> None:
        self._printed, self._arguments, self._grid, self._scratch = printed, arguments, grid, scratch
        self._launch: Callable[[], Any] | None = None

    def __call__(self) -> None:
        """Launch the kernel."""
        if not self._printed.source.described:
            self._run()
            return
        with self._scratch.given():
            self._run()

    def _run(self) -> None:
        if self._launch is not None:
            self._launch()
            return
        options = self._printed.options
        function = jitted(self._printed.source.name, self._printed.source.text)
        compiled = function[self._grid](**self._arguments, **options)
        if compiled is not None:
            passed = {**self._arguments, **options}
            self._launch = functools.partial(compiled[self._grid], *(passed[name] for name in function.arg_names))


def prepare(
    kernels: Sequence[Kernel | Attend],
    name: str,
    strides: Callable[[Array], Sequence[int]],
    target: Target | None = None,
) -> list[KernelLaunch]:
    """Prepare kernels for launching.

    Args:
        kernels: the kernels.
        name: what their names begin with.
        strides: gives the strides of an array in memory, by dimension of a cell.
        target: the target that they run on, or None for the interpreter.
    """
    found = []
    for number, kernel in enumerate(kernels):
        plain = Printed(
            source_of(kernel, f"{name}_{number}", Style(interpreted=target is None)), config_of(kernel, target)
        )
        big = None
        described = target is not None and target.machine.descriptors
        if target is not None and is_big(kernel) and (described or isinstance(kernel, Kernel)):
            style = Style(persistent=True, strides=strides if described else None)
            big = Printed(source_of(kernel, f"{name}_{number}", style), config_of(kernel, target, big=True))
        found.append(KernelLaunch(kernel, plain, big, target))
    return found
