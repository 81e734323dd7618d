"""The source of a drawn model: a module that needs torch only, and that says itself whether rmtc does it justice."""

from __future__ import annotations

import json
from typing import Any

from .homes import indent
from .layer import layer
from .loops import arguments, forward
from .segment import segment
from .snippets import AUX, CHANGES, KEPT, WRITES
from .spec import Spec

__all__ = ["render"]

HEAD = """\
import collections
import dataclasses
import enum
import functools
import itertools
import types

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import nn

SEGMENT, WIDTH, SLOTS, LAYERS = 4, 8, {slots}, {layers}
SCALE = 1.0
SCALES = [0.9, 1.1]
STATES = {{}}
TABLE = torch.linspace(0.5, 1, WIDTH, dtype=torch.float64)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.5)


def start(batch, like):
    return {start}


class Kind(enum.Enum):
    SOFT = "soft"
    HARD = 2


class Flags(enum.IntFlag):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    kind: Kind = Kind.SOFT


@dataclasses.dataclass
class Output:
    value: torch.Tensor
    states: object = None
    count: int = 0


Pair = collections.namedtuple("Pair", "value states")


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Own(nn.Module):
    def forward(self, weight):
        return weight.tanh()

    def right_inverse(self, weight):
        return weight


class Box:
    def __init__(self, held):
        self.held = held


Named = collections.namedtuple("Named", "held")


class Cache:
    def __init__(self):
        self.held = {{}}

    def get(self, number):
        return self.held[number]

    def put(self, number, value):
        self.held[number] = value


@functools.lru_cache(maxsize=None)
def ramp(length):
    return torch.linspace(0, 1, length, dtype=torch.float64)[:, None]


"""

CONSTANTS = {
    "none": "",
    "enum": "x = torch.tanh(x) if self.kind is Kind.SOFT else torch.relu(x)",
    "enum value": 'x = x * (1.5 if self.kind.value == "soft" else 2)',
    "attribute": "x = x * self.factor",
    "lru_cache": "x = x + ramp(x.shape[1]).to(x.dtype)",
    "global": "x = x * SCALES[1]",
    "config": "x = x * self.config.scale if self.config.kind is Kind.SOFT else x",
    "cached": (
        "if self.cache is None:\n    self.cache = torch.linspace(0, 1, WIDTH, dtype=torch.float64)\n"
        "x = x + self.cache.to(x.dtype)"
    ),
    "cached by length": (
        "if x.shape[1] not in self.tables:\n"
        "    self.tables[x.shape[1]] = torch.linspace(0, 1, x.shape[1], dtype=torch.float64)[:, None]\n"
        "x = x + self.tables[x.shape[1]].to(x.dtype)"
    ),
    "class attribute": "x = x * self.shared_scale",
    "property": "x = x * self.doubled",
    "default": "x = self.scaled(x)",
    "global tensor": "x = x * TABLE.to(x.dtype)",
    "flags": "x = x * (1.2 if Flags.ONE in self.flags else 0.8) + 0.1 * int(self.flags)",
    "itertools": "for a, b in itertools.product((1, 2), (0.1, 0.2)):\n    x = x + a * b",
    "string": 'x = getattr(torch, self.function_name)(x) + getattr(x, "sin")()',
}


def render(spec: Spec) -> str:
    """The module's source."""
    write = WRITES[spec["write"]]
    aux = AUX.get(spec["aux"])
    memory = f"like.new_zeros(batch, {KEPT[spec['kept_as']].shape})"
    start = f"({memory}, {aux.start})" if aux else memory
    parts = [
        HEAD.format(slots=write.slots, layers=spec["layers"], start=start),
        layer(spec),
        _others(),
        _model(spec),
        _build(spec),
        _changes(spec),
        _tail(spec),
    ]
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


def _others() -> str:
    return """\
class Other(Layer):
    def bend(self, x):
        return torch.relu(x)


class Wrapped(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, x, *state):
        return self.inside(x, *state)
"""


