"""The source of a drawn model's layer."""

from __future__ import annotations

import textwrap

from .homes import buffers, indent, pick
from .snippets import AUX, KEPT, OPS, READS, WRITES
from .spec import Spec

__all__ = ["layer"]


def layer(spec: Spec) -> str:
    write, aux, kept = WRITES[spec["write"]], AUX.get(spec["aux"]), KEPT[spec["kept_as"]]
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
        for name in buffers(spec):
            init.append(
                f'self.register_buffer("{name}", {pick(spec, name)}(start(1, torch.zeros(1, dtype=torch.float64))))'
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
    body += ["kept = memory", kept.take] if kept.take else []
    if spec["reads"] != "none":
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
    body += [write.lines, kept.put]
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
