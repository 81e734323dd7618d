"""A cache in a folder of its own, and a small model whose first call fills it."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rmtc
from rmtc import cache
from rmtc.runtime.compiled import Compiled

SEGMENT, WIDTH = 4, 8


class Layer(nn.Module):
    """A gated layer with a memory."""

    scale = 1.5
    memory: torch.Tensor

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(width, width, bias=False) for _ in "ab")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x + self.memory
        x = x + self.scale * self.up(z) * torch.sigmoid(self.gate(z))
        self.memory = x.mean(1, keepdim=True)
        return x


class Model(nn.Module):
    """A loop over segments of layers with memories."""

    def __init__(self, layers: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.register_buffer("start", torch.randn(1, 1, width, dtype=torch.float64))
        self.eps = 0.5
        self.double()

    def forward(self, text: torch.Tensor, shift: float = 0.25) -> torch.Tensor:
        for layer in self.layers:
            layer.memory = self.start
        found = []
        for segment in text.split(SEGMENT, 1):
            for layer in self.layers:
                segment = layer(segment)
            found.append(self.result(segment, shift))
        return torch.cat(found, 1)

    def result(self, segment: torch.Tensor, shift: float) -> torch.Tensor:
        return segment * self.eps + shift


class Other(Model):
    """A model with the names of the first, that computes something else."""

    def result(self, segment: torch.Tensor, shift: float) -> torch.Tensor:
        return segment - self.eps * shift


def text(segments: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, SEGMENT * segments, WIDTH, dtype=torch.float64)


def compiled(fast: Any) -> Compiled:
    found = fast._compiled_call_impl
    assert isinstance(found, Compiled)
    return found


def first_call(model: nn.Module, *args: Any, recalled: int = 0, **options: Any) -> Compiled:
    """Make the first call of a compiled model, which runs with its schedule and gives what eager gives."""
    with torch.no_grad():
        wanted = copy.deepcopy(model)(*args)
        fast = rmtc.compile(model, schedule="shortest", strict=True, **options)
        torch.testing.assert_close(fast(*args), wanted, rtol=1e-9, atol=1e-9)
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.captures, stats.recalled) == (1, 1, recalled)
    return compiled(fast)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Turn the cache on, in an empty folder."""
    monkeypatch.setenv("RMTC_CACHE", "1")
    monkeypatch.setenv("RMTC_CACHE_DIR", str(tmp_path))
    return tmp_path / "loops"


def only(folder: Path) -> Path:
    """Return the one entry."""
    (file,) = folder.iterdir()
    return file


def rewrite(file: Path, change: Any) -> None:
    """Change the content of an entry and give it a checksum that is right."""
    head, _, body = file.read_text().partition("\n")
    content = json.loads(body)
    change(content)
    cache.write_entry(json.loads(head)["key"], content)


@contextmanager
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect what is said of the cache at INFO."""
    found: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.INFO, "rmtc"):
        yield found
    found += [each.message for each in caplog.records if "cache" in each.message and each.levelno == logging.INFO]
