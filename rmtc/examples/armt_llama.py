"""ARMT over Llama: every decoder layer keeps an associative memory from segment to segment.

Shapes: B batch, N tokens of the text, T tokens of a segment with memory, D width, M memory tokens, V vocabulary,
K memory features.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    LlamaPreTrainedModel,
)

from rmtc.examples.associative import AssociativeLayer, MemoryProjection
from rmtc.examples.generation import CACHE, SegmentCache, SegmentGeneration, check_mask, kept_from
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


class ArmtLlamaForCausalLM(SegmentGeneration, LlamaPreTrainedModel, GenerationMixin):
    """Reads a text of any length in segments and predicts the next token everywhere.

    The segments are ``[embed(ids) ; memory tokens]``, the last one as short as what is left of the text. ``generate``
    reads a prompt so, and leaves its last segment open, without the memory tokens, for what it generates.
    """

    config: ArmtLlamaConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ArmtLlamaConfig) -> None:
        super().__init__(config)
        self.model = ArmtLlamaModel(config)
        self.memory = nn.Parameter(torch.empty(config.memory_tokens, config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.memory, std=self.config.initializer_range)

    def reset_memory(self) -> None:
        """Forget the text, and let go of the memory's tensors (and of their graph, after a training step)."""
        for module in self.modules():
            if isinstance(module, AssociativeLayer):
                module.reset()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: SegmentCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        past_key_values: SegmentCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a text from its beginning. Afterwards the layers hold the memory of all of it.

        Args:
            input_ids: ``(B, N)``, N at least 1.
            attention_mask: ``(B, N)``, 0 where a row is padding; the memory tokens are always attended.
            labels: ``(B, N)``, usually the ``input_ids``: they are shifted here; -100 is ignored. Not with a cache.
            cache: what was read before: the ids are the text that follows, and the mask is that of all. It is written
                to. Older releases of transformers call it ``past_key_values``.
            use_cache: whether to leave the last segment open, in the cache of the output.
            logits_to_keep: give the logits of so many last tokens only; 0 for all. The loss is that of all tokens: with
                ``logits_to_keep=1`` no logits are kept for it.
            return_dict: False for a tuple.
            kwargs: what else transformers hands to a model, as ``num_items_in_batch``, by which the sum of the cross
                entropy is divided in place of the number of labels.

        Returns:
            ``logits`` (B, N, V), with labels their mean cross entropy as ``loss``, and what was read as ``cache``.

        Raises:
            ValueError: if there are labels and a cache, or the cache or the mask is not of this text.
        """
        given = past_key_values if cache is None else cache
        if given is not None or use_cache:
            return self.answer_on(input_ids, attention_mask, labels, given, logits_to_keep, return_dict)
        check_mask(attention_mask, *input_ids.shape)
        self.reset_memory()
        length, size = input_ids.shape[1], self.config.segment_size
        logits, kept = [], []
        first = kept_from(length, size, logits_to_keep)
        for start in range(0, length, size):
            segment = slice(start, start + size)
            mask = None if attention_mask is None else attention_mask[:, segment]
            hidden = self.read_segment(input_ids[:, segment], mask)
            if start >= first:
                kept.append(hidden)
            if labels is not None or not logits_to_keep:
                logits.append(self.lm_head(hidden))
        return self.answer(logits, kept, labels, logits_to_keep, return_dict, **kwargs)

    def read_segment(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states of one segment, ``(B, n, D)``, for its ids and mask, both ``(B, n)``."""
        memory = self.memory.expand(ids.shape[0], -1, -1)
        inputs = torch.cat([self.model.embed_tokens(ids), memory], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(memory.shape[:2])], dim=1)
        hidden: Tensor = self.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[:, : ids.shape[1]]

    def memories_left(self) -> list[tuple[Tensor, ...]]:
        """Return the memory ``(A, z)`` of each layer after a call."""
        layers = (layer for layer in self.model.layers if isinstance(layer, AssociativeLayer))
        return [(layer.A, layer.z) for layer in layers if layer.A is not None and layer.z is not None]

    def extend(self, ids: Tensor, mask: Tensor | None, cache: SegmentCache) -> Tensor:
        """Read tokens of the open segment, which do not write to the memory."""
        return self._beside(self.model.embed_tokens(ids), mask, cache, remember=False)

    def close(self, mask: Tensor | None, cache: SegmentCache) -> None:
        """Let the memory tokens read the open segment, and write the memory."""
        memory = self.memory.expand(len(cache.open.layers[0].keys), -1, -1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(memory.shape[:2])], dim=1)
        self._beside(memory, mask, cache, remember=True)
        cache.close(self.memories_left())

    def _beside(self, inputs: Tensor, mask: Tensor | None, cache: SegmentCache, remember: bool) -> Tensor:
        """Run the layers beside the keys and values of the open segment."""
        self.reset_memory()
        for layer, memory in zip(self.model.layers, cache.memories, strict=False):
            layer.A, layer.z = memory
        given = {CACHE: cache.open, "use_cache": True, "remember": remember}
        hidden: Tensor = self.model(inputs_embeds=inputs, attention_mask=mask, **given).last_hidden_state
        return hidden


AutoConfig.register("armt_llama", ArmtLlamaConfig)
AutoModel.register(ArmtLlamaConfig, ArmtLlamaModel)
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
