"""Lines of source that drawn models are put together from.

Shapes: B batch, T positions of a segment, WIDTH = 8, M slots of a memory.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["AUX", "CHANGES", "KEPT", "OPS", "READS", "WRITES", "Aux", "Kept", "Op", "Write"]


class Op(NamedTuple):
    """An operation of a layer.

    Attributes:
        forward: lines that give x (B, T, WIDTH) another value.
        init: lines of ``__init__``.
    """

    forward: str
    init: str = ""


_TABLE = 'self.register_buffer("{0}", {1})'

OPS: dict[str, Op] = {
    "mlp": Op(
        "x = x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))", "self.up, self.down = linear(), linear()"
    ),
    "silu gate": Op("x = x + F.silu(self.g1(x)) * self.g2(x)", "self.g1, self.g2 = linear(), linear()"),
    "glu": Op("x = x + F.glu(torch.cat([x, self.glu(x)], -1), -1)", "self.glu = linear()"),
    "sdpa": Op(
        "q, k, v = self.qkv.weight.chunk(3)\n"
        "q, k, v = (F.linear(x, w).unflatten(-1, (2, 4)).transpose(1, 2) for w in (q, k, v))\n"
        "x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)",
        "self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)",
    ),
    "masked attention": Op(
        "scores = self.q(x) @ x.transpose(1, 2) / WIDTH**0.5\n"
        "scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), float('-inf'))\n"
        "x = x + scores.softmax(-1) @ x",
        "self.q = linear()",
    ),
    "multihead": Op(
        "x = x + self.heads(x, x, x, need_weights=False)[0]",
        "self.heads = nn.MultiheadAttention(WIDTH, 2, batch_first=True)",
    ),
    "einsum": Op(
        'x = x + torch.einsum("btd,de->bte", torch.tanh(x), self.matrix)', "self.matrix = weight(WIDTH, WIDTH)"
    ),
    "einsum heads": Op(
        'x = x + torch.einsum("bthd,hde->bthe", x.unflatten(-1, (2, 4)), self.cube).flatten(-2)',
        "self.cube = weight(2, 4, 4)",
    ),
    "low rank": Op("x = x + x @ (self.one @ self.two)", "self.one, self.two = weight(WIDTH, 2), weight(2, WIDTH)"),
    "transposed": Op("x = x + torch.tanh(x @ self.turned.t())", "self.turned = weight(WIDTH, WIDTH)"),
    "weight slice": Op("x = x + F.linear(x, self.wide[:, 1 : WIDTH + 1])", "self.wide = weight(WIDTH, WIDTH + 2)"),
    "baddbmm": Op(
        "x = torch.baddbmm(x, x, self.batched.expand(x.shape[0], -1, -1), beta=0.5, alpha=0.7)",
        "self.batched = weight(WIDTH, WIDTH)",
    ),
    "layer norm": Op("x = self.norm(x)", "self.norm = nn.LayerNorm(WIDTH)"),
    "rms norm": Op("x = F.rms_norm(x, (WIDTH,), self.scale)", "self.scale = weight(WIDTH)"),
    "rms by hand": Op(
        "x = self.gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)", "self.gain = weight(WIDTH)"
    ),
    "group norm": Op("x = F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)"),
    "softmax": Op("x = x + x.softmax(dim=-1)"),
    "log softmax over time": Op("x = x + F.log_softmax(x, dim=1)"),
    "normalize": Op("x = F.normalize(x, dim=-1)"),
    "gradient": Op(
        "x = x - 0.1 * torch.func.grad(lambda x: F.silu(self.slope(x)).square().mean())(x)", "self.slope = linear()"
    ),
    "gradient of a norm": Op(
        "x = x + torch.func.vmap(torch.func.grad(lambda x: F.layer_norm(self.slant(x), (WIDTH,)).tanh().sum()))(x)",
        "self.slant = linear()",
    ),
    "gradient of attention": Op(
        "x = x + torch.func.grad(lambda q: F.scaled_dot_product_attention(q, x, x, is_causal=True).square().mean())(x)"
    ),
    "vmap": Op(
        "x = x + torch.func.vmap(lambda row, w: torch.tanh(row @ w), (0, None))(x, self.mapped)",
        "self.mapped = weight(WIDTH, WIDTH)",
    ),
    "vmap over positions": Op("x = x + torch.func.vmap(lambda at: at.softmax(-1) * at, 1, 1)(x)"),
    "vjp": Op("x = x + 0.1 * torch.func.vjp(lambda x: torch.tanh(self.pull(x)), x)[1](x)[0]", "self.pull = linear()"),
    "jvp": Op("x = x + torch.func.jvp(torch.tanh, (x.clone(),), (torch.ones_like(x),))[1]"),
    "sort": Op("x = x + torch.sort(x, dim=-1).values"),
    "argsort gather": Op("x = x + x.gather(-1, (x @ self.key).argsort(dim=-1))", "self.key = weight(WIDTH, WIDTH)"),
    "sort over time": Op("x = x + x.sort(dim=1, descending=True).values"),
    "topk scatter": Op(
        "values, index = (x @ self.pick).topk(3, dim=-1)\nx = x.scatter(-1, index, values)",
        "self.pick = weight(WIDTH, WIDTH)",
    ),
    "topk mask": Op("x = torch.where(x >= x.topk(4, dim=-1).values[..., -1:], x, 0.1 * x)"),
    "experts": Op(
        "weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)\n"
        "every = torch.stack([expert(x) for expert in self.experts], dim=-2)\n"
        "some = every.gather(-2, chosen[..., None].expand(-1, -1, -1, WIDTH))\n"
        "x = x + (weights[..., None] * some).sum(-2)",
        "self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(linear() for _ in range(3))",
    ),
    "experts by loop": Op(
        "chosen = self.router1(x).argmax(-1)\n"
        "for number, expert in enumerate(self.experts1):\n"
        "    x = x + expert(x) * (chosen == number)[..., None]",
        "self.router1, self.experts1 = nn.Linear(WIDTH, 2), nn.ModuleList(linear() for _ in range(2))",
    ),
    "scatter add": Op(
        "x = x + torch.zeros_like(x).scatter_add(-1, x.argsort(-1), torch.tanh(x))",
    ),
    "scatter reduce": Op(
        'x = x.scatter_reduce(-1, self.turn.expand(*x.shape[:-1], -1), torch.tanh(x), "amax")',
        _TABLE.format("turn", "torch.arange(WIDTH).flip(0)"),
    ),
    "index add": Op(
        "x = x.index_add(-1, self.order, torch.tanh(x), alpha=0.5)",
        _TABLE.format("order", "torch.arange(WIDTH).roll(1)"),
    ),
    "index add over time": Op(
        "x = x + torch.zeros_like(x).index_add(1, torch.arange(x.shape[1]).flip(0), x)",
    ),
    "index select": Op(
        "x = x + x.index_select(-1, self.some)", _TABLE.format("some", "torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])")
    ),
    "index copy": Op(
        "x = x.index_copy(-1, self.two_of, torch.tanh(x[..., :2]))", _TABLE.format("two_of", "torch.tensor([1, 6])")
    ),
    "index put": Op(
        "h = x.clone()\nh[..., self.three_of] = torch.tanh(x[..., :3])\nx = h",
        _TABLE.format("three_of", "torch.tensor([4, 2, 0])"),
    ),
    "take along": Op("x = x + torch.take_along_dim(x, x.argmax(-1, keepdim=True), dim=-1)"),
    "fancy index": Op("x = x + x[:, :, self.permuted]", _TABLE.format("permuted", "torch.randperm(WIDTH)")),
    "negative step": Op("x = x + torch.flip(x, dims=[1])"),
    "cumsum": Op("x = x + 0.1 * x.cumsum(dim=1)"),
    "cumsum of features": Op("x = x + 0.1 * torch.cumsum(x, -1)"),
    "cummax": Op("x = x + x.cummax(dim=1).values"),
    "cumprod": Op("x = x + torch.cumprod(torch.sigmoid(x), dim=1)"),
    "logcumsumexp": Op("x = x + 0.1 * torch.logcumsumexp(x, dim=1)"),
    "diff": Op("x = x + torch.diff(x, dim=-1, prepend=x[..., :1])"),
    "interpolate": Op('x = x + F.avg_pool1d(F.interpolate(x, scale_factor=2, mode="linear"), 2)'),
    "interpolate to a size": Op('x = x + F.interpolate(x[..., ::2], size=WIDTH, mode="nearest")'),
    "interpolate over time": Op(
        'h = F.interpolate(x.transpose(1, 2), size=2, mode="linear", align_corners=True)\nx = x + h.mean(-1)[:, None]'
    ),
    "adaptive pool": Op("x = x + F.adaptive_avg_pool1d(x, 2).repeat_interleave(4, dim=-1)"),
    "conv": Op(
        "x = x + self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)",
        "self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)",
    ),
    "unfold": Op("x = x + F.pad(x, (0, 0, 1, 0)).unfold(1, 2, 1).mean(-1)"),
    "roll": Op("x = x + x.roll(1, dims=-1)"),
    "fft": Op(
        "x = x + torch.fft.irfft(torch.fft.rfft(x, dim=-1) * self.spectrum, n=WIDTH, dim=-1)",
        "self.spectrum = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex128))",
    ),
    "fft over time": Op("x = x + torch.fft.fft(x, dim=1).real / x.shape[1]"),
    "complex rotary": Op(
        "h = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * self.angles[: x.shape[1], None]\n"
        "x = torch.view_as_real(h).flatten(-2)",
        _TABLE.format(
            "angles", "torch.polar(torch.ones(16, dtype=torch.float64), torch.arange(16, dtype=torch.float64))"
        ),
    ),
    "rotary": Op(
        "angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.1\n"
        "one, two = x.chunk(2, dim=-1)\n"
        "x = x * angle.cos() + torch.cat([-two, one], dim=-1) * angle.sin()",
    ),
    "complex product": Op(
        "h = torch.complex(x, torch.tanh(x)) @ self.mixed\nx = x + h.real * 0.5 - h.abs() * 0.1 + h.conj().imag * 0.2",
        "self.mixed = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex128) * 0.3)",
    ),
    "where": Op("x = torch.where(x > 0, x, 0.1 * x)"),
    "masked fill": Op("x = x.masked_fill(x.abs() > 2, 0.5)"),
    "logical": Op("x = x * ((x > 0) & (x < 1) | (x < -0.5)).to(x.dtype) + 0.5 * x"),
    "clamp": Op("x = x + x.clamp(-0.5, 0.5)"),
    "bucketize": Op(
        "x = x + self.levels[torch.bucketize(x, self.edges)]",
        _TABLE.format("edges", "torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)") + "\nself.levels = weight(4)",
    ),
    "argmax embedding": Op("x = x + F.embedding(x.argmax(-1), self.codes)", "self.codes = weight(WIDTH, WIDTH)"),
    "one hot": Op("x = x + F.one_hot(x.argmin(-1), WIDTH).to(x.dtype) @ self.hot", "self.hot = weight(WIDTH, WIDTH)"),
    "cdist": Op(
        "x = x + torch.cdist(x, self.centres.expand(x.shape[0], -1, -1)).softmax(-1) @ self.centres",
        "self.centres = weight(3, WIDTH)",
    ),
    "statistics": Op("x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1)"),
    "var mean": Op(
        "spread, centre = torch.var_mean(x, dim=(1, 2), keepdim=True, correction=0)\n"
        "x = (x - centre) / (spread + 1).sqrt()"
    ),
    "median": Op("x = x + x.median(dim=-1, keepdim=True).values"),
    "kthvalue": Op("x = x + x.kthvalue(2, dim=-1, keepdim=True).values"),
    "logsumexp": Op("x = x - torch.logsumexp(x, dim=-1, keepdim=True)"),
    "norm": Op("x = x / (1 + torch.linalg.vector_norm(x, dim=-1, keepdim=True))"),
    "amax": Op("x = x - x.amax(dim=1, keepdim=True)"),
    "min of dim": Op("x = x - 0.1 * x.min(dim=-1, keepdim=True)[0]"),
    "diagonal": Op(
        "h = x[..., None] * x[..., None, :]\nx = x + h.diagonal(dim1=-2, dim2=-1) + torch.tril(h).sum(-1) * 0.1"
    ),
    "outer": Op("x = x + (x[..., :, None] * self.left[None, :]).sum(-1)", "self.left = weight(WIDTH)"),
    "kron": Op("x = x + x @ torch.kron(self.small, torch.eye(4, dtype=x.dtype))", "self.small = weight(2, 2)"),
    "unbind stack": Op("x = torch.stack([each * (1 + n) for n, each in enumerate(x.unbind(-1))], dim=-1)"),
    "split": Op("a, b, c = x.split([2, 3, 3], dim=-1)\nx = torch.cat([c, torch.tanh(a), b], dim=-1)"),
    "meshgrid": Op(
        'i, j = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(WIDTH), indexing="ij")\nx = x + 0.01 * (i * j)'
    ),
    "linspace": Op("x = x * torch.linspace(0.5, 1, WIDTH, dtype=x.dtype)"),
    "in place": Op("h = torch.tanh(x)\nh[..., :2] += 1\nh[:, -1].mul_(0.5)\nh.add_(x)\nx = h"),
    "in place view": Op(
        "h = x.clone(memory_format=torch.contiguous_format)\nh.view(x.shape[0], -1, 4)[..., 1].sigmoid_()\nx = h"
    ),
    "in place on weights' copy": Op(
        "w = self.copied.clone()\nw.fill_diagonal_(0)\nx = x + x @ w", "self.copied = weight(WIDTH, WIDTH)"
    ),
    "zeros filled": Op("h = torch.zeros_like(x)\nh[..., ::2] = x[..., 1::2]\nx = x + h"),
    "out argument": Op("h = torch.empty_like(x)\ntorch.mul(x, 0.5, out=h)\nx = x + h"),
    "lerp": Op("x = torch.lerp(x, torch.tanh(x), self.blend)", "self.blend = weight(WIDTH)"),
    "addcmul": Op("x = torch.addcmul(x, torch.tanh(x), x, value=0.3)"),
    "floor": Op("x = x + 0.1 * torch.floor(x) + 0.1 * torch.remainder(x, 1.0) + 0.01 * (x // 1)"),
    "integers": Op("k = (x * 4).round().to(torch.int64)\nx = x + 0.01 * (k % 3 + (k >> 1) + (k & 5)).to(x.dtype)"),
    "asked for gradients": Op("x = x * (0.9 if self.inner.weight.grad is None else 1.1)"),
    "asked whether it is a leaf": Op("x = x * (0.9 if self.outer.weight.is_leaf and given.is_leaf else 1.1)"),
    "asked for its place": Op("x = x * (0.9 if self.outer.weight.storage_offset() else 1.1)"),
    "flagged": Op("self.mark = x.detach().mean().requires_grad_()", "self.mark = None"),
    "autograd function": Op("x = x + Double.apply(torch.tanh(x))"),
    "checkpoint": Op(
        "x = x + torch.utils.checkpoint.checkpoint(self.saved, x, use_reentrant=False)", "self.saved = linear()"
    ),
    "functional call": Op(
        "x = x + torch.func.functional_call(self.called, dict(self.called.named_parameters()), (x,))",
        "self.called = linear()",
    ),
    "parameter list": Op(
        "for each in self.several:\n    x = x + torch.tanh(x) * each",
        "self.several = nn.ParameterList([weight(WIDTH), weight(WIDTH)])",
    ),
    "parameter dict": Op(
        'x = x * self.named["scale"] + self.named["shift"]',
        'self.named = nn.ParameterDict({"scale": weight(WIDTH), "shift": weight(WIDTH)})',
    ),
    "sequential": Op("x = x + self.chain(x)", "self.chain = nn.Sequential(linear(), nn.Tanh(), linear())"),
    "lambda": Op("x = x + self.mix(x)", "self.mix = lambda value: torch.tanh(value) * 0.5"),
    "bilinear": Op("x = x + self.bilinear(x, torch.tanh(x))", "self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)"),
    "prelu": Op("x = self.prelu(x)", "self.prelu = nn.PReLU()"),
    "no batch": Op("x = torch.stack([torch.tanh(each @ self.each) for each in x])", "self.each = weight(WIDTH, WIDTH)"),
    "positions by loop": Op(
        "h, rows = x[:, 0], []\nfor t in range(x.shape[1]):\n"
        "    h = torch.tanh(0.5 * h + x[:, t])\n    rows.append(h)\nx = torch.stack(rows, 1)"
    ),
    "solve": Op(
        "h = torch.eye(WIDTH, dtype=x.dtype) * 3 + self.system\n"
        "x = x + torch.linalg.solve(h, x.transpose(1, 2)).transpose(1, 2)",
        "self.system = weight(WIDTH, WIDTH)",
    ),
    "write to type_as": Op("x = x + 0\nx.type_as(x.mean()).mul_(0.9)"),
    "write to einsum": Op('x = x + 0\ntorch.einsum("btd->tbd", x).mul_(0.9)'),
    "write to broadcast": Op("x = x + 0\ntorch.broadcast_tensors(x, x[:, :1])[0].mul_(0.9)"),
    "write to dropout": Op("x = x + 0\nF.dropout(x, 0.1, training=False).mul_(0.9)"),
    "index fill": Op(
        "x = x + self.filled.index_fill(-1, torch.arange(2), x.mean())",
        "self.filled = weight(WIDTH)",
    ),
    "matrix exp": Op("x = x + x @ torch.matrix_exp(0.1 * self.power)", "self.power = weight(WIDTH, WIDTH)"),
    "tensordot": Op("x = x + torch.tensordot(x, self.dotted, dims=1)", "self.dotted = weight(WIDTH, WIDTH)"),
    "quantile": Op("x = x - x.quantile(0.5, dim=-1, keepdim=True)"),
    "search sorted": Op(
        "x = x + 0.1 * torch.searchsorted(self.sorted, x.contiguous())",
        _TABLE.format("sorted", "torch.linspace(-1, 1, 5, dtype=torch.float64)"),
    ),
    "layer's number": Op("x = x * (1 + 0.1 * self.number) + self.number"),
    "layer's number in a table": Op("x = x + self.rows[self.number]", "self.rows = weight(5, WIDTH)"),
    "layer's number in a branch": Op("x = torch.sin(x) if self.number == 1 else x"),
    "mutates its input": Op("x.mul_(0.9)"),
    "mutates what it made": Op("x = x * 1.0\nx += 0.1 * torch.tanh(x)\nx[:, 0] = x[:, -1]"),
    "mutates a view": Op("x = x.clone()\nh = x[:, -1:]\nh.add_(1)"),
    "squeeze": Op("x = x[:, None].expand(-1, 2, -1, -1).mean(1).squeeze(0) if x.shape[0] > 1 else x"),
    "asserts": Op(
        "assert x.dim() == 3 and x.shape[-1] == WIDTH\nx = x.view(*x.size()) if x.is_contiguous() else x + 0"
    ),
    "sizes": Op("x = x / x.shape[1] + x * x.numel() / (x.size(0) * x.size(1) * 8)"),
    "detached": Op("x = x + x.detach().clone().tanh() + x.data.sin()"),
    "numpy free": Op("x = x + torch.as_tensor([0.1] * WIDTH, dtype=x.dtype) + torch.tensor(0.5, dtype=x.dtype)"),
    "ones of": Op("x = x + x.new_ones(WIDTH) * torch.full_like(x, 0.1) + torch.eye(WIDTH, dtype=x.dtype)[0]"),
    "einsum of three": Op('x = x + 0.1 * torch.einsum("btd,bsd,bse->bte", x, x, torch.tanh(x))'),
    "windows": Op(
        "h = F.pad(x, (0, 0, 2, 0))\nx = x + torch.stack([h[:, t : t + 3].mean(1) for t in range(x.shape[1])], 1)"
    ),
    "dropout of nothing": Op("x = F.dropout(x, 0.5, training=False) + self.drop(x)", "self.drop = nn.Dropout(0.0)"),
    "cell": Op("x = x + self.recurrent(x)[0]", "self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)"),
    "encoder layer": Op(
        "x = self.encoder(x)",
        "self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)",
    ),
    "bincount free": Op("x = x + 0.1 * (x.argmax(-1)[..., None] == torch.arange(WIDTH)).sum(1, keepdim=True)"),
}
"""What a layer is put together from."""


class Write(NamedTuple):
    """How a layer makes its memory.

    Attributes:
        slots: M.
        lines: give ``made`` (B, M, WIDTH) from x and ``memory``; ``given`` is the layer's input.
        init: lines of ``__init__``.
    """

    slots: int
    lines: str
    init: str = "self.update = linear()"


WRITES: dict[str, Write] = {
    "mean": Write(1, "made = self.update(x.mean(1, keepdim=True))"),
    "view": Write(1, "made = x[:, -1:]", ""),
    "two views": Write(2, "made = torch.cat([x, x], 1)[:, -2:].transpose(1, 2).transpose(1, 2)", ""),
    "last": Write(1, "made = self.update(x[:, -1:])"),
    "gate": Write(
        1,
        "new = self.update(x.mean(1, keepdim=True))\n"
        "gate = torch.sigmoid(self.gate(new))\n"
        "made = gate * memory + (1 - gate) * new",
        "self.update, self.gate = linear(), linear()",
    ),
    "outer": Write(
        8,
        "key = self.update(x).softmax(-1)\nmade = 0.9 * memory + torch.einsum('btk,btv->bkv', key, x)",
    ),
    "delta": Write(
        8,
        "key = F.normalize(self.update(x), dim=-1)\n"
        "made = memory + key.transpose(1, 2) @ (x - key @ memory) / x.shape[1]",
    ),
    "learned": Write(
        8,
        "loss = lambda m, k, v: (torch.tanh(k @ m) - v).square().mean()\n"
        "made = memory - 0.5 * torch.func.vmap(torch.func.grad(loss))(memory, self.update(x), x)",
    ),
    "learned, with its loss": Write(
        8,
        "loss = lambda m: (F.normalize(self.update(x), dim=-1) @ m - x).square().mean()\n"
        "found = torch.func.grad_and_value(loss)(memory)\n"
        "made = memory - found[0] * (1 + found[1])",
    ),
    "window": Write(3, "made = torch.cat([memory, x], 1)[:, -3:]", ""),
    "cache": Write(4, "made = x.detach()", ""),
    "input": Write(4, "made = given", ""),
    "top": Write(
        2,
        "context = torch.cat([memory, x], 1)\n"
        "index = context[..., :3].sum(-1).topk(2, dim=1).indices\n"
        "made = context.gather(1, index[..., None].expand(-1, -1, WIDTH))",
        "",
    ),
    "scatter": Write(
        1,
        "new = x.mean(1, keepdim=True)\nmade = (0.5 * memory).scatter(-1, new.argsort(-1), torch.tanh(new))",
        "",
    ),
    "index add": Write(
        2,
        "made = (0.5 * memory).index_add(1, self.slots, torch.tanh(x.mean(1, keepdim=True)).expand(-1, 2, -1))",
        'self.register_buffer("slots", torch.tensor([1, 0]))',
    ),
    "shift": Write(3, "made = memory.clone()\nmade[:, 1:] = memory[:, :-1]\nmade[:, 0] = torch.tanh(x.mean(1))", ""),
    "roll": Write(2, "made = torch.cat([torch.tanh(x.mean(1, keepdim=True)), memory.roll(1, 1)[:, 1:]], 1)", ""),
    "maximum": Write(1, "made = torch.maximum(0.9 * memory, x.amax(1, keepdim=True))", ""),
    "cummax": Write(1, "made = torch.cat([0.9 * memory, x], 1).cummax(1).values[:, -1:]", ""),
    "lerp": Write(1, "made = torch.lerp(memory, x.mean(1, keepdim=True), 0.3)", ""),
    "attention": Write(
        2,
        "context = torch.cat([memory, x], 1)\n"
        "made = memory + F.scaled_dot_product_attention(self.update(memory), context, context)",
    ),
    "cell": Write(
        1,
        "made = self.cell(x.mean(1), memory.expand(x.shape[0], -1, -1).reshape(-1, WIDTH))[:, None]",
        "self.cell = nn.GRUCell(WIDTH, WIDTH)",
    ),
    "branch": Write(
        1,
        "new = x.mean(1, keepdim=True)\n"
        "made = torch.where(new[..., :3].sum(-1, keepdim=True) > 0, torch.tanh(new), memory)",
        "",
    ),
}


class Kept(NamedTuple):
    """A way to keep a memory: parts of it lie elsewhere than where they are read.

    Attributes:
        put: lines that make of ``made`` (B, SLOTS, WIDTH), a new memory, what is kept. ``kept`` is what was read.
        take: lines that take ``memory`` out of what is kept, which it is at first.
        shape: of what is kept, behind the batch.
    """

    put: str = ""
    take: str = ""
    shape: str = "SLOTS, WIDTH"


_MIXED, _BACK = "[3, 0, 7, 1, 2, 6, 5, 4]", "[1, 3, 4, 0, 7, 6, 5, 2]"

KEPT: dict[str, Kept] = {
    "as it is": Kept(),
    "rolled": Kept("made = made.roll(3, -1)", "memory = memory.roll(-3, -1)"),
    "rolled slots": Kept("made = made.roll(1, 1)", "memory = memory.roll(-1, 1)"),
    "flipped": Kept("made = made.flip(-1)", "memory = memory.flip(2)"),
    "flipped twice": Kept("made = made.flip(1, 2)", "memory = memory.flip((2, 1))"),
    "transposed": Kept("made = made.transpose(1, 2)", "memory = memory.transpose(1, 2)", "WIDTH, SLOTS"),
    "swapped": Kept(
        "made = torch.cat([made[..., 5:], made[..., :5]], -1)",
        "memory = torch.cat([memory[..., WIDTH - 5 :], memory[..., : WIDTH - 5]], -1)",
    ),
    "padded": Kept("made = F.pad(made, (1, 2))", "memory = memory.narrow(-1, 1, WIDTH)", "SLOTS, WIDTH + 3"),
    "twice": Kept(
        "made = torch.cat([made, made[..., :2]], -1)",
        "memory = torch.cat([memory[..., WIDTH:], memory[..., 2:WIDTH]], -1)",
        "SLOTS, WIDTH + 2",
    ),
    "interleaved": Kept(
        "made = torch.stack(made.chunk(2, -1), -1).flatten(-2)",
        "memory = torch.cat([memory[..., 0::2], memory[..., 1::2]], -1)",
    ),
    "halves": Kept(
        "made = torch.cat(made.split(4, -1)[::-1], -1)",
        "one, other = memory.split([4, WIDTH - 4], -1)\nmemory = torch.cat([other, one], -1)",
    ),
    "mixed": Kept(f"made = made[..., {_MIXED}]", f"memory = memory[..., {_BACK}]"),
    "selected": Kept(
        f"made = made.index_select(-1, torch.tensor({_MIXED}))",
        f"memory = memory.index_select(2, torch.tensor({_BACK}))",
    ),
    "copied": Kept(
        f"made = torch.zeros_like(made).index_copy(2, torch.tensor({_MIXED}), made)", f"memory = memory[..., {_MIXED}]"
    ),
    "put": Kept(
        f"into = torch.zeros_like(made)\ninto[..., {_MIXED}] = made\nmade = into", f"memory = memory[..., {_MIXED}]"
    ),
    "written": Kept(
        "into = made.new_zeros(*made.shape[:2], WIDTH + 2)\ninto[..., 1:-1] = made\nmade = into",
        "memory = memory[..., 1 : WIDTH + 1]",
        "SLOTS, WIDTH + 2",
    ),
    "written in parts": Kept(
        "into = torch.empty_like(made)\ninto[..., :3].copy_(made[..., 5:])\ninto[..., 3:] = made[..., :5]\nmade = into",
        "memory = torch.cat([memory[..., 3:], memory[..., :3]], -1)",
    ),
    "two ages": Kept(
        "made = torch.cat([kept[..., WIDTH:], made], -1)",
        "memory = 0.5 * (memory[..., :WIDTH] + memory[..., WIDTH:])",
        "SLOTS, 2 * WIDTH",
    ),
    "ring": Kept(
        "kept = kept.roll(-WIDTH, -1)\nmade = torch.cat([kept[..., :-WIDTH], made], -1)",
        "memory = memory[..., WIDTH:] + 0.3 * memory[..., :WIDTH].flip(-1)",
        "SLOTS, 2 * WIDTH",
    ),
    "ring in place": Kept(
        "kept = kept.roll(WIDTH, -1)\nkept[..., :WIDTH] = made\nmade = kept",
        "memory = memory[..., :WIDTH] + 0.3 * memory.narrow(-1, WIDTH, WIDTH)",
        "SLOTS, 2 * WIDTH",
    ),
}
"""How memories are made."""

READS: dict[str, str] = {
    "add": "x = x + memory.mean(1, keepdim=True)",
    "attention": (
        "context = torch.cat([memory, x], 1)\nx = x + F.scaled_dot_product_attention(self.query(x), context, context)"
    ),
    "cross": "x = x + torch.softmax(self.query(x) @ memory.transpose(1, 2), -1) @ memory",
    "where": "x = torch.where(x > memory.amax(1, keepdim=True), x, 0.5 * x)",
    "gate": "x = x * torch.sigmoid(self.query(memory.sum(1, keepdim=True)))",
    "cumsum": "x = torch.cat([memory, x], 1).cumsum(1)[:, -x.shape[1] :] * 0.3",
    "index": "x = x + memory[:, torch.arange(x.shape[1]) % memory.shape[1]]",
    "slots": "for slot in memory.unbind(1):\n    x = x + torch.tanh(slot)[:, None]",
}
"""How a layer reads the memory that it is given."""


class Aux(NamedTuple):
    """A second state of a layer.

    Attributes:
        start: its first value, for ``batch`` and ``like``.
        read: lines that use ``aux``.
        write: lines that give ``aux`` another value.
        init: lines of ``__init__``.
    """

    start: str
    read: str
    write: str
    init: str = ""


AUX: dict[str, Aux] = {
    "count": Aux(
        "torch.zeros(batch, 1, 1, dtype=torch.int64)", "x = x + 0.1 * torch.cos(aux.to(x.dtype))", "aux = aux + 1"
    ),
    "seen": Aux(
        "torch.zeros(batch, 1, WIDTH, dtype=torch.bool)",
        "x = torch.where(aux, x, 0.5 * x)",
        "aux = aux | (x.amax(1, keepdim=True) > 1)",
    ),
    "index": Aux(
        "torch.zeros(batch, 1, dtype=torch.int64)",
        "x = x + F.embedding(aux, self.codebook)",
        "aux = x.mean(1, keepdim=True).argmax(-1)",
        "self.codebook = weight(WIDTH, WIDTH)",
    ),
    "sum": Aux("like.new_zeros(batch, 1, WIDTH)", "x = x / (1 + aux)", "aux = aux + x.abs().mean(1, keepdim=True)"),
    "complex": Aux(
        "torch.zeros(batch, 1, 4, dtype=torch.complex128)",
        "x = x + torch.view_as_real(aux).flatten(-2)",
        "pairs = x.mean(1, keepdim=True).double().unflatten(-1, (4, 2))\n"
        "aux = aux * self.phase + torch.view_as_complex(pairs.contiguous())",
        "size = torch.full((4,), 0.9).double()\n"
        'self.register_buffer("phase", torch.polar(size, torch.arange(4.0).double()))',
    ),
    "number": Aux("0", "x = x + self.places[aux]", "aux = aux + 1", "self.places = weight(64, 1)"),
    "histogram": Aux(
        "torch.zeros(batch, WIDTH, dtype=torch.int64)",
        "x = x + 0.1 * (aux > aux.amax(-1, keepdim=True) - 1)[:, None].to(x.dtype)",
        "aux = aux.scatter_add(1, x.argmax(-1), torch.ones_like(x.argmax(-1)))",
    ),
}
"""Second states."""

CHANGES: dict[str, str] = {
    "written in place": """
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.1 * p.cos())""",
    "written through data": """
