"""Lines that take one segment of a drawn model through its layers."""

from __future__ import annotations

import textwrap

from .homes import home_of
from .spec import Spec

__all__ = ["segment"]


def segment(spec: Spec) -> str:
    """Lines that take x through all layers: ``segment(self, x, states)``."""
    home = home_of(spec)
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
        "constant": [
            "seen = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() if i == 0 else seen",
            "x = x + 0.1 * seen @ x",
        ],
        "before": ["lower = x if i == 0 else lower\nx, lower = x + 0.5 * lower, x"],
    }.get(spec["skip"], [])
    return lines
