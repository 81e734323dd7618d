"""Grouped bodies as straight-line Python over torch."""

from rmtc.codegen.torch.emit import Emitted, emit

__all__ = ["Emitted", "emit"]
