"""The source of a drawn model: a module that needs torch only, and that says itself whether rmtc does it justice."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from .snippets import AUX, CHANGES, OPS, READS, WRITES
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


def indent(lines: str, depth: int = 8) -> str:
    return textwrap.indent(lines, " " * depth)


def render(spec: Spec) -> str:
    """The module's source."""
    write = WRITES[spec["write"]]
    aux = AUX.get(spec["aux"])
    memory = "like.new_zeros(batch, SLOTS, WIDTH)"
    start = f"({memory}, {aux.start})" if aux else memory
    parts = [
        HEAD.format(slots=write.slots, layers=spec["layers"], start=start),
        _layer(spec),
        _others(),
        _model(spec),
        _build(spec),
        _changes(spec),
        _tail(spec),
    ]
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


def _layer(spec: Spec) -> str:
    write, aux = WRITES[spec["write"]], AUX.get(spec["aux"])
    init = ["self.inner, self.outer = linear(), linear()", "self.activation = torch.tanh", "self.number = number"]
    init += [OPS[name].init for name in spec["ops"] if OPS[name].init]
    init += [write.init] if write.init else []
    init += ["self.query = linear()"] if "self.query" in READS[spec["read"]] else []
    init += [aux.init] if aux and aux.init else []
    if spec["home"] in ("self", "attribute"):
        init.append(
            "self.state = None" if not spec["kept"] else "self.state = start(1, torch.zeros(1, dtype=torch.float64))"
        )
    if spec["home"] == "attribute" and spec["reads"] == "two" and spec["kept"]:
        init.append("self.state = (self.state, self.state)")
    if spec["home"] == "buffer":
        for name in _buffers(spec):
            init.append(
                f'self.register_buffer("{name}", {_pick(spec, name)}(start(1, torch.zeros(1, dtype=torch.float64))))'
            )
    if spec["statistics"] == "layer's running":
        init.append('self.register_buffer("running", torch.zeros(WIDTH, dtype=torch.float64))')
    if spec["parametrization"] != "none":
        init.append(
            {
                "weight_norm": "nn.utils.parametrizations.weight_norm(self.inner)",
                "orthogonal": "nn.utils.parametrizations.orthogonal(self.inner)",
                "spectral": "nn.utils.parametrizations.spectral_norm(self.inner)",
                "own": 'nn.utils.parametrize.register_parametrization(self.outer, "weight", Own())',
            }[spec["parametrization"]]
        )
    if spec["script"] == "module":
        init.append("self.scripted = torch.jit.script(nn.Sequential(linear(), nn.Tanh()))")
    body = []
    if spec["home"] == "self":
        body.append("state = self.state")
    body.append("given = x")
    if spec["reads"] == "none":
        body.append("memory = start(x.shape[0], x)" + ("[0]" if aux else ""))
    elif spec["empty"]:
        body.append("if state is None:\n    state = start(x.shape[0], x)")
    if spec["reads"] != "none":
        body.append("memory, aux = state" if aux else "memory = state")
        if spec["kept"]:
            body.append("memory = memory.expand(x.shape[0], -1, -1)")
            body.append("aux = aux[:1].expand(x.shape[0], *aux.shape[1:])" if aux and spec["aux"] != "number" else "")
        body.append(READS[spec["read"]])
    half = len(spec["ops"]) // 2
    base = "x = x + SCALE * self.outer(self.bend(self.activation(self.inner(x))))"
    body += _ops(spec, spec["ops"][:half])
    body += _grad(spec, base)
    body += _ops(spec, spec["ops"][half:])
    if aux and spec["reads"] != "none":
        body.append(aux.read)
    if spec["script"] == "module":
        body.append("x = x + self.scripted(x)")
    if spec["script"] == "function":
        body.append("x = scripted(x, 0.5)")
    if spec["statistics"] == "layer's running":
        body.append(
            "self.running.mul_(0.9).add_(x.mean((0, 1)).to(self.running.dtype), alpha=0.1)\n"
            "x = x - self.running.to(x.dtype)"
        )
    body.append("x = F.layer_norm(x, (WIDTH,))")
    body.append(write.lines)
    if aux and spec["reads"] != "none":
        body.append(aux.write)
    elif aux:
        body.append("aux = start(x.shape[0], x)[1]")
    if spec["grad"] == "detach":
        body.append("made = made.detach()")
    if spec["kept"]:
        body.append("made = made.mean(0, keepdim=True)")
        if aux and spec["aux"] != "number":
            body.append("aux = aux[:1].clone()")
    made = "(made, aux)" if aux else "made"
    if spec["home"] == "self":
        body.append(f"self.state = {made}\nreturn x")
    else:
        body.append(f"return x, {made}")
    arguments = "self, x" if spec["home"] == "self" else "self, x, state"
    text = "class Layer(nn.Module):\n    def __init__(self, number):\n        super().__init__()\n"
    text += indent("\n".join(init)) + "\n\n    def bend(self, x):\n        return x\n\n"
    text += f"    def forward({arguments}):\n" + indent("\n".join(each for each in body if each)) + "\n"
    if spec["script"] == "function":
        text = "@torch.jit.script\ndef scripted(x, factor: float):\n    return x * factor + torch.sin(x)\n\n\n" + text
    return text


