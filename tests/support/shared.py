"""Answers and analyses that tests only read, made once in a session for all of them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from models import LOOPS, OTHERS

import rmtc
from rmtc.analysis import Analysis, analyze

SIZES: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2, "segment": 5, "memory": 2, "segments": 4}
"""Of the examples."""


def call_of(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A model of `models.py`, or an example of the package, and its arguments."""
    known = {**LOOPS, **OTHERS}
    function, args = known[name]() if name in known else importlib.import_module(f"rmtc.examples.{name}").build(**SIZES)
    return function, args


@functools.cache
def explained(name: str) -> rmtc.Explanation:
    """What `rmtc.explain` says of it."""
    function, args = call_of(name)
    return rmtc.explain(function)(*args)


@functools.cache
def analysed(name: str) -> Analysis:
    """Its analysis."""
    function, args = call_of(name)
    with torch.no_grad():
        return analyze(function, args, {})