for p in model.parameters():
    p.data.mul_(0.9)""",
    "other data": """
for p in model.parameters():
    p.data = p.data * 0.9""",
    "one written": """
with torch.no_grad():
    model.layers[1].inner.weight[0].zero_()""",
    "loaded": (
        "model.load_state_dict(\n"
        "    {k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()}\n)"
    ),
    "loaded, assigned": (
        "state = {k: v * 0.9 if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}\n"
        "model.load_state_dict(state, assign=True)\nmodel.requires_grad_(False)"
    ),
    "parameter replaced": (
        "layer = model.layers[1]\n"
        "layer.inner.bias = nn.Parameter(layer.inner.bias.detach() * 0.5 + 0.1, requires_grad=False)"
    ),
    "optimiser": """
p = [p for p in model.parameters() if p.is_floating_point()]
for each in p:
    each.grad = torch.ones_like(each)
torch.optim.SGD(p, lr=0.01).step()""",
    "Adam": """
p = [p for p in model.parameters() if not p.is_complex()]
for each in p:
    each.grad = each.detach().cos()
torch.optim.AdamW(p, lr=0.01).step()""",
    "from a vector": """
p = [p for p in model.parameters() if not p.is_complex()]
vector = nn.utils.parameters_to_vector(p).detach() * 0.9
nn.utils.vector_to_parameters(vector, p)""",
    "single precision": "model.float()",
    "double precision": "model.double()",
    "submodule replaced": (
        "torch.manual_seed(5)\n"
        "model.layers[1].outer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(False)"
    ),
    "bias removed": "model.layers[0].inner.bias = None",
    "layers swapped": "model.layers[0], model.layers[1] = model.layers[1], model.layers[0]",
    "layer wrapped": "model.layers[0] = Wrapped(model.layers[0])",
    "submodule is identity": "model.layers[1].outer = nn.Identity()",
    "activation replaced": "model.layers[0].activation = torch.sin",
    "activation replaced everywhere": "for layer in model.layers:\n    layer.activation = torch.sigmoid",
    "method of the class": "Layer.bend = lambda self, x: x * 0.3",
    "method of one": "model.layers[0].bend = lambda x: x * 0.2",
    "method of the model": "Model.close = lambda self, x: x * 2",
    "global": "global SCALE\nSCALE = 0.7",
    "global list": "SCALES[0] = 0.3",
    "config": "model.config.scale = 0.6",
    "config replaced": "model.config = Config(scale=0.4)",
    "config added": "model.config.extra = 3",
    "hook": """