def _ops(spec: Spec, names: list[str]) -> list[str]:
    lines = [OPS[name].forward for name in names]
    if spec["mixed"]:
        return [f"if self.number % 2 == 0:\n{textwrap.indent(each, '    ')}" for each in lines]
    return lines


def _grad(spec: Spec, base: str) -> list[str]:
    inside = textwrap.indent(base, "    ")
    return {
        "no_grad": ["with torch.no_grad():", inside],
        "enable_grad": ["with torch.enable_grad():", inside],
        "inference": ["with torch.inference_mode(torch.is_inference_mode_enabled()):", inside],
        "set_grad_enabled": ["with torch.set_grad_enabled(False):", inside],
        "autocast": ['with torch.autocast("cpu", enabled=False):', inside],
        "saved hooks": ["with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):", inside],
        "requires_grad_": [base, "x.requires_grad_(False)"],
    }.get(spec["grad"], [base])


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


def _buffers(spec: Spec) -> list[str]:
    names = ["memory", "aux"] if spec["aux"] != "none" else ["memory"]
    return names + ["older_" + name for name in names] if spec["reads"] == "two" else names


def _pick(spec: Spec, name: str) -> str:
    if spec["aux"] == "none":
        return ""
    return "(lambda made: made[1])" if name.endswith("aux") else "(lambda made: made[0])"


