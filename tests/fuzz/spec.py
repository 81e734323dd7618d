"""Drawn models as data: what there is to draw, what theory says of it, and smaller ones.

Shapes: B batch, N positions of the text, L layers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

from .snippets import AUX, CHANGES, KEPT, OPS, READS, WRITES

__all__ = ["OPTIONS", "Spec", "draw", "features", "has_schedule", "plain", "size", "smaller"]

Spec = dict[str, Any]
"""A model and the calls it is given, as JSON has it: a value for each of OPTIONS, ``ops``, ``calls``, ``seed``."""

_RARE = 0.15

OPTIONS: dict[str, tuple[Any, ...]] = {
    "layers": (2, 3, 4, 1),
    "write": tuple(WRITES),
    "read": tuple(READS),
    "reads": ("own", "below", "above", "two", "first", "same", "none", "lower", "top"),
    "aux": ("none", *AUX),
    "home": (
        "list",
        "dict",
        "attribute",
        "buffer",
        "argument",
        "stacked",
        "object",
        "self",
        "global",
        "deque",
        "shared",
        "box",
        "named tuple",
    ),
    "in_place": (False, True),
    "late": (False, True),
    "kept": (False, True),
    "fresh": (False, True),
    "empty": (False, True),
    "loop": (
        "for",
        "range",
        "while",
        "generator",
        "recursion",
        "reduce",
        "caller",
        "zip",
        "iter",
        "view",
        "comprehension",
        "caller's generator",
        "layers outside",
        "closure",
        "map",
        "accumulate",
        "windows",
        "windows that look ahead",
    ),
    "layer_loop": ("zip", "range", "names", "dict", "reversed back", "recursion", "slices"),
    "unit": ("module", "function", "partial", "method", "static"),
    "text": ("float", "ids", "int mask"),
    "mask": (False, True),
    "tokens": (False, True),
    "mixed": (False, True),
    "skip": ("none", "first", "before", "constant"),
    "over_cells": ("none", "sum", "maximum", "buffer", "list", "number", "each", "last"),
    "after": ("none", "in place", "scaled", "view"),
    "gradients": (False, True),
    "head": ("none", "linear", "norm", "tied"),
    "result": (
        "cat",
        "stack",
        "last",
        "sum",
        "list",
        "tuple",
        "dict",
        "dataclass",
        "named tuple",
        "loss",
        "mean",
        "namespace",
        "numbers",
        "keys",
        "buffer",
        "nothing",
        "preallocated",
    ),
    "alias": ("none", "argument", "state", "parameter", "twice", "view", "part of argument"),
    "tied": ("none", "weights", "layers", "all weights", "bias"),
    "parametrization": ("none", "weight_norm", "orthogonal", "spectral", "own"),
    "script": ("none", "module", "function"),
    "statistics": ("none", "batch norm", "batch norm in training", "running", "extremes", "layer's running"),
    "constants": (
        "none",
        "enum",
        "enum value",
        "attribute",
        "lru_cache",
        "global",
        "config",
        "cached",
        "cached by length",
        "class attribute",
        "property",
        "default",
        "global tensor",
        "flags",
        "itertools",
        "string",
    ),
    "grad": (
        "none",
        "no_grad",
        "enable_grad",
        "inference",
        "detach",
        "requires_grad_",
        "decorated",
        "set_grad_enabled",
        "autocast",
        "saved hooks",
    ),
    "python_state": ("none", "steps", "history", "last", "calls", "total", "table", "nested", "popped", "first"),
    "argument_write": ("none", "text", "clone", "state"),
    "schedule": ("shortest", "best", "fission", "diagonal", "sequential"),
    "max_group": (None, 1, 2, 3),
    "compiled_when": ("at first", "under no_grad", "by decorator"),
    "kept_as": tuple(KEPT),
    "trim": (
        "none",
        "first",
        "last",
        "rest",
        "rest at the front",
        "rest of what follows the first",
        "put before",
        "put behind",
        "filled up",
        "moved",
    ),
}
"""What a model is drawn from; the first value is the plainest."""

LAYOUTS = ("plain", "transposed", "expanded", "part", "keyword", "keywords", "scaled", "parameter", "leaf", "flipped")
MODES = ("no_grad", "inference_mode", "grad", "autocast")


def plain(**values: Any) -> Spec:
    """The plainest model, but for some choices."""
    call = {"segments": 4, "batch": 2, "tail": 4, "layout": "plain", "mode": "no_grad", "before": []}
    made = {name: choices[0] for name, choices in OPTIONS.items()}
    return possible({**made, "ops": [], "calls": [call], "seed": 0, **values})


def draw(seed: int, number: int) -> Spec:
    """The model of a number in the series of a seed."""
    rng = random.Random(f"{seed} {number}")
    spec: Spec = {}
    daring = rng.choice((0.06, 0.15, 0.35))  # how likely each choice is another than the plainest
    for name, values in OPTIONS.items():
        always = name in ("layers", "write", "read", "loop", "layer_loop", "home", "result", "reads", "trim", "kept_as")
        other = rng.random() < (0.6 if always else daring)
        spec[name] = rng.choice(values[1:]) if other else values[0]
    if spec["layers"] == 1 and rng.random() < 0.8:
        spec["layers"] = 3
    if spec["reads"] == "top" and rng.random() < 0.7:  # is refused
        spec["reads"] = "below"
    spec["ops"] = rng.sample(list(OPS), rng.choice((0, 1, 1, 2, 2, 3, 4)))
    spec["calls"] = _calls(rng)
    spec["seed"] = rng.randrange(1000)
    if rng.random() < 0.25:
        spec["calls"] += _lengths(rng, spec["calls"][0])
    return possible(spec)


def trained(spec: Spec) -> Spec:
    """The model with parameters that want gradients, which each of its calls is asked for.

    In half of them, cells run again in the backward pass. What eager itself does not differentiate is left out.
    """
    ops = [each for each in spec["ops"] if each != "out argument"]
    calls = [{**call, "mode": "grad"} for call in spec["calls"]]
    recompute = "cells" if spec["seed"] % 2 else "auto"
    return possible(
        {**spec, "ops": ops, "gradients": True, "compiled_when": "at first", "calls": calls, "recompute": recompute}
    )


def _calls(rng: random.Random) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    batch = rng.choice((1, 2, 3))
    mode = rng.choice(("no_grad", "no_grad", "no_grad", "inference_mode", "grad"))
    changes = rng.choice((0, 0, 1, 1, 2, 3))
    for number in range(rng.choice((3, 4))):
        call: dict[str, Any] = {
            "segments": rng.choice((4, 5)) if number == 0 else rng.choice((1, 2, 3, 4, 5, 6, 7, 9, 12)),
            "batch": batch if rng.random() < 0.7 else rng.choice((1, 2, 3)),
            "tail": 4 if rng.random() < 0.6 else rng.choice((1, 2, 3)),
            "layout": "plain" if rng.random() < 0.85 else rng.choice(LAYOUTS),
            "mode": mode if rng.random() < 0.85 else rng.choice(MODES),
            "before": [],
        }
        calls.append(call)
    for _ in range(changes):
        calls[rng.randrange(1, len(calls))]["before"].append(rng.choice(list(CHANGES)))
    return calls


def _lengths(rng: random.Random, call: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls of one batch size that end with all lengths in some order: the later may be predicted from the earlier."""
    return [
        {**call, "segments": rng.choice((4, 5, 6, 9, 12)), "tail": tail, "layout": "plain", "before": []}
        for tail in (*rng.sample(range(1, 5), 4), rng.randint(1, 4))
    ]


