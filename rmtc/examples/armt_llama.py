"""ARMT over Llama: every decoder layer keeps an associative memory from segment to segment.

The loop over the segments is in armt.py.

Shapes: B batch, N tokens of the text, T tokens of a segment with memory, D width, M memory tokens, V vocabulary,
K memory features.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel, LlamaPreTrainedModel

from rmtc.examples.armt import ArmtForCausalLM
from rmtc.examples.associative import AssociativeLayer, MemoryProjection
from rmtc.examples.text import check_sizes, token_ids

__all__ = ["ArmtLlamaConfig", "ArmtLlamaForCausalLM", "ArmtLlamaModel", "build"]


class ArmtLlamaConfig(LlamaConfig):
    """Llama's configuration and the memory's.

    Attributes:
        segment_size: tokens of the text a segment, without the memory tokens.
        memory_tokens: M, at least 1.
        memory_key_size: width of the memory's keys and queries.
        memory_orders: rotations in the memory's features, K = 2 * memory_orders * memory_key_size.
    """

    model_type = "armt_llama"

    segment_size: int = 1024
    memory_tokens: int = 128
    memory_key_size: int = 64
    memory_orders: int = 3


class ArmtLlamaModel(LlamaModel):
    """Llama over one segment, its layers wrapped with their memories."""

    config: ArmtLlamaConfig

    def __init__(self, config: ArmtLlamaConfig) -> None:
        super().__init__(config)
        self.layers: nn.ModuleList = nn.ModuleList(
            AssociativeLayer(
                layer, config.hidden_size, config.memory_tokens, config.memory_key_size, config.memory_orders
            )
            for layer in self.layers
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryProjection):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class ArmtLlamaForCausalLM(ArmtForCausalLM, LlamaPreTrainedModel):
    """An ARMT over Llama that predicts the next token, and generates."""

    config: ArmtLlamaConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ArmtLlamaConfig) -> None:
        super().__init__(config)
        self.model = ArmtLlamaModel(config)
        self.memory = nn.Parameter(torch.empty(config.memory_tokens, config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("armt_llama", ArmtLlamaConfig)
AutoModelForCausalLM.register(ArmtLlamaConfig, ArmtLlamaForCausalLM)


def build(
    *,
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
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
) -> tuple[ArmtLlamaForCausalLM, tuple[Tensor]]:
    """A model with random weights, in eval mode, and a text for it.

    Args:
        layers, width, heads: the sizes of the Llama; ``kv_heads`` defaults to ``heads``, ``intermediate`` (the width of
            the MLP) to ``4 * width``.
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
    config = ArmtLlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=segment + memory,
        initializer_range=0.16 * width**-0.5,  # 0.02 at width 64, and as gentle at any other
        segment_size=segment,
        memory_tokens=memory,
        memory_key_size=key_size,
        memory_orders=orders,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = ArmtLlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at one and biases at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, dtype))
    return model.eval(), (token_ids(segments * segment, batch),)