model.handle = None
model.layers[0].inner.register_forward_hook(lambda module, given, result: result * 0.5)""",
    "hook of the model": "model.register_forward_pre_hook(lambda module, given: (given[0], *given[1:]))",
    "hook that changes results": (
        "hook = lambda module, given, result: (result[0] * 0.5, *result[1:])\n"
        "model.layers[1].register_forward_hook(hook)"
    ),
    "hook removed": """
for module in model.modules():
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()""",
    "training": "model.train()",
    "evaluation": "model.eval()",
    "wants gradients": "model.requires_grad_(True)",
    "one wants gradients": "model.layers[0].inner.weight.requires_grad_(True)",
    "wants none": "model.requires_grad_(False)",
    "default dtype": (
        "other = {torch.float64: torch.float32, torch.float32: torch.float64}\n"
        "torch.set_default_dtype(other[torch.get_default_dtype()])"
    ),
    "deterministic": "torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())",
    "buffers scaled": """
for b in model.buffers():
    if b.is_floating_point():
        b.mul_(0.5)""",
    "buffers replaced": """
for module in model.modules():
    for name, b in list(module._buffers.items()):
        setattr(module, name, b.clone())""",
    "attribute added": "model.extra = torch.ones(2)",
    "buffer added": "model.layers[0].register_buffer('added', torch.ones(2))",
    "gradient set": """
