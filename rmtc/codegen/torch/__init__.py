"""Grouped bodies as straight-line Python over torch."""

from rmtc.codegen.torch.emit import Kernel, emit

__all__ = ["Kernel", "emit"]