def _home(spec: Spec) -> dict[str, Any]:
    """How states are started, read and written: ``setup``, ``load``, ``store``."""
    home, two, aux = spec["home"], spec["reads"] == "two", spec["aux"] != "none"
    empty = "None" if spec["empty"] else "start(batch, like)"
    first = f"({empty}, {empty})" if two else empty
    old = "[1]" if two else ""
    setup, load, store = "states = None", "", ""
    places = {"dict": 'states[f"layer {i}"]', "global": "STATES[i]"}
    place = places.get(home, "states[i]")
    if home in ("list", "argument", "dict", "global"):
        held = {
            "dict": f'states = {{f"layer {{i}}": {first} for i in range(LAYERS)}}',
            "global": f"for i in range(LAYERS):\n    STATES[i] = {first}",
        }.get(home, f"states = [{first} for _ in range(LAYERS)]")
        setup = f"if states is None:\n{textwrap.indent(held, '    ')}" if home == "argument" else held
        if home == "global" and spec["kept"]:
            first = first.replace("batch", "1")
            setup = f"for i in range(LAYERS):\n    if i not in STATES:\n        STATES[i] = {first}"
        load = place + old
        store = f"{place} = (made, {place}[0])" if two else f"{place} = made"
        if spec["in_place"] and not two:
            store = f"for one, other in zip({place}, made):\n    one.copy_(other)" if aux else f"{place}.copy_(made)"
            if spec["aux"] == "number":
                store = f"{place} = made"
    elif home == "deque":
        count = 2 if two else 1
        held = ", ".join([empty] * count)
        setup = f"states = [collections.deque([{held}], maxlen={count}) for _ in range(LAYERS)]"
        load, store = "states[i][0]", "states[i].append(made)"
    elif home == "box":
        setup = f"states = [Box({empty}) for _ in range(LAYERS)]"
        load, store = "states[i].held", "states[i].held = made"
    elif home == "named tuple":
        setup = f"states = [Named({empty}) for _ in range(LAYERS)]"
        load, store = "states[i].held", "states[i] = states[i]._replace(held=made)"
    elif home == "object":
        setup = f"states = Cache()\nfor i in range(LAYERS):\n    states.put(i, {empty})"
        load, store = "states.get(i)", "states.put(i, made)"
    elif home in ("attribute", "self"):
        setup = (
            "states = None" if spec["kept"] else f"states = None\nfor layer in ME.layers:\n    layer.state = {first}"
        )
        load = f"ME.layers[i].state{old}"
        store = "ME.layers[i].state = " + ("(made, ME.layers[i].state[0])" if two else "made")
        if spec["in_place"] and not two and not aux:
            store = "ME.layers[i].state.copy_(made)"
    elif home == "buffer":
        names = _buffers(spec)
        now = [name for name in names if not name.startswith("older")]
        lines = [f"layer.{name} = {_pick(spec, name)}(start(batch, like))" for name in names]
        setup = (
            "states = None"
            if spec["kept"]
            else "states = None\nfor layer in ME.layers:\n" + textwrap.indent("\n".join(lines), "    ")
        )
        read = [f"ME.layers[i].{'older_' if two else ''}{name}" for name in now]
        load = f"({', '.join(read)})" if aux else read[0]
        lines = ["layer = ME.layers[i]"]
        for index, name in enumerate(now):
            value = f"made[{index}]" if aux else "made"
            if spec["in_place"]:
                lines += [f"layer.older_{name}.copy_(layer.{name})"] if two else []
                lines.append(f"layer.{name}.copy_({value})")
            else:
                lines += [f"layer.older_{name} = layer.{name}"] if two else []
                lines.append(f"layer.{name} = {value}")
        store = "\n".join(lines)
    elif home in ("stacked", "shared"):
        where = "ME.memories" if home == "shared" else "states['memory']"
        other = "ME.others" if home == "shared" else "states['aux']"
        made = "[start(batch, like) for _ in range(LAYERS)]"
        lines = ["states = {}", f"made = {made}"]
        if aux:
            lines += [
                f"{where} = torch.stack([each[0] for each in made])",
                f"{other} = torch.stack([each[1] for each in made])",
            ]
        else:
            lines += [f"{where} = torch.stack(made)"]
        setup = "states = None" if home == "shared" and spec["kept"] else "\n".join(lines)
        load = f"({where}[i], {other}[i])" if aux else f"{where}[i]"
        pairs = [(where, "made[0]"), (other, "made[1]")] if aux else [(where, "made")]
        if spec["in_place"]:
            store = "\n".join(f"{held}[i] = {value}" for held, value in pairs)
        else:
            store = "\n".join(
                f"{held} = torch.cat([{held}[:i], {value}[None], {held}[i + 1 :]])" for held, value in pairs
            )
    return {"setup": setup, "load": load, "store": store, "empty": empty}