def possible(spec: Spec) -> Spec:
    """The nearest model that can be written."""
    made = copy.deepcopy(spec)

    def fix(condition: bool, **values: Any) -> None:
        if condition:
            made.update(values)

    held = made["home"] in ("attribute", "buffer", "self", "shared", "global")
    fix(made["home"] == "self" and made["reads"] not in ("own", "none"), reads="own")
    fix(made["aux"] == "number" and made["home"] in ("stacked", "buffer", "shared"), aux="count")
    fix(not held, kept=False)
    fix(
        made["reads"] == "two" and made["home"] in ("stacked", "shared", "self", "object", "box", "named tuple"),
        home="deque",
    )
    fix(made["home"] == "deque" and made["reads"] not in ("two", "own"), reads="two")
    fix(made["home"] in ("dict", "deque", "object", "self", "global", "box", "named tuple"), in_place=False)
    fix(made["home"] == "deque", empty=False)
    held = made["home"] in ("attribute", "buffer", "self", "shared", "global")
    fix(not held, kept=False)
    fix(
        made["loop"] == "layers outside" and (made["reads"] not in ("own", "none", "below", "same") or held), loop="for"
    )
    fix(made["loop"] == "layers outside", home="list", layer_loop="zip", in_place=False, late=False, tokens=False)
    fix(made["loop"] == "layers outside", python_state="none", mask=False)
    fix(made["mask"] and made["loop"] not in ("for", "range", "while", "caller"), mask=False)
    fix(made["loop"] in ("caller", "caller's generator", "closure"), unit="function")
    fix(made["loop"] == "view" or made["result"] == "stack_", mask=False)
    fix(made["in_place"] or made["kept"], empty=False)
    fix(made["in_place"] and made["write"] in ("cache", "input"), write="mean")  # of other sizes at the end
    fix(made["home"] in ("stacked", "shared", "buffer") and made["write"] in ("cache", "input"), write="gate")
    fix(made["kept"] and made["write"] in ("cache", "input"), write="mean")
    fix(made["text"] == "ids" and made["head"] == "none" and made["tied"] == "none", head="linear")
    fix(made["head"] == "tied" and made["text"] != "ids", text="ids")
    fix(made["home"] not in ("list", "dict", "argument"), fresh=False)
    fix(made["layer_loop"] == "recursion" and (made["home"] == "self" or made["skip"] != "none"), layer_loop="zip")
    fix(made["reads"] == "lower" and (made["aux"] != "none" or made["empty"]), aux="none", empty=False)
    fix(made["reads"] == "lower" and made["write"] in ("cache", "input"), write="mean")
    fix(made["loop"] == "layers outside", over_cells="none", skip="none")
    fix(made["loop"] == "layers outside" and made["reads"] == "lower", reads="own")
    fix(made["reads"] == "none", write="mean", late=False)
    fix(made["text"] == "ids" and made["argument_write"] == "text", argument_write="none")
    fix(made["layers"] == 1 and made["reads"] in ("above", "below", "same", "top"), reads="own")
    fix(made["script"] != "none" and made["unit"] == "static", unit="module")
    fix(made["unit"] == "static" and made["grad"] == "decorated", grad="no_grad")
    fix(made["home"] not in ("argument",) and made["argument_write"] == "state", argument_write="none")
    fix(made["layers"] < 2 and made["tied"] != "none", tied="none")
    fix(made["result"] == "preallocated" and made["loop"] not in ("for", "range"), loop="range")
    fix(made["result"] in ("preallocated", "buffer") and made["tokens"], tokens=False)
    fix(made["compiled_when"] == "by decorator" and made["unit"] != "module", compiled_when="at first")
    fix(made["result"] == "preallocated", trim="none")
    fix(made["loop"] == "windows that look ahead", trim="none")
    fix(
        made["write"] in ("cache", "input") and KEPT[made["kept_as"]].shape != "SLOTS, WIDTH", kept_as="as it is"
    )  # of other sizes at the end
    if made["loop"] == "view":
        for call in made["calls"]:
            call["tail"] = 4
    if made["text"] == "ids":
        for call in made["calls"]:
            call["layout"] = (
                call["layout"] if call["layout"] in ("plain", "part", "keyword", "keywords", "scaled") else "plain"
            )
    return made


