"""Where a drawn model keeps its memories: lines that start, read and write them."""

from __future__ import annotations

import textwrap
from typing import Any

from .spec import Spec

__all__ = ["indent", "buffers", "pick", "home_of"]


def indent(lines: str, depth: int = 8) -> str:
    return textwrap.indent(lines, " " * depth)


def buffers(spec: Spec) -> list[str]:
    names = ["memory", "aux"] if spec["aux"] != "none" else ["memory"]
    return names + ["older_" + name for name in names] if spec["reads"] == "two" else names


def pick(spec: Spec, name: str) -> str:
    if spec["aux"] == "none":
        return ""
    return "(lambda made: made[1])" if name.endswith("aux") else "(lambda made: made[0])"


def home_of(spec: Spec) -> dict[str, Any]:
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
        names = buffers(spec)
        now = [name for name in names if not name.startswith("older")]
        lines = [f"layer.{name} = {pick(spec, name)}(start(batch, like))" for name in names]
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
