"""The sizes of tiles, warps and stages of kernels, by rules or from a file of measured ones."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from rmtc import heuristics
from rmtc.codegen.triton.targets import TARGETS, Target
from rmtc.errors import BackendError
from rmtc.ir.kernel import Attend, Kernel
from rmtc.ir.limits import loads
from rmtc.passes.bodies.tiles import Config, power_of_two, tiles_of, weight

FILE = "RMTC_KERNEL_CONFIGS"
"""The environment variable that names a file of configurations."""

_TARGETS = ("interpreter", *TARGETS)
_KINDS = ("product", "heavy product", "persistent product", "attention", "rows")
_DTYPES = ("bfloat16", "bool", "float16", "float32", "float64", "int32", "int64")


class Bucket(NamedTuple):
    """Kernels that share a configuration, whatever the number of segments and of cells is.

    Attributes:
        target: the target's name, or ``"interpreter"`` on the CPU.
        kind: ``"product"``, ``"heavy product"`` (whose factors are computed on the way), ``"persistent product"``,
            ``"attention"`` or ``"rows"``.
        dtype: the widest dtype that is written.
        m, n, k: rows, columns and depth, as the next power of two. For attention these are queries, keys, and the size
            of a query's head.
        products: number of products that share a loop. For attention it is the size of a value, as the next power of
            two.
    """

    target: str
    kind: str
    dtype: str
    m: int
    n: int
    k: int
    products: int


class ConfigError(BackendError):
    """An error of a file of configurations that cannot be read, or has some that no kernel can have."""

    title = "no configurations"


def bucket_of(kernel: Kernel | Attend, target: Target | None = None, big: bool = False) -> Bucket:
    """Return the bucket of a kernel, which tells the configurations that it may have."""
    widest = max((each.dtype for each in kernel.written), key=lambda dtype: dtype.itemsize)
    if isinstance(kernel, Attend):
        kind, depth, products = "attention", kernel.e.size.value, power_of_two(kernel.d.size.value, 16, 1 << 62)
    else:
        depth = max((stage.over.size.value for stage in kernel.stages), default=1)
        products = max((len(stage.accumulators) for stage in kernel.stages), default=0)
        heavy = products and weight(kernel) >= heuristics.HEAVY_PRODUCT
        kind = "rows" if not products else "persistent product" if big else "heavy product" if heavy else "product"
    m, n, k = (power_of_two(size, 1, 1 << 62) for size in (kernel.m.size.value, kernel.n.size.value, depth))
    name = target.name if target is not None else "interpreter"
    return Bucket(name, kind, str(widest).removeprefix("torch."), m, n, k, products)


def config_of(kernel: Kernel | Attend, target: Target | None = None, big: bool = False) -> Config:
    """Return the configuration of a kernel on a target.

    It is that of the kernel's bucket in the file that ``RMTC_KERNEL_CONFIGS`` names, or else one by rules.

    Raises:
        ConfigError: if the file cannot be read, or has one that the kernel cannot have.
    """
    own = tiles_of(kernel, big)
    if big and target is not None and target.backend == "hip":
        own = replace(own, stages=2)
    if not (file := os.environ.get(FILE)):
        return own
    bucket = bucket_of(kernel, target, big)
    found = _configs(Path(file)).get(bucket)
    if found is None:
        return own
    whole = ("BLOCK_E", "BLOCK_D")  # one tile holds them whole
    lowest = 1 if bucket.kind == "rows" else 16
    least = {name: size if name in whole else lowest for name, size in own.blocks.items()}
    if found.blocks.keys() != least.keys() or any(found.blocks[name] < size for name, size in least.items()):
        raise ConfigError(
            f"{file} has tiles of {dict(found.blocks)} for {', '.join(map(str, bucket))}",
            remedy=f"give it powers of two: {', '.join(f'{name} from {size} on' for name, size in least.items())}",
        )
    return found


def configs_text(configs: Iterable[tuple[Bucket, Config]]) -> str:
    """Return configurations as a file has them, in JSON with one per line."""
    rows = [json.dumps({**bucket._asdict(), **asdict(config)}) for bucket, config in dict(configs).items()]
    return "[\n" + ",\n".join(f" {row}" for row in rows) + "\n]\n"


def _configs(file: Path) -> Mapping[Bucket, Config]:
    try:
        return _read(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{FILE} names {file}, which cannot be used: {error}",
            remedy="write one with rmtc kernels --out DIR, which puts those of its kernels in DIR/configs.json",
        ) from error


@functools.lru_cache(4)
def _read(text: str) -> Mapping[Bucket, Config]:
    rows = loads(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of objects")
    names = [*Bucket._fields, "blocks", "warps", "stages"]
    found: dict[Bucket, Config] = {}
    for number, row in enumerate(rows, 1):
        if row.keys() != {*names}:
            raise ValueError(f"row {number} has {', '.join(map(str, row))} in place of {', '.join(names)}")
        bucket = Bucket(*(row[name] for name in Bucket._fields))
        if bucket.target not in _TARGETS or bucket.kind not in _KINDS or bucket.dtype not in _DTYPES:
            raise ValueError(f"row {number} is of {bucket.target!r}, {bucket.kind!r}, {bucket.dtype!r}: one is unknown")
        blocks = row["blocks"].values() if isinstance(row["blocks"], dict) else [0]
        sizes = {"m": bucket.m, "n": bucket.n, "k": bucket.k, "warps": row["warps"]} | dict(enumerate(blocks))
        if not all(type(size) is int and size > 0 and size & (size - 1) == 0 for size in sizes.values()):
            raise ValueError(f"row {number}: m, n, k, sizes of tiles and warps are powers of two")
        counts = {type(row["stages"]), type(bucket.products)} == {int} and bucket.products >= 0
        if (
            max(blocks, default=0) > heuristics.TILE_ELEMENTS
            or row["warps"] > 32
            or not counts
            or not 1 <= row["stages"] <= 16
        ):
            most = heuristics.TILE_ELEMENTS
            raise ValueError(f"row {number}: tiles have up to {most}, there are up to 32 warps and 1 to 16 stages")
        if bucket in found:
            raise ValueError(f"row {number} is of the same kernels as a row before it")
        found[bucket] = Config(row["blocks"], row["warps"], row["stages"])
    return found
