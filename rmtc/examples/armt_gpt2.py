"""ARMT over GPT-2: every block keeps an associative memory from segment to segment; positions restart in each.

The loop over the segments is in armt.py.

Shapes: B batch, N tokens of the text, T tokens of a segment with memory, D width, M memory tokens, V vocabulary,
K memory features.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2Model, GPT2PreTrainedModel

from rmtc.examples.armt import ArmtForCausalLM
from rmtc.examples.associative import AssociativeLayer, MemoryProjection
from rmtc.examples.text import check_sizes, token_ids

__all__ = ["ArmtGPT2Config", "ArmtGPT2ForCausalLM", "ArmtGPT2Model", "build"]


class ArmtGPT2Config(GPT2Config):
    """GPT-2's configuration and the memory's.

    Attributes:
        segment_size: tokens of the text a segment; with the memory tokens, at most ``n_positions``.
        memory_tokens: M, at least 1.
        memory_key_size: width of the memory's keys and queries.
        memory_orders: rotations in the memory's features, K = 2 * memory_orders * memory_key_size.
    """

    model_type = "armt_gpt2"

    segment_size: int = 896
    memory_tokens: int = 128
    memory_key_size: int = 64
    memory_orders: int = 3


class ArmtGPT2Model(GPT2Model):
    """GPT-2 over one segment, its blocks wrapped with their memories.

    Raises:
        ValueError: if there are fewer positions than a segment and its memory tokens take.
    """

    config: ArmtGPT2Config

    def __init__(self, config: ArmtGPT2Config) -> None:
        positions = config.segment_size + config.memory_tokens
        if positions > config.n_positions:
            raise ValueError(
                f"segment_size + memory_tokens = {positions} is more than n_positions = {config.n_positions}: "
                "make the segments shorter or n_positions larger"
            )
        super().__init__(config)
        self.h: nn.ModuleList = nn.ModuleList(
            AssociativeLayer(
                block, config.hidden_size, config.memory_tokens, config.memory_key_size, config.memory_orders
            )
            for block in self.h
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryProjection):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class ArmtGPT2ForCausalLM(ArmtForCausalLM, GPT2PreTrainedModel):
    """An ARMT over GPT-2 that predicts the next token, and generates."""

    config: ArmtGPT2Config
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: ArmtGPT2Config) -> None:
        super().__init__(config)
        self.transformer = ArmtGPT2Model(config)
        self.memory = nn.Parameter(torch.empty(config.memory_tokens, config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("armt_gpt2", ArmtGPT2Config)
AutoModelForCausalLM.register(ArmtGPT2Config, ArmtGPT2ForCausalLM)


def build(
    *,
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    intermediate: int | None = None,
    vocabulary: int = 256,
    segment: int = 16,
    memory: int = 4,
    key_size: int = 16,
    orders: int = 3,
    segments: int = 8,
    batch: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    attention: str = "sdpa",
) -> tuple[ArmtGPT2ForCausalLM, tuple[Tensor]]:
    """A model with random weights, in eval mode, and a text for it.

    Args:
        layers, width, heads: the sizes of the GPT-2; ``intermediate`` (the width of the MLP) defaults to ``4 * width``.
        vocabulary: number of tokens, at least 256: the text's tokens are bytes.
        segment, memory: tokens of the text and memory tokens in a segment.
        key_size, orders: the memory has 2 * orders * key_size features.
        segments, batch: size of the text, ``(batch, segments * segment)``.
        seed: of the weights; the global random state is left as it was.
        dtype: name of a floating-point torch dtype; the weights are drawn in float32 and then cast.
        attention: ``"sdpa"`` or ``"eager"``.

    Returns:
        The model and its arguments, ``(input_ids,)``.

    Raises:
        ValueError: if ``layers``, ``width``, ``heads``, ``segment``, ``segments`` or ``batch`` is below 1.
    """
    check_sizes(layers=layers, width=width, heads=heads, segment=segment, segments=segments, batch=batch)
    config = ArmtGPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_inner=intermediate,
        n_layer=layers,
        n_head=heads,
        n_positions=segment + memory,
        initializer_range=0.16 * width**-0.5,  # 0.02 at width 64, and as gentle at any other
        bos_token_id=None,
        eos_token_id=None,
        segment_size=segment,
        memory_tokens=memory,
        memory_key_size=key_size,
        memory_orders=orders,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = ArmtGPT2ForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at one and biases at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, dtype))
    return model.eval(), (token_ids(segments * segment, batch),)