def _model(spec: Spec) -> str:
    init = ["self.layers = nn.ModuleList(Layer(number) for number in range(LAYERS))", "self.config = Config()"]
    init += ["self.kind, self.factor, self.cache, self.tables = Kind.SOFT, 0.8, None, {}"]
    init += ['self.flags, self.function_name = Flags.ONE | Flags.TWO, "tanh"']
    if spec["text"] == "ids":
        init.append("self.embed = nn.Embedding(11, WIDTH)")
    if spec["tokens"]:
        init.append("self.tokens = weight(1, 2, WIDTH)")
    if spec["head"] == "linear":
        init.append("self.head = linear()")
    if spec["head"] == "norm":
        init.append("self.head = nn.Sequential(nn.LayerNorm(WIDTH), linear())")
    if spec["head"] == "tied":
        init.append("self.head = nn.Linear(WIDTH, 11, bias=False)\nself.head.weight = self.embed.weight")
    if spec["tied"] == "weights":
        init.append("self.layers[-1].inner.weight = self.layers[0].inner.weight")
    if spec["tied"] == "all weights":
        init.append("for layer in self.layers:\n    layer.outer.weight = self.layers[0].outer.weight")
    if spec["tied"] == "bias":
        init.append("for layer in self.layers:\n    layer.outer.bias = layer.inner.bias = self.layers[0].inner.bias")
    if spec["tied"] == "layers":
        init.append("self.layers[-1] = self.layers[0]")
    if spec["statistics"] in ("batch norm", "batch norm in training"):
        init.append("self.norm = nn.BatchNorm1d(WIDTH)")
    if spec["statistics"] in ("running", "extremes"):
        init.append(
            'self.register_buffer("running", torch.zeros(WIDTH))\nself.register_buffer("seen", torch.tensor(0))'
        )
    if spec["home"] == "shared":
        made = "[start(1, torch.zeros(1, dtype=torch.float64)) for _ in range(LAYERS)]"
        if spec["aux"] == "none":
            init.append(f'self.register_buffer("memories", torch.stack({made}))')
        else:
            for index, name in enumerate(("memories", "others")):
                init.append(f'self.register_buffer("{name}", torch.stack([each[{index}] for each in {made}]))')
    if spec["over_cells"] == "buffer":
        init.append('self.register_buffer("over", torch.zeros(()))')
    elif spec["over_cells"] != "none":
        init.append("self.over = None")
    state = spec["python_state"]
    if state != "none":
        init.append("self.steps, self.calls, self.total, self.history, self.last = 0, 0, 0, [], None")
        init.append("self.places = weight(32, WIDTH)\nself.nested = {'a': [0, None]}")
    if spec["result"] == "buffer":
        init.append('self.register_buffer("found", torch.zeros(1))')
    text = "class Model(nn.Module):\n    shared_scale = 0.7\n\n    def __init__(self):\n        super().__init__()\n"
    text += indent("\n".join(init)) + "\n\n"
    text += "    @property\n    def doubled(self):\n        return 2 * self.config.scale\n\n"
    text += "    def scaled(self, x, by=0.9, *, more=SCALES):\n        return x * by * more[0]\n\n"
    text += "    def close(self, x):\n        return x\n\n"
    if spec["loop"] != "layers outside":
        text += "    def segment(self, x, states):\n" + indent(_around(spec)) + "\n\n"
    if spec["loop"] == "generator":
        text += (
            "    def run(self, text, states):\n        for x in text.split(SEGMENT, dim=1):\n"
            "            x, states = self.segment(x, states)\n            yield x\n\n"
        )
    if spec["loop"] == "recursion":
        text += (
            "    def run(self, pieces, states):\n        if not pieces:\n            return [], states\n"
            "        x, states = self.segment(pieces[0], states)\n        rest, states = self.run(pieces[1:], states)\n"
            "        return [x, *rest], states\n\n"
        )
    if spec["loop"] not in ("caller", "caller's generator", "closure"):
        static = spec["unit"] == "static"
        decorator = "    @torch.no_grad()\n" if spec["grad"] == "decorated" else ""
        text += decorator + f"    def forward({arguments(spec, 'self')}):\n" + indent(forward(spec, "self")) + "\n"
        text += "" if not static else "\n"
    return text