def least_a(spec: Spec) -> int:
    """The least a for which a*s + l puts every cell after those whose memories it reads."""
    layers: int = spec["layers"]
    found: dict[str, int] = {"above": 2, "top": layers}
    return found.get(spec["reads"], 1)


UNSUPPORTED = {
    ("python_state", "calls"),
    ("python_state", "total"),
    ("statistics", "batch norm in training"),
    ("grad", "requires_grad_"),
    ("grad", "saved hooks"),
    ("tied", "layers"),
}
"""Choices that the README says are refused."""


def has_schedule(spec: Spec) -> bool:
    """Whether theory has a schedule for the model, and the README does not say that it is refused."""
    if any((name, value) in UNSUPPORTED for name, value in spec.items() if isinstance(value, (str, bool))):
        return False
    if spec["layers"] < 2 or spec["reads"] == "top":
        return False
    return bool(least_a(spec) < spec["layers"])


def features(spec: Spec) -> Iterator[str]:
    """What a model was drawn with, for counting."""
    for name in OPTIONS:
        yield f"{name}={spec[name]}"
    for name in spec["ops"]:
        yield f"op={name}"
    for call in spec["calls"]:
        yield f"layout={call['layout']}"
        yield f"mode={call['mode']}"
        for change in call["before"]:
            yield f"change={change}"


def size(spec: Spec) -> int:
    """How far a model is from the plainest one."""
    far = sum(spec[name] != values[0] for name, values in OPTIONS.items())
    calls = sum(
        2 + len(call["before"]) + (call["layout"] != "plain") + (call["mode"] != "no_grad") + (call["tail"] != 4)
        for call in spec["calls"]
    )
    return int(far + 2 * len(spec["ops"]) + calls + spec["layers"])


def smaller(spec: Spec) -> Iterator[Spec]:
    """Models that lack something of a model, the most first."""

    def with_(**values: Any) -> Spec:
        return possible({**copy.deepcopy(spec), **values})

    calls = spec["calls"]
    for number in reversed(range(len(calls))):
        if len(calls) > 1:
            rest = copy.deepcopy(calls[:number] + calls[number + 1 :])
            lost = calls[number]["before"]
            if number < len(calls) - 1:
                rest[number]["before"] = [*lost, *rest[number]["before"]] if number else rest[number]["before"]
            rest[0]["before"] = []
            yield with_(calls=rest)
    if len(spec["ops"]) > 1:
        yield with_(ops=[])
    for number in range(len(spec["ops"])):
        yield with_(ops=spec["ops"][:number] + spec["ops"][number + 1 :])
    for number, call in enumerate(calls):
        for index in range(len(call["before"])):
            less = copy.deepcopy(calls)
            del less[number]["before"][index]
            yield with_(calls=less)
    for name, values in OPTIONS.items():
        if spec[name] != values[0] and name != "layers":
            yield with_(**{name: values[0]})
    if spec["layers"] > 2:
        yield with_(layers=spec["layers"] - 1)
    for number, call in enumerate(calls):
        for key, value in (("layout", "plain"), ("mode", "no_grad"), ("tail", 4), ("batch", 1), ("segments", 4)):
            if call[key] != value:
                less = copy.deepcopy(calls)
                less[number][key] = value
                yield with_(calls=less)