def _segment(spec: Spec) -> str:
    """Lines that take x through all layers: ``segment(self, x, states)``."""
    home = _home(spec)
    more = textwrap.indent("\n".join(_after_layer(spec)), "    ")
    more = f"\n{more}" if more else ""
    if spec["home"] == "self":
        return f"for i, layer in enumerate(self.layers):\n    x = layer(x){more}"
    reads, lines = spec["reads"], []
    nothing = f"({home['empty']})"
    if "batch" in nothing and reads in ("below", "above", "same"):
        batch = "1" if spec["kept"] else "x.shape[0]"
        nothing = nothing.replace("batch", batch).replace("like", "x")
    if spec["fresh"]:
        lines.append("states = dict(states)" if spec["home"] == "dict" else "states = list(states)")
    source = {
        "own": "i",
        "two": "i",
        "below": "i - 1",
        "above": "i + 1",
        "first": "0",
        "same": "i - 1",
        "none": "i",
        "top": "LAYERS - 1",
        "lower": "i",
    }[reads]
    late = spec["late"] or reads in ("below", "first", "lower")
    load = home["load"].replace("ME", "self")
    store = home["store"].replace("ME", "self")
    if reads == "none":
        lines.append(f"for i, layer in enumerate(self.layers):\n    x, made = layer(x, None){more}")
        return "\n".join(lines)
    if late and reads != "same":
        taken = load
        if spec["in_place"] or spec["home"] == "shared":
            taken = (
                "tuple(each.clone() for each in LOAD)".replace("LOAD", load)
                if spec["aux"] != "none"
                else f"{load}.clone()"
            )
            if spec["aux"] == "number":
                taken = f"({load}[0].clone(), {load}[1])"
        lines.append(f"before = [{taken} for i in range(LAYERS)]")
        load = "before[i]"
    got = (
        load.replace("[i]", f"[{source}]")
        .replace("layer {i}", f"layer {{{source}}}")
        .replace("get(i)", f"get({source})")
    )
    if reads in ("below", "same"):
        got = f"{got} if i > 0 else {nothing}"
    if reads == "above":
        got = f"{got} if i + 1 < LAYERS else {nothing}"
    if reads == "lower":
        got = "sum(before[: i + 1]) / (i + 1)"
    if reads == "top":
        got = f"{got} if i == 0 else {load}"
    call = {
        "zip": "for i, layer in zip(range(LAYERS), self.layers):\n    x, made = layer(x, GOT)\nSTORE",
        "range": "for i in range(LAYERS):\n    x, made = self.layers[i](x, GOT)\nSTORE",
        "names": "for i in range(LAYERS):\n    x, made = getattr(self.layers, str(i))(x, GOT)\nSTORE",
        "dict": "for i, (name, layer) in enumerate(self.layers.named_children()):\n    x, made = layer(x, GOT)\nSTORE",
        "reversed back": (
            "for i, layer in reversed(list(enumerate(self.layers))[::-1]):\n    x, made = layer.forward(x, GOT)\nSTORE"
        ),
        "recursion": (
            "def climb(i, x):\n    if i == LAYERS:\n        return x\n"
            "    x, made = self.layers[i](x, GOT)\nSTORE\n    return climb(i + 1, x)\n"
            "x = climb(0, x)"
        ),
        "slices": "i = 0\nwhile i < LAYERS:\n    x, made = self.layers[i](x, GOT)\nSTORE\n    i += 1",
    }[spec["layer_loop"]]
    if spec["late"] and reads not in ("two", "same"):
        lines.append("later = []")
        lines.append(call.replace("GOT", got).replace("STORE", f"    later.append(made){more}"))
        lines.append("for i, made in enumerate(later):\n" + textwrap.indent(store, "    "))
    else:
        lines.append(call.replace("GOT", got).replace("STORE", textwrap.indent(store, "    ") + more))
    return "\n".join(lines)


def _after_layer(spec: Spec) -> list[str]:
    """Lines that follow each call of a layer."""
    lines = {
        "sum": ["self.over = self.over + x.square().mean()"],
        "maximum": ["self.over = torch.maximum(self.over, x.amax())"],
        "buffer": ["self.over.add_(x.mean())"],
        "list": ["self.over.append(x.mean())"],
        "number": ["self.over += 1"],
        "each": ["self.over.append(x)"],
        "last": ["self.over = made" if spec["home"] != "self" else "self.over = x"],
    }.get(spec["over_cells"], [])
    lines += {
        "first": ["first = x if i == 0 else first\nx = x + 0.5 * first"],
        "before": ["lower = x if i == 0 else lower\nx, lower = x + 0.5 * lower, x"],
    }.get(spec["skip"], [])
    return lines


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
        text += decorator + f"    def forward({_arguments(spec, 'self')}):\n" + indent(_forward(spec, "self")) + "\n"
        text += "" if not static else "\n"
    return text


def _arguments(spec: Spec, me: str) -> str:
    found = [me] if me else []
    found += ["text", *(["mask"] if spec["mask"] else []), "states=None", "scale=1.0"]
    return ", ".join(found)


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
    lines.append(_segment(spec))
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