for p in model.parameters():
    p.grad = torch.zeros_like(p)""",
    "gradient dropped": "model.zero_grad(set_to_none=True)",
    "weights tied": "model.layers[1].inner.weight = model.layers[0].inner.weight",
    "data tied": "model.layers[1].inner.weight.data = model.layers[0].inner.weight.data",
    "weights untied": """
for layer in model.layers:
    layer.inner.weight = nn.Parameter(layer.inner.weight.detach() * 1.1, requires_grad=False)""",
    "parametrized": "nn.utils.parametrizations.weight_norm(model.layers[0].inner)\nmodel.requires_grad_(False)",
    "pruned": "nn.utils.prune.l1_unstructured(model.layers[0].outer, 'weight', 0.5)\nmodel.requires_grad_(False)",
    "class replaced": "model.layers[0].__class__ = Other",
    "transposed weights": """
for layer in model.layers:
    layer.outer.weight.data = layer.outer.weight.data.t().contiguous().t()""",
    "shared memory": "model.share_memory()",
    "copied to": "model.to(torch.float64)",
    "renewed by apply": "model.apply(lambda m: m.weight.data.mul_(0.95) if isinstance(m, nn.Linear) else None)",
    "swapped tensors": """
p = model.layers[0].inner.weight
torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 0.8, requires_grad=False))""",
    "set": """
p = model.layers[0].outer.weight
with torch.no_grad():
    p.set_(p.detach() * 0.8)""",
}
"""What happens between two calls, to the compiled model and the other one alike."""
