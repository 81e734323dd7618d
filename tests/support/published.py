"""Published models, as their authors wrote them, held against eager: for docs/models.md.

Each is built small, with random weights in float64 (zero-initialised projections would hide a memory), compiled with
``schedule="shortest"``, and called with 3 and 7 segments, a short last segment and a batch of 2, each twice. Results
and what is left in the model must be eager's, and every call must run by its schedule.

Packages are taken as they are installed (``pip install --no-deps xlstm mlstm_kernels memorizing-transformers-pytorch
einops-exts joblib faiss-cpu x-transformers einx frozendict loguru hyper-connections torch-einops-utils
yet-another-retnet infini-transformer-pytorch compressive-transformer-pytorch mogrifier memory-transformer-xl``).
Repositories are cloned by hand. Those of ARMT, RMT and PRMT need transformers 4.44
(``pip install "transformers==4.44.2" "numpy<2.3"``).

    python tests/support/published.py x-transformers
    python tests/support/published.py armt --checkout ../associative-recurrent-memory-transformer --over gpt2 --sliding
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import differences, leaves
from torch import Tensor, nn

import rmtc

SEGMENT, WORDS, LAYERS = 6, 37, 3
CALLS = {"S = 3": (1, 18), "S = 7": (1, 42), "short last segment": (1, 39), "batch 2": (2, 30)}

Options = argparse.Namespace
Call = Callable[[Any, Tensor], Any]


class Loop(nn.Module):
    """The caller's loop over the segments of a text, with what one call leaves handed to the next.

    Args:
        net: the published model.
        step: ``(net, piece, number, memories) -> (output, memories)``.
        dim: of the text.
    """

    def __init__(self, net: nn.Module, step: Callable[..., Any], dim: int = 1) -> None:
        super().__init__()
        self.net, self.step, self.dim = net, step, dim

    def forward(self, text: Tensor) -> tuple[Tensor, Any]:
        outputs, memories = [], None
        for number, piece in enumerate(text.split(SEGMENT, dim=self.dim)):
            output, memories = self.step(self.net, piece, number, memories)
            outputs.append(output)
        return torch.cat(outputs, dim=self.dim), memories


def plainly(model: Any, text: Tensor) -> Any:
    return model(text)


def masked(options: Options) -> Call:
    def call(model: Any, text: Tensor) -> Any:
        return model(text, labels=text if options.labels else None, attention_mask=torch.ones_like(text))

    return call


def base_model(over: str) -> tuple[nn.Module, str]:
    """A language model of transformers, and the path of its list of layers."""
    import transformers as t

    width: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    if over == "gpt2":
        config: Any = t.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64)
        return t.GPT2LMHeadModel(config), "transformer.h"
    common = {"vocab_size": WORDS, "num_hidden_layers": LAYERS, "max_position_embeddings": 64, **width}
    if over == "neox":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**common)), "gpt_neox.layers"
    return t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **common)), "model.layers"


def armt(options: Options) -> tuple[nn.Module, Call]:
    import accelerate  # noqa: F401  # looks for wandb

    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # imported, and used by nobody
    from modeling_amt.language_modeling import AssociativeMemoryCell, AssociativeRecurrentWrapper

    base, layers = base_model(options.over)
    cell = AssociativeMemoryCell(base, 2, 4, layers_attr=layers, wrap_pos=options.over == "gpt2")
    call = masked(options)

    def sliding(model: Any, text: Tensor) -> Any:
        return model(text, attention_mask=torch.ones_like(text), sliding_window=True)

    def generating(model: Any, text: Tensor) -> Any:
        return model.generate(text, torch.ones_like(text), max_new_tokens=5, pad_token_id=0)

    alignment = "right" if options.right else "left"
    wrapper = AssociativeRecurrentWrapper(cell, segment_size=SEGMENT, segment_alignment=alignment)
    return wrapper, sliding if options.sliding else generating if options.generate else call


def rmt(options: Options) -> tuple[nn.Module, Call]:
    from modeling_rmt.language_modeling import MemoryCell, RecurrentWrapper

    return RecurrentWrapper(MemoryCell(base_model(options.over)[0], 2), segment_size=SEGMENT), masked(options)


def prmt(options: Options) -> tuple[nn.Module, Call]:
    from lm_parallel_mem import MemoryCell, RecurrentWrapper

    base, layers = base_model(options.over)
    cell = MemoryCell(base, 2, layers_attr=layers, wrap_pos=options.over == "gpt2")
    return RecurrentWrapper(cell, segment_size=SEGMENT), masked(options)


def compressive(options: Options) -> tuple[nn.Module, Call]:
    from compressive_transformer_pytorch import CompressiveTransformer

    net = CompressiveTransformer(num_tokens=WORDS, dim=16, seq_len=SEGMENT, depth=LAYERS, heads=2, cmem_ratio=3)

    def step(net: Any, piece: Tensor, number: int, memories: Any) -> Any:
        output, left, _ = net(piece, memories=memories)
        return output, left

    return Loop(net, step), plainly


def memory_transformer_xl(options: Options) -> tuple[nn.Module, Call]:
    from memory_transformer_xl import MemoryTransformerXL

    layers = [LAYERS] if options.top else None
    net = MemoryTransformerXL(
        num_tokens=WORDS, dim=16, seq_len=SEGMENT, depth=LAYERS, heads=2, memory_layers=layers, num_mem_kv=2
    )
    return Loop(net, lambda net, piece, number, memories: net(piece, memories=memories)), plainly


def transformer_xl(options: Options) -> tuple[nn.Module, Call]:
    torch.version.cuda = torch.version.cuda or "12.0"  # which the repository reads
    from mem_transformer import MemTransformerLM

    net = MemTransformerLM(WORDS, LAYERS, 2, 16, 8, 24, 0.0, 0.0, tgt_len=SEGMENT, mem_len=SEGMENT, ext_len=0)
    for bias in (net.r_w_bias, net.r_r_bias):  # made of memory as it is, for the repository's train.py to fill
        nn.init.normal_(bias, std=0.02)

    def step(net: Any, piece: Tensor, number: int, memories: Any) -> Any:
        loss, *left = net(piece, piece, *(memories or ()))
        return loss, left

    return Loop(net, step, dim=0), lambda model, text: model(text.t().contiguous())


def x_transformers(options: Options) -> tuple[nn.Module, Call]:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=LAYERS, heads=2, attn_dim_head=8, rel_pos_bias=True)
    net = TransformerWrapper(
        num_tokens=WORDS,
        max_seq_len=SEGMENT,
        max_mem_len=SEGMENT,
        shift_mem_down=int(options.shift),
        attn_layers=layers,
    )
    return Loop(net, lambda net, piece, number, mems: net(piece, mems=mems, return_mems=True)), plainly


def xlstm(options: Options) -> tuple[nn.Module, Call]:
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    kernels = {"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native"}
    config = xLSTMLargeConfig(
        embedding_dim=16,
        num_heads=2,
        num_blocks=LAYERS,
        vocab_size=WORDS,
        return_last_states=True,
        mode="inference",
        step_kernel="native",
        chunk_size=SEGMENT,
        **kernels,
    )
    return Loop(xLSTMLarge(config), lambda net, piece, number, states: net(piece, states)), plainly


def memorizing(options: Options) -> tuple[nn.Module, Call]:
    from memorizing_transformers_pytorch import MemorizingTransformer

    net = MemorizingTransformer(
        num_tokens=WORDS,
        dim=16,
        depth=LAYERS,
        dim_head=8,
        heads=2,
        memorizing_layers=(),
        xl_max_memories=SEGMENT,
        shift_xl_memories_down=int(options.shift),
    )
    return Loop(net, lambda net, piece, number, mems: net(piece, [], mems)), plainly


def xlnet(options: Options) -> tuple[nn.Module, Call]:
    from transformers import XLNetConfig, XLNetModel

    net = XLNetModel(XLNetConfig(vocab_size=WORDS, d_model=16, n_layer=LAYERS, n_head=2, d_inner=24, mem_len=SEGMENT))

    def step(net: Any, piece: Tensor, number: int, memories: Any) -> Any:
        found = net(piece, mems=memories, use_mems=True)
        return found.last_hidden_state, found.mems

    return Loop(net, step), plainly


def retnet(options: Options) -> tuple[nn.Module, Call]:
    from yet_another_retnet.retnet import RetNet

    net = RetNet(WORDS, d_model=16, nhead=2, num_layers=LAYERS, dim_feedforward=24, dropout=0.0)

    def step(net: Any, piece: Tensor, number: int, states: Any) -> Any:
        return net.forward_chunkwise(piece, start_idx=number * SEGMENT, prev_states=states or ())

    return Loop(net, step), plainly


def infini(options: Options) -> tuple[nn.Module, Call]:
    from infini_transformer_pytorch import InfiniTransformer

    net = InfiniTransformer(
        num_tokens=WORDS, dim=16, depth=LAYERS, dim_head=8, heads=2, use_mem_delta_rule=options.delta
    )

    def step(net: Any, piece: Tensor, number: int, memories: Any) -> Any:
        output, _, left = net(piece, past_memories=memories, return_new_memories=True)
        return output, left

    return Loop(net, step), plainly


class Titan(nn.Module):
    """Layers of a neural memory, which learns by gradient steps while it reads, and an MLP."""

    def __init__(self) -> None:
        from titans_pytorch import NeuralMemory

        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
        self.memories = nn.ModuleList(NeuralMemory(dim=16, chunk_size=SEGMENT) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(LAYERS))


def titans(options: Options) -> tuple[nn.Module, Call]:
    def step(net: Any, piece: Tensor, number: int, states: Any) -> Any:
        hidden, left = net.embed(piece), []
        for layer, (memory, mlp) in enumerate(zip(net.memories, net.mlps, strict=True)):
            read, state = memory(hidden, state=states[layer] if states else None)
            left.append(state)
            hidden = hidden + read
            hidden = hidden + mlp(hidden)
        return net.head(hidden), left

    return Loop(Titan(), step), plainly


def infini_attention(options: Options) -> tuple[nn.Module, Call]:
    from infini_attention.transformer import EncoderDecoderTransformer

    net = EncoderDecoderTransformer(LAYERS, 1, WORDS, WORDS, 0, 0, 64, 16, 8, 2, 2, 24, 0.0, options.delta)

    def step(net: Any, piece: Tensor, number: int, memories: Any) -> Any:
        if not number:
            net.clear_memory()
        hidden = net.pe(net.src_embedding(piece) * net.scale)
        for block in net.encoders:
            hidden, _ = block(hidden)
        return hidden, None

    return Loop(net, step), plainly


MODELS: dict[str, tuple[Callable[[Options], tuple[nn.Module, Call]], str]] = {
    "armt": (armt, ""),
    "rmt": (rmt, ""),
    "prmt": (prmt, "modeling_rmt"),
    "compressive-transformer": (compressive, ""),
    "memory-transformer-xl": (memory_transformer_xl, ""),
    "transformer-xl": (transformer_xl, "pytorch"),
    "x-transformers": (x_transformers, ""),
    "xlstm": (xlstm, ""),
    "memorizing-transformers": (memorizing, ""),
    "xlnet": (xlnet, ""),
    "retnet": (retnet, ""),
    "infini-transformer": (infini, ""),
    "titans": (titans, ""),
    "infini-attention": (infini_attention, "src"),
}
"""What makes each model and calls it, and where in a checkout its packages are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--checkout", type=Path, help="of the repository, for models that are in no package")
    parser.add_argument("--over", choices=("llama", "gpt2", "neox"), default="gpt2", help="the model below ARMT or RMT")
    for name, text in (
        ("sliding", "ARMT with a sliding window"),
        ("labels", "ARMT with labels, whose losses are results"),
        ("right", "ARMT with texts that are cut from their end: a short segment is the first one"),
        ("generate", "ARMT's generate, whose loop over all segments but the last is to run by its schedule"),
        ("shift", "memories of the layer above"),
        ("delta", "the delta rule of Infini-attention"),
        ("top", "Memory Transformer-XL whose last layer alone has memories"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = parser.parse_args()
    make, folder = MODELS[options.model]
    if options.checkout is not None:
        sys.path[:0] = [str(options.checkout / folder), str(options.checkout / folder / "utils")]
    torch.set_default_dtype(torch.float64)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model, call = make(options)
        model.double().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        models.append(model)
    eager, own = models
    fast: Any = rmtc.compile(own, schedule="shortest", strict=True)
    refused = list[str]()
    with torch.no_grad():
        if not options.generate:
            print(str(call(rmtc.explain(eager), torch.zeros(1, 42, dtype=torch.long))).splitlines()[0])
        for name, (batch, length) in CALLS.items():
            tokens = torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(length))
            for _ in range(2):
                stats = rmtc.stats(fast.generate if options.generate else fast)
                expected, runs = call(eager, tokens), stats.runs
                try:
                    found = call(fast, tokens)
                except rmtc.RmtcError as error:
                    refused.append(f"{name}: {error}")
                    break
                # Each copy of a model has functions of its own.
                functions = {place for place, value in leaves(own) if isinstance(value, types.FunctionType)}
                wrong = differences(found, expected)
                wrong += [place for place in differences(own, eager) if place not in functions]
                how = "by the schedule" if stats.runs == runs + 1 else "not by the schedule"
                print(f"{name}: {wrong or 'as eager'}, {how}")
    if refused:
        sys.exit("\n".join(refused))


if __name__ == "__main__":
    main()