def _forward(spec: Spec, me: str) -> str:
    batch = "text.shape[0]"
    like = f"{me}.layers[0].inner.bias" if spec["text"] == "ids" else "text"
    lines = [f"batch, like = {batch}, {like}"]
    written = spec["argument_write"]
    if written == "text":
        lines.append("text.mul_(0.9)")
    if written == "clone":
        lines.append("text = text.clone()\ntext[:, :1] = text[:, -1:]")
    if written == "state":
        lines.append("if states is not None and isinstance(states[0], torch.Tensor):\n    states[0].mul_(0.5)")
    state = spec["python_state"]
    if spec["over_cells"] != "none":
        start = {"list": "[]", "each": "[]", "number": "0", "last": "None"}.get(
            spec["over_cells"], "like.new_zeros(())"
        )
        lines.append(f"{me}.over.zero_()" if spec["over_cells"] == "buffer" else f"{me}.over = {start}")
    if state in ("steps", "table", "first"):
        lines.append(f"{me}.steps = 0")
    if state in ("history", "popped"):
        lines.append(f"{me}.history = []")
    if state == "calls":
        lines.append(f"{me}.calls += 1")
    if state == "nested":
        lines.append(f"{me}.nested['a'][0] = batch")
    lines.append("if scale != 1.0:\n    text = text * scale" if spec["text"] != "ids" else "batch = batch * int(scale)")
    lines.append(_home(spec)["setup"].replace("ME", me))
    if spec["text"] == "int mask":
        lines.append("keep = (text[..., 0] > -1).to(torch.int64).cumsum(1)\ntext = text * (keep > 0)[..., None]")
    if spec["result"] == "preallocated":
        width = "11" if spec["head"] == "tied" else "WIDTH"
        lines.append(f"out = like.new_zeros(batch, text.shape[1], {width})")
    split = "text.split(SEGMENT, dim=1)"
    if spec["mask"]:
        split = f"list(zip({split}, mask.split(SEGMENT, dim=1)))"
    ranged = "text[:, at : at + SEGMENT]"
    if spec["mask"]:
        ranged = f"({ranged}, mask[:, at : at + SEGMENT])"
    put = "out[:, at : at + x.shape[1]] = x"
    ends = "pieces.append(x)"
    if spec["result"] == "preallocated":
        ends = put if spec["loop"] == "range" else put + "\n    at += x.shape[1]"
        lines.append("at = 0")
    lines += {
        "for": [f"pieces = []\nfor piece in {split}:\n    x, states = {me}.segment(piece, states)\n    {ends}"],
        "zip": [
            f"pieces = []\nfor number, piece in zip(range(10**6), {split}):\n"
            f"    x, states = {me}.segment(piece, states)\n    pieces.append(x)"
        ],
        "range": [
            f"pieces = []\nfor at in range(0, text.shape[1], SEGMENT):\n"
            f"    x, states = {me}.segment({ranged}, states)\n    {ends}"
        ],
        "while": [
            f"pieces, rest = [], list({split})\nwhile rest:\n"
            f"    x, states = {me}.segment(rest.pop(0), states)\n    pieces.append(x)"
        ],
        "generator": [f"pieces = list({me}.run(text, states))"],
        "recursion": [f"pieces, states = {me}.run({split}, states)"],
        "reduce": [
            f"def step(carried, piece):\n    x, states = {me}.segment(piece, carried[1])\n"
            f"    return [*carried[0], x], states\n\n"
            f"pieces, states = functools.reduce(step, {split}, ([], states))"
        ],
        "accumulate": [
            f"def step(carried, piece):\n    return {me}.segment(piece, carried[1])\n\n"
            f"every = list(itertools.accumulate({split}, step, initial=(None, states)))\n"
            "pieces, states = [x for x, _ in every[1:]], every[-1][1]"
        ],
        "map": [
            f"holder = [states]\n\ndef one(piece):\n    x, holder[0] = {me}.segment(piece, holder[0])\n    return x\n\n"
            f"pieces = list(map(one, {split}))\nstates = holder[0]"
        ],
        "caller": [
            f"pieces = []\nfor piece in {split}:\n    x, states = {me}.segment(piece, states)\n    pieces.append(x)"
        ],
        "caller's generator": ["pieces = []\nfor x, states in running(text, states):\n    pieces.append(x)"],
        "closure": [
            "pieces, at = [], 0\n\ndef advance():\n    nonlocal states, at\n"
            f"    x, states = {me}.segment(text[:, at : at + SEGMENT], states)\n"
            f"    at += SEGMENT\n    pieces.append(x)\n\n"
            "while at < text.shape[1]:\n    advance()"
        ],
        "iter": [
            f"pieces, rest = [], iter({split})\nwhile (piece := next(rest, None)) is not None:\n"
            f"    x, states = {me}.segment(piece, states)\n    pieces.append(x)"
        ],
        "view": [
            f"pieces = []\nfor piece in text.unflatten(1, (-1, SEGMENT)).unbind(1):\n"
            f"    x, states = {me}.segment(piece, states)\n    pieces.append(x)"
        ],
        "comprehension": [f"pieces = []\n[pieces.append({me}.segment(piece, states)[0]) for piece in {split}]"],
        "layers outside": [_outside(spec, me, split)],
    }[spec["loop"]]
    lines += _result(spec, me)
    return "\n".join(lines)