def _around(spec: Spec) -> str:
    """A segment with what is before and after its layers."""
    lines = ["before_layers = None"]
    if spec["mask"]:
        lines = ["x, mask = x"]
    else:
        lines = []
    if spec["text"] == "ids":
        lines.append("x = self.embed(x)")
    if spec["mask"]:
        lines.append("x = x * mask[..., None].to(x.dtype)")
    state = spec["python_state"]
    lines += {
        "steps": ["x = x * (self.steps + 1)\nself.steps += 1"],
        "first": ["x = x * 2 if self.steps == 0 else x\nself.steps = 1"],
        "table": ["x = x + self.places[self.steps]\nself.steps += 1"],
    }.get(state, [])
    if spec["statistics"] in ("batch norm", "batch norm in training"):
        lines.append("x = self.norm(x.transpose(1, 2)).transpose(1, 2)")
    if spec["tokens"]:
        lines.append("x = torch.cat([x, self.tokens.expand(x.shape[0], -1, -1)], 1)")
    lines.append(CONSTANTS[spec["constants"]])
    lines.append(segment(spec))
    if spec["tokens"]:
        lines.append("x = x[:, :-2]")
    lines += {
        "running": ["self.running.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)\nself.seen += 1"],
        "extremes": ["self.running = torch.maximum(self.running, x.amax((0, 1)))\nself.seen = self.seen + 1"],
    }.get(spec["statistics"], [])
    lines += {
        "history": ["self.history.append(x.mean(1))"],
        "last": ["self.last = x"],
        "total": ["self.total = self.total + 1"],
        "nested": ["self.nested['a'][1] = x[:, -1]"],
        "popped": ["self.history.append(x)\nif len(self.history) > 2:\n    self.history.pop(0)"],
    }.get(state, [])
    lines.append("x = self.close(x)")
    lines += {
        "in place": ["x.mul_(2)"],
        "scaled": ["x = x * 2"],
        "view": ["x = x.transpose(0, 1).transpose(0, 1)"],
    }.get(spec["after"], [])
    if spec["head"] != "none":
        lines.append("x = self.head(x)")
    lines.append("return x, states")
    return "\n".join(each for each in lines if each)


def _build(spec: Spec) -> str:
    lines = [f"model = Model().double().requires_grad_({spec['gradients']})"]
    lines.append("model.eval()" if spec["statistics"] != "batch norm in training" else "model.train()")
    unit = spec["unit"]
    if spec["loop"] in ("caller", "caller's generator", "closure"):
        lines.append("")
        if spec["loop"] == "caller's generator":
            lines.append(
                "def running(text, states):\n    for piece in text.split(SEGMENT, dim=1):\n"
                "        x, states = model.segment(piece, states)\n        yield x, states\n"
            )
        decorator = "@torch.no_grad()\n" if spec["grad"] == "decorated" else ""
        lines.append(f"{decorator}def call({arguments(spec, '')}):\n" + indent(forward(spec, "model"), 4) + "\n")
        lines.append("return call, model")
    elif unit == "function":
        lines.append("\ndef call(*args, **kwargs):\n    return model(*args, **kwargs)\n\nreturn call, model")
    elif unit == "partial":
        lines.append("return functools.partial(model.forward, scale=1.0), model")
    elif unit == "method":
        lines.append("return model.forward, model")
    elif unit == "static":
        lines.append("return functools.partial(Model.forward, model), model")
    else:
        lines.append("return model, model")
    return "def build():\n" + indent("\n".join(lines), 4)


def _changes(spec: Spec) -> str:
    used = sorted({change for call in spec["calls"] for change in call["before"]})
    parts = []
    for number, name in enumerate(used):
        parts.append(f"def change{number}(model):\n" + indent(CHANGES[name].strip("\n"), 4) + "\n")
    table = ", ".join(f"{name!r}: change{number}" for number, name in enumerate(used))
    return "\n\n".join([*parts, f"CHANGES = {{{table}}}\n"])


def _tail(spec: Spec) -> str:
    calls = ",\n".join("    " + repr(call) for call in spec["calls"])
    options: dict[str, Any] = {"schedule": spec["schedule"], "backend": "torch"}
    if "recompute" in spec:
        options["recompute"] = spec["recompute"]
    if spec["max_group"]:
        options["options"] = {"max_group": spec["max_group"]}
    extra = {
        "text": "ids" if spec["text"] == "ids" else "float",
        "mask": spec["mask"],
        "states": spec["home"] == "argument",
    }
    return (
        f"CALLS = [\n{calls},\n]\nOPTIONS = {options!r}\nGIVEN = {extra!r}\n"
        f"WHEN = {spec['compiled_when']!r}\nSEED = {spec['seed']}\n"
        f"SPEC = {json.dumps(json.dumps(spec))}\n\n"
        'if __name__ == "__main__":  # from the root of the repository, with PYTHONPATH=.\n'
        "    from tests.fuzz.check import main\n\n"
        "    main(__file__)\n"
    )
