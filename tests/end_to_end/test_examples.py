"""The example models compute what their equations say, and behave as models of Hugging Face do."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import pytest
import torch
from casts import Float32CastsAsFloat64
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rmtc.examples
from rmtc.examples import armt_gpt2, armt_llama, rmt_llama, transformer_xl
from rmtc.examples.associative import AssociativeLayer
from rmtc.examples.text import token_ids

EXAMPLES = [
    pytest.param(module, id=module.__name__.rpartition(".")[2]) for module in (armt_llama, armt_gpt2, rmt_llama)
]
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "segment": 5, "memory": 2, "segments": 4}


def logits_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad(), Float32CastsAsFloat64() if model.dtype == torch.float64 else nullcontext():
        logits: Tensor = model(ids, attention_mask=mask).logits
    return logits


# The equations, one token of one row at a time.


def naive_features(x: Tensor, orders: int) -> Tensor:
    """phi(x) of a vector."""
    r = [max(e, 0.0) for e in x.tolist()] + [max(-e, 0.0) for e in x.tolist()]
    n = len(r)
    return torch.tensor([r[i] * r[(i - j) % n] for j in range(1, orders + 1) for i in range(n)], dtype=torch.float64)


class NaiveArmtLayer:
    """One row through an ARMT layer: ``run`` is the decoder layer, (T, D) to (T, D)."""

    def __init__(self, layer: AssociativeLayer, run: Callable[[Tensor], Tensor], orders: int) -> None:
        self.Wq, self.Wk, self.Wv = layer.query.weight, layer.key.weight, layer.value.weight
        self.Wb, self.b = layer.strength.weight[0], layer.strength.bias[0]
        self.M, self.run, self.orders = layer.memory_tokens, run, orders
        width, features = self.Wq.shape[1], 2 * orders * self.Wq.shape[0]
        self.A = torch.zeros(features, width, dtype=torch.float64)
        self.z = torch.zeros(features, dtype=torch.float64)
        self.first = True

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = []
        for h in hidden:
            if not self.first:
                q = naive_features(self.Wq @ h, self.orders)
                h = h + (q @ self.A) / (q @ self.z + 1e-5)
            rows.append(h)
        output = self.run(torch.stack(rows))
        A, z = self.A.clone(), self.z.clone()
        for x in output[len(output) - self.M :]:
            k, v = naive_features(self.Wk @ x, self.orders), self.Wv @ x
            beta = 1 / (1 + math.exp(-float(self.Wb @ x + self.b)))
            old, gamma = torch.zeros_like(v), 1.0
            if not self.first:
                old = (k @ self.A) / (k @ self.z + 1e-5)
                gamma = min(max(1 - float(k @ self.z + 1e-5) / (float(k @ k) + 1e-5), 0.0), 1.0)
            A += beta * torch.outer(k, v - old)
            z += gamma * k
        self.A, self.z, self.first = A, z, False
        return output


def naive_norm(x: Tensor, norm: Any) -> Tensor:
    weight: Tensor = norm.weight
    return weight * x / math.sqrt(float(x @ x) / len(x) + norm.variance_epsilon)


def naive_rotate(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    half = len(x) // 2
    cos, sin = torch.cos(position * frequencies), torch.sin(position * frequencies)
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def naive_llama_layer(layer: Any, frequencies: Tensor) -> Callable[[Tensor], Tensor]:
    """A Llama decoder layer on (T, D)."""
    attention, mlp = layer.self_attn, layer.mlp
    size, repeats = attention.head_dim, attention.num_key_value_groups

    def run(hidden: Tensor) -> Tensor:
        normed = [naive_norm(h, layer.input_layernorm) for h in hidden]
        q, k, v = (
            [(p.weight @ x).split(size) for x in normed] for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        output = []
        for t, h in enumerate(hidden):
            heads = []
            for head in range(len(q[t])):
                at = naive_rotate(q[t][head], t, frequencies)
                scores = [at @ naive_rotate(k[u][head // repeats], u, frequencies) for u in range(t + 1)]
                weights = torch.softmax(torch.stack(scores) / math.sqrt(size), dim=0)
                heads.append(weights @ torch.stack([v[u][head // repeats] for u in range(t + 1)]))
            h = h + attention.o_proj.weight @ torch.cat(heads)
            x = naive_norm(h, layer.post_attention_layernorm)
            gate = mlp.gate_proj.weight @ x
            output.append(h + mlp.down_proj.weight @ (gate * torch.sigmoid(gate) * (mlp.up_proj.weight @ x)))
        return torch.stack(output)

    return run


def test_associative_layer_follows_the_equations() -> None:
    torch.manual_seed(0)
    width, orders, batch = 6, 3, 2
    inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).double()
    layer = AssociativeLayer(inner, width, memory_tokens=3, key_size=4, orders=orders).double()
    with torch.no_grad():
        layer.strength.bias.normal_()
        rows = [NaiveArmtLayer(layer, inner, orders) for _ in range(batch)]
        for tokens in (7, 7, 7, 4):
            hidden = torch.randn(batch, tokens, width, dtype=torch.float64)
            output = layer(hidden)
            assert layer.A is not None and layer.z is not None
            torch.testing.assert_close(
                output, torch.stack([r(h) for r, h in zip(rows, hidden, strict=True)]), rtol=1e-10, atol=1e-12
            )
            torch.testing.assert_close(layer.A, torch.stack([r.A for r in rows]), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(layer.z, torch.stack([r.z for r in rows]), rtol=1e-10, atol=1e-12)


def test_associative_layer_stops_the_gradient_of_the_correction() -> None:
    torch.manual_seed(0)
    layer = AssociativeLayer(nn.Identity(), 6, memory_tokens=2, key_size=4, orders=3).double()
    layer.A, layer.z = torch.rand(24, 6).double()[None], 1e-3 * torch.rand(24).double()[None]
    tokens = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    before = layer.z
    layer.write(tokens)
    assert layer.z is not None
    k = torch.stack([naive_features(layer.key.weight @ x, 3) for x in tokens[0]])
    gamma = ((layer.z - before)[0].sum() / k.sum()).item()
    assert 0 < gamma <= 1
    # with gamma held constant, z is quadratic in the tokens along a ray from the origin
    (gradient,) = torch.autograd.grad(layer.z.sum(), tokens)
    torch.testing.assert_close((gradient * tokens).sum(), 2 * (layer.z - before).sum())


def test_armt_llama_follows_the_equations() -> None:
    model, (ids,) = armt_llama.build(**SMALL, kv_heads=1, key_size=4, batch=2, dtype="float64")
    ids = ids[:, :-2]  # the last segment has 3 of 5 tokens
    logits = logits_of(model, ids)
    llama = model.model
    with torch.no_grad():
        for row, text in enumerate(ids):
            layers = []
            for layer in llama.layers:
                assert isinstance(layer, AssociativeLayer)
                layers.append(NaiveArmtLayer(layer, naive_llama_layer(layer.layer, llama.rotary_emb.inv_freq), 3))
            expected = []
            for segment in text.split(SMALL["segment"]):
                hidden = torch.cat([llama.embed_tokens.weight[segment], model.memory])
                for run in layers:
                    hidden = run(hidden)
                expected += [model.lm_head.weight @ naive_norm(h, llama.norm) for h in hidden[: len(segment)]]
            torch.testing.assert_close(logits[row], torch.stack(expected), rtol=1e-9, atol=1e-10)
            for layer, run in zip(llama.layers, layers, strict=True):
                assert isinstance(layer, AssociativeLayer) and layer.A is not None and layer.z is not None
                torch.testing.assert_close(layer.A[row], run.A, rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(layer.z[row], run.z, rtol=1e-9, atol=1e-10)


def test_armt_gpt2_with_an_empty_memory_is_gpt2_on_every_segment() -> None:
    model, (ids,) = armt_gpt2.build(**SMALL, batch=2, dtype="float64")
    inner = {name.replace(".layer.", "."): value for name, value in model.state_dict().items()}
    plain = GPT2LMHeadModel(
        GPT2Config(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    ).double()
    extra = plain.eval().load_state_dict(inner, strict=False)
    assert not extra.missing_keys
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, AssociativeLayer):
                layer.value.weight.zero_()
        ids = ids[:, :-2]
        expected = []
        for segment in ids.split(SMALL["segment"], dim=1):
            inputs = torch.cat([plain.transformer.wte(segment), model.memory.expand(2, -1, -1)], dim=1)
            expected.append(plain(inputs_embeds=inputs).logits[:, : segment.shape[1]])
    torch.testing.assert_close(logits_of(model, ids), torch.cat(expected, dim=1), rtol=1e-10, atol=1e-12)


def test_rmt_carries_the_top_of_one_segment_to_the_bottom_of_the_next() -> None:
    model, (ids,) = rmt_llama.build(**SMALL, batch=2, dtype="float64")
    plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"}))
    plain.double().eval().load_state_dict({k: v for k, v in model.state_dict().items() if k != "memory"})
    ids = ids[:, :-2]
    expected = []
    with torch.no_grad(), Float32CastsAsFloat64():
        memory = model.memory.expand(2, -1, -1)
        for segment in ids.split(SMALL["segment"], dim=1):
            inputs = torch.cat([memory, plain.model.embed_tokens(segment), memory], dim=1)
            output = plain(inputs_embeds=inputs, output_hidden_states=True)
            assert output.hidden_states is not None and output.logits is not None
            memory = output.hidden_states[-1][:, -2:]
            expected.append(output.logits[:, 2:-2])
    torch.testing.assert_close(logits_of(model, ids), torch.cat(expected, dim=1), rtol=1e-10, atol=1e-12)


def naive_layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return norm.weight * centred / torch.sqrt(centred.square().mean() + norm.eps) + norm.bias


class NaiveXLLayer:
    """One row through a Transformer-XL layer, a token at a time (arXiv 1901.02860, section 3.3, with norms before)."""

    def __init__(self, layer: transformer_xl.TransformerXLLayer, frequencies: Tensor, kept: int) -> None:
        self.layer, self.frequencies, self.kept = layer, frequencies, kept
        self.memory: list[Tensor] = []

    def __call__(self, hidden: list[Tensor]) -> list[Tensor]:
        attention, mlp = self.layer.attention, list[Any](self.layer.mlp)
        context = [*self.memory, *hidden]
        normed = [naive_layer_norm(x, self.layer.attention_norm) for x in context]
        size = len(hidden[0]) // attention.heads
        output = []
        for i in range(len(self.memory), len(context)):
            q = attention.query.weight @ normed[i]
            values = []
            for head in range(attention.heads):
                part = slice(head * size, (head + 1) * size)
                u, v = attention.content_bias[head, 0], attention.position_bias[head, 0]
                scores = []
                for j in range(i + 1):
                    angles = (i - j) * self.frequencies
                    k = attention.key.weight @ normed[j]
                    r = attention.position.weight @ torch.cat([torch.sin(angles), torch.cos(angles)])
                    scores.append(q[part] @ k[part] + q[part] @ r[part] + u @ k[part] + v @ r[part])
                weights = torch.softmax(torch.stack(scores) / math.sqrt(size), dim=0)
                seen = zip(weights, normed[: i + 1], strict=True)
                values.append(sum((w * (attention.value.weight @ x)[part] for w, x in seen), torch.zeros(())))
            h = context[i] + attention.output.weight @ torch.cat(values)
            inner = mlp[0].weight @ naive_layer_norm(h, self.layer.mlp_norm) + mlp[0].bias
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            output.append(h + mlp[2].weight @ inner + mlp[2].bias)
        self.memory = context[-self.kept :]
        return output


@pytest.mark.parametrize("memory", [3, 5, 12], ids=["less than a segment", "a segment", "two segments and more"])
def test_transformer_xl_follows_the_equations(memory: int) -> None:
    model, (ids,) = transformer_xl.build(**SMALL | {"memory": memory}, batch=2, dtype="float64")
    text, more = ids[:, :13], ids[:, 13:]  # the last segment has 3 of 5 tokens, and another text goes on from there
    with torch.no_grad():
        first = model(text)
        second = model(more, first.memories)
        for row in range(2):
            layers = [NaiveXLLayer(layer, model.frequencies, memory) for layer in model.layers]  # type: ignore[arg-type]
            for found, given in ((first, text), (second, more)):
                expected = []
                for segment in given[row].split(SMALL["segment"]):
                    hidden = list(model.embedding.weight[segment])
                    for run in layers:
                        hidden = run(hidden)
                    expected += [model.head.weight @ naive_layer_norm(h, model.norm) for h in hidden]
                torch.testing.assert_close(found.logits[row], torch.stack(expected), rtol=1e-10, atol=1e-12)
                for kept, run in zip(found.memories, layers, strict=True):
                    torch.testing.assert_close(kept[row], torch.stack(run.memory), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_memory_reaches_later_segments_and_no_earlier_ones(example: ModuleType) -> None:
    model, (ids,) = example.build(**SMALL, dtype="float64")
    changed = ids.clone()
    changed[:, 5] += 1  # the first token of the second of four segments
    difference = (logits_of(model, changed) - logits_of(model, ids)).abs().amax(dim=(0, 2))
    assert difference[:5].max() < 1e-12
    assert difference[15:].min() > 1e-4


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_call_starts_from_an_empty_memory(example: ModuleType) -> None:
    model, (ids,) = example.build(**SMALL)
    first = logits_of(model, ids)
    logits_of(model, ids.flip(1))
    torch.testing.assert_close(logits_of(model, ids), first, rtol=0, atol=0)


@pytest.mark.parametrize("example", EXAMPLES[:2])
def test_the_final_memory_is_kept_until_it_is_reset(example: ModuleType) -> None:
    model, (ids,) = example.build(**SMALL, key_size=4, batch=3)
    layers = [module for module in model.modules() if isinstance(module, AssociativeLayer)]
    assert len(layers) == 2 and all(layer.A is None and layer.z is None for layer in layers)
    logits_of(model, ids)
    for layer in layers:
        assert layer.A is not None and layer.A.shape == (3, 24, 16)
        assert layer.z is not None and layer.z.shape == (3, 24)
    model.reset_memory()
    assert all(layer.A is None and layer.z is None for layer in layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_padding_changes_no_token_of_the_text(example: ModuleType, attention: str) -> None:
    model, (ids,) = example.build(**SMALL, batch=2, dtype="float64", attention=attention)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0  # the third segment has one token, the fourth none
    padded = logits_of(model, ids, mask)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:1], logits_of(model, ids[:1]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(padded[1:, :11], logits_of(model, ids[1:, :11]), rtol=1e-9, atol=1e-11)
    # and what is under the padding does not matter
    other = ids.clone()
    other[1, 11:] = 0
    torch.testing.assert_close(logits_of(model, other, mask)[1, :11], padded[1, :11], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("example", EXAMPLES)
def test_memory_tokens_attend_the_text_and_not_the_padding(example: ModuleType) -> None:
    model, (ids,) = example.build(**SMALL, dtype="float64")
    mask = torch.ones_like(ids)
    mask[:, :2] = 0  # padded on the left: all later segments see is what the memory took from the first
    other = ids.clone()
    other[:, :2] += 1
    plain, masked = logits_of(model, ids), logits_of(model, ids, mask)
    torch.testing.assert_close(logits_of(model, other, mask)[:, 2:], masked[:, 2:], rtol=1e-9, atol=1e-11)
    assert (masked - plain)[:, 5:].abs().max() > 1e-4


@pytest.mark.parametrize("length", [1, 5, 6])
@pytest.mark.parametrize("example", EXAMPLES)
def test_any_length(example: ModuleType, length: int) -> None:
    model, (ids,) = example.build(**SMALL, batch=2, dtype="float64")
    expected = logits_of(model, ids)[:, :length]
    torch.testing.assert_close(logits_of(model, ids[:, :length]), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("example", EXAMPLES)
def test_loss_is_the_shifted_cross_entropy(example: ModuleType) -> None:
    model, (ids,) = example.build(**SMALL, batch=2)
    labels = ids.clone()
    labels[1, 7:] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    losses = [
        torch.logsumexp(output.logits[row, t], dim=0) - output.logits[row, t, labels[row, t + 1]]
        for row in range(2)
        for t in range(ids.shape[1] - 1)
        if labels[row, t + 1] != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_parameter_takes_part(example: ModuleType) -> None:
    model, (ids,) = example.build(**SMALL)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.numel() == 1 or parameter.std() > 0, name


@pytest.mark.parametrize("example", EXAMPLES)
def test_save_and_load(example: ModuleType, tmp_path: Path) -> None:
    model, (ids,) = example.build(**SMALL)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first").eval()
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "second")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "model.safetensors" in files
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name

    eager = type(model).from_pretrained(tmp_path / "first", attn_implementation="eager").eval()
    assert eager.config._attn_implementation == "eager" and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits_of(eager, ids), logits_of(model, ids), rtol=1e-3, atol=1e-3)

    half = type(model).from_pretrained(tmp_path / "first", dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = half(ids).logits
    assert logits.dtype == torch.bfloat16
    error = (logits.double() - logits_of(model, ids)).norm() / logits_of(model, ids).norm()
    assert error < 0.1


@pytest.mark.parametrize(
    "kind, base", [(armt_llama.ArmtLlamaForCausalLM, armt_llama.ArmtLlamaConfig), (armt_gpt2.ArmtGPT2ForCausalLM, None)]
)
def test_a_new_model_has_a_memory_that_holds_something(kind: Any, base: Any) -> None:
    sizes: dict[str, Any] = {"vocab_size": 32, "segment_size": 4, "memory_tokens": 2}
    if base is not None:
        config = base(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **sizes)
    else:
        config = armt_gpt2.ArmtGPT2Config(n_embd=64, n_layer=1, n_head=2, eos_token_id=None, bos_token_id=None, **sizes)
    model = kind(config)
    (layer,) = (module for module in model.modules() if isinstance(module, AssociativeLayer))
    for projection, gain in ((layer.query, 1), (layer.key, 1), (layer.value, 0.1)):
        assert 0.9 < projection.weight.std() * math.sqrt(64) / gain < 1.1
    assert 0.01 < model.memory.std() < 0.03


def test_the_positions_of_gpt2_limit_a_segment() -> None:
    armt_gpt2.build(layers=1, segment=4, memory=2)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "segment_size": 4, "memory_tokens": 2, "n_positions": 5}
    with pytest.raises(
        ValueError, match=r"segment_size .* = 6 is more than n_positions = 5: make the segments shorter"
    ):
        armt_gpt2.ArmtGPT2ForCausalLM(armt_gpt2.ArmtGPT2Config(**sizes))


@pytest.mark.parametrize("example", EXAMPLES)
def test_tracing_under_fake_tensors_gives_the_same_model(example: ModuleType) -> None:
    model, (ids,) = example.build(**SMALL | {"segments": 3}, batch=2)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def call(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, tensors, (ids,)).logits
        return logits

    with torch.no_grad():
        traced = make_fx(call, tracing_mode="fake", pre_dispatch=True)(tensors, ids)
        other = token_ids(ids.numel() + 7)[:, 7:].view_as(ids)
        torch.testing.assert_close(traced(tensors, other), model(other).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("example", EXAMPLES)
def test_build_is_reproducible_and_leaves_the_random_state(example: ModuleType) -> None:
    before = torch.get_rng_state()
    model, _ = example.build(**SMALL)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again, _ = example.build(**SMALL)
    other, _ = example.build(**SMALL, seed=1)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert not torch.equal(value, other.state_dict()[name]), name


def test_token_ids_are_bytes_of_a_text() -> None:
    ids = token_ids(100, batch=3)
    assert ids.shape == (3, 100) and ids.dtype == torch.int64
    assert bytes(ids.flatten().tolist()) in "\n".join(topics[name] for name in sorted(topics)).encode()
    long = token_ids(1_000_000)
    assert long.shape == (1, 1_000_000) and long.min() >= 0 and long.max() <= 255


def test_the_examples_know_nothing_of_the_compiler() -> None:
    folder = Path(rmtc.examples.__path__[0])
    for path in folder.glob("*.py"):
        if path.name in ("answer.py", "evaluate.py", "train_armt.py"):  # which compile one of them
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] != "rmtc" or name.startswith("rmtc.examples."), (path.name, name)


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, rmtc.examples; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(rmtc.examples.__path__[0]).parents[1])


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("size", ["layers", "segments", "width", "heads"])
def test_a_size_of_none_is_told(example: Any, size: str) -> None:
    with pytest.raises(ValueError, match=f"{size} must be a whole number of at least 1, got 0"):
        example.build(**{size: 0})