def _outside(spec: Spec, me: str, split: str) -> str:
    embed = f"{me}.embed(x)" if spec["text"] == "ids" else "x"
    same = {
        "below": "tracks[i - 1][s] if i else start(batch, like)",
        "same": "tracks[i - 1][s + 1] if i else start(batch, like)",
    }
    got = same.get(spec["reads"], "tracks[i][-1]")
    first = "start(batch, like)"
    head = "" if spec["head"] == "none" else f"\npieces = [{me}.head(x) for x in pieces]"
    return (
        f"pieces = [{embed} for x in {split}]\ntracks = [[{first}] for _ in range(LAYERS)]\n"
        f"for i, layer in enumerate({me}.layers):\n    done = []\n    for s, x in enumerate(pieces):\n"
        f"        x, made = layer(x, {got})\n"
        f"        tracks[i].append(made)\n        done.append(x)\n    pieces = done\n"
        f"states = [track[-1] for track in tracks]{head}"
    )


def _result(spec: Spec, me: str) -> list[str]:
    lines = []
    if spec["result"] == "preallocated":
        whole = "out"
        lines.append("pieces = [out]")
    else:
        whole = "torch.cat(pieces, 1)"
    handed = "states" if spec["home"] in ("list", "argument", "dict") else "None"
    value = {
        "stack": "torch.stack([x.mean(1) for x in pieces])",
        "last": "pieces[-1]",
        "sum": "sum(x.sum(1) for x in pieces)",
        "list": "pieces",
        "tuple": f"tuple(pieces), {handed}",
        "dict": f'{{"value": {whole}, "states": {handed}, "each": pieces}}',
        "dataclass": f"Output({whole}, {handed}, len(pieces))",
        "named tuple": f"Pair({whole}, {handed})",
        "loss": "sum(F.mse_loss(x, torch.zeros_like(x)) for x in pieces) / len(pieces)",
        "mean": f"{whole}.mean((0, 1)).softmax(-1)",
        "namespace": f"types.SimpleNamespace(value={whole}, number=len(pieces))",
        "numbers": f"({whole}, len(pieces), text.shape[1], pieces[-1].shape)",
        "keys": '{f"segment {number}": x for number, x in enumerate(pieces)}',
        "nothing": "None",
        "buffer": whole,
    }.get(spec["result"], whole)
    if spec["result"] == "buffer":
        lines.append(f"{me}.found = {whole}.detach()")
        value = f"{me}.found"
    lines.append(f"result = {value}")
    if spec["home"] == "argument":
        lines.append("result = (result, states)")
    more = {
        "argument": "text",
        "part of argument": "text[:, :2]",
        "parameter": f"{me}.layers[0].inner.weight",
        "twice": "result",
        "view": f"{me}.layers[0].outer.weight[:2]",
        "state": {
            "attribute": f"{me}.layers[0].state",
            "self": f"{me}.layers[0].state",
            "buffer": f"{me}.layers[0].memory",
            "shared": f"{me}.memories",
            "global": "STATES[0]",
        }.get(spec["home"], "None"),
    }
    if spec["alias"] != "none":
        lines.append(f"result = (result, {more[spec['alias']]})")
    if spec["over_cells"] != "none":
        lines.append(f"result = (result, {me}.over)")
    if spec["python_state"] == "table":
        lines.append("result = (result, scale)")
    lines.append("return result")
    return lines


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
        lines.append(f"{decorator}def call({_arguments(spec, '')}):\n" + indent(_forward(spec, "model"), 4) + "\n")
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
