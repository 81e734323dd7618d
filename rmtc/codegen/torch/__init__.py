"""Grouped bodies as straight-line Python over torch."""

from rmtc.codegen.torch.emit import emit
from rmtc.codegen.torch.source import Emitted

__all__ = ["Emitted", "emit"]
