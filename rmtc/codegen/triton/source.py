"""The printer of kernels as Triton source."""

from __future__ import annotations

from rmtc.codegen.triton.attention import AttentionPrinter
from rmtc.codegen.triton.product import ProductPrinter
from rmtc.codegen.triton.spelling import name_of
from rmtc.codegen.triton.style import KernelSource, Style
from rmtc.ir.kernel import Attend, Kernel


def source_of(kernel: Kernel | Attend, prefix: str, style: Style) -> KernelSource:
    """Print a kernel.

    Args:
        kernel: the kernel.
        prefix: what its name begins with.
        style: the style of its products.
    """
    name = name_of(kernel, prefix)
    if isinstance(kernel, Attend):
        attention = AttentionPrinter(kernel, style)
        return attention.source(name, attention.attention(kernel))
    product = ProductPrinter(kernel, style)
    return product.source(name, product.product(kernel))
