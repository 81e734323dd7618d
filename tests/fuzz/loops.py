"""The loop over segments of a drawn model, and its result."""

from __future__ import annotations

from .homes import home_of
from .spec import Spec

__all__ = ["arguments", "forward"]

TRIMS = {
    "none": "{0}",
    "first": "{0}[:, 1:]",
    "last": "{0}[:, :-1]",
    "rest": "{0}[:, : {0}.shape[1] // SEGMENT * SEGMENT]",
    "rest at the front": "{0}[:, {0}.shape[1] % SEGMENT :]",
    "rest of what follows the first": "{0}[:, 1 :][:, : ({0}.shape[1] - 1) // SEGMENT * SEGMENT]",
    "put before": "torch.cat([{0}[:, :2], {0}], dim=1)",
    "put behind": "torch.cat([{0}, {0}[:, :3]], dim=1)",
    "filled up": "torch.cat([{0}, {0}.new_zeros(({0}.shape[0], -{0}.shape[1] % SEGMENT, *{0}.shape[2:]))], dim=1)",
    "moved": "{0}.roll(-1, 1)",
}
"""What is done to a text before it is cut."""


def arguments(spec: Spec, me: str) -> str:
    found = [me] if me else []
    found += ["text", *(["mask"] if spec["mask"] else []), "states=None", "scale=1.0"]
    return ", ".join(found)


def forward(spec: Spec, me: str) -> str:
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
    lines.append(home_of(spec)["setup"].replace("ME", me))
    if spec["text"] == "int mask":
        lines.append("keep = (text[..., 0] > -1).to(torch.int64).cumsum(1)\ntext = text * (keep > 0)[..., None]")
    if spec["result"] == "preallocated":
        width = "11" if spec["head"] == "tied" else "WIDTH"
        lines.append(f"out = like.new_zeros(batch, text.shape[1], {width})")
    split, masks = (f"{TRIMS[spec['trim']].format(each)}.split(SEGMENT, dim=1)" for each in ("text", "mask"))
    if spec["mask"]:
        split = f"list(zip({split}, {masks}))"
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
        "windows": [
            f"pieces, seen = [], torch.cat([text[:, :2], text], 1)\nfor at in range(0, text.shape[1], SEGMENT):\n"
            f"    x, states = {me}.segment(seen[:, at : at + SEGMENT + 2], states)\n    pieces.append(x[:, 2:])"
        ],
        "windows that look ahead": [
            f"pieces = []\nfor at in range(0, text.shape[1], SEGMENT):\n"
            f"    x, states = {me}.segment(text[:, at : at + SEGMENT + 1], states)\n    pieces.append(x[:, :SEGMENT])"
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
