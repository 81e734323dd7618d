"""The classic RMT (recurrent memory transformer) over Llama: the memory leaves at the top and enters at the bottom.

Shapes: B batch, N tokens of the text, T tokens of a segment with both memories, D width, M memory tokens, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    LlamaPreTrainedModel,
)

from rmtc.examples.generation import CACHE, SegmentCache, SegmentGeneration, check_mask, kept_from
from rmtc.examples.text import check_sizes, token_ids

__all__ = ["RmtLlamaConfig", "RmtLlamaForCausalLM", "build"]


class RmtLlamaConfig(LlamaConfig):
    """Llama's configuration and the memory's.

    Attributes:
        segment_size: tokens of the text a segment, without the memory tokens.
        memory_tokens: M, at least 1; a segment carries them twice, to read and to write.
    """

    model_type = "rmt_llama"

    segment_size: int = 1024
    memory_tokens: int = 16


class RmtLlamaForCausalLM(SegmentGeneration, LlamaPreTrainedModel, GenerationMixin):
    """Reads a text of any length in segments and predicts the next token everywhere.

    The segments are ``[m ; embed(ids) ; m]``. What Llama makes of the last M positions (its last hidden state, the
    final norm included) is the next segment's m; the first segment's is learned. ``generate`` reads a prompt so, and
    leaves its last segment open, without the second m, for what it generates.
    """

    config: RmtLlamaConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RmtLlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.memory = nn.Parameter(torch.empty(config.memory_tokens, config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.last_memory: Tensor | None = None  # the memory that the last call has left
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.memory, std=self.config.initializer_range)

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
        """Read a text from its beginning. Afterwards ``last_memory`` is that of all of it.

        Args:
            input_ids: ``(B, N)``, N at least 1.
            attention_mask: ``(B, N)``, 0 where a row is padding; the memory tokens are always attended.
            labels: ``(B, N)``, usually the ``input_ids``: they are shifted here; -100 is ignored. Not with a
                cache that is given.
            cache, use_cache, logits_to_keep, return_dict, kwargs: as of :class:`ArmtForCausalLM`.

        Returns:
            ``logits`` (B, N, V), with labels their mean cross entropy as ``loss``, and what was read as ``cache``.

        Raises:
            ValueError: if there are labels and a given cache, or the cache or the mask is not of this text.
        """
        given = past_key_values if cache is None else cache
        if given is not None or use_cache:
            return self.answer_on(input_ids, attention_mask, labels, given, logits_to_keep, return_dict, **kwargs)
        check_mask(attention_mask, *input_ids.shape)
        memory = self.memory.expand(input_ids.shape[0], -1, -1)
        length, size = input_ids.shape[1], self.config.segment_size
        logits, kept = [], []
        first = kept_from(length, size, logits_to_keep)
        for start in range(0, length, size):
            segment = slice(start, start + size)
            mask = None if attention_mask is None else attention_mask[:, segment]
            hidden, memory = self.read_segment(input_ids[:, segment], mask, memory)
            if start >= first:
                kept.append(hidden)
            if labels is not None or not logits_to_keep:
                logits.append(self.lm_head(hidden))
        self.last_memory = memory
        return self.answer(logits, kept, labels, logits_to_keep, return_dict, **kwargs)

    def read_segment(self, ids: Tensor, mask: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run Llama over one segment.

        Args:
            ids: ``(B, n)``.
            mask: ``(B, n)`` or None.
            memory: ``(B, M, D)``.

        Returns:
            The hidden states of the text ``(B, n, D)`` and the new memory ``(B, M, D)``.
        """
        inputs = torch.cat([memory, self.model.embed_tokens(ids), memory], dim=1)
        if mask is not None:
            attended = mask.new_ones(memory.shape[:2])
            mask = torch.cat([attended, mask, attended], dim=1)
        given = {"use_cache": False, "return_dict": True}
        hidden = self.model(inputs_embeds=inputs, attention_mask=mask, **given).last_hidden_state
        size = self.config.memory_tokens
        memory = hidden[:, -size:]
        return hidden[:, size:-size], memory

    def memories_left(self) -> list[tuple[Tensor, ...]]:
        """Return the memory after a call."""
        return [] if self.last_memory is None else [(self.last_memory,)]

    def extend(self, ids: Tensor, mask: Tensor | None, cache: SegmentCache) -> Tensor:
        """Read tokens of the open segment, the first ones behind its memory."""
        inputs = self.model.embed_tokens(ids)
        if not cache.length:
            cache.before = self.config.memory_tokens
            inputs = torch.cat([self._memory(len(ids), cache), inputs], dim=1)
        return self._beside(inputs, mask, cache)[:, -ids.shape[1] :]

    def close(self, mask: Tensor | None, cache: SegmentCache) -> None:
        """Let Llama write the memory at the end of the open segment."""
        memory = self._memory(len(cache.open.layers[0].keys), cache)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(memory.shape[:2])], dim=1)
        cache.close([(self._beside(memory, mask, cache),)])

    def _memory(self, batch: int, cache: SegmentCache) -> Tensor:
        """The memory that the open segment reads, (B, M, D)."""
        return cache.memories[0][0] if cache.memories else self.memory.expand(batch, -1, -1)

    def _beside(self, inputs: Tensor, mask: Tensor | None, cache: SegmentCache) -> Tensor:
        """Run Llama beside the keys and values of the open segment."""
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), self.config.memory_tokens), mask], dim=1)
        given = {CACHE: cache.open, "use_cache": True, "return_dict": True}
        hidden: Tensor = self.model(inputs_embeds=inputs, attention_mask=mask, **given).last_hidden_state
        return hidden


AutoConfig.register("rmt_llama", RmtLlamaConfig)
AutoModelForCausalLM.register(RmtLlamaConfig, RmtLlamaForCausalLM)


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
    segments: int = 8,
    batch: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    attention: str = "sdpa",
) -> tuple[RmtLlamaForCausalLM, tuple[Tensor]]:
    """A model with random weights, in eval mode, and a text for it.

    Args:
        layers, width, heads: the sizes of the Llama; ``kv_heads`` defaults to ``heads``, ``intermediate`` (the width of
            the MLP) to ``4 * width``.
        vocabulary: number of tokens, at least 256: the text's tokens are bytes.
        segment, memory: tokens of the text and memory tokens in a segment.
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
    config = RmtLlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=segment + 2 * memory,
        initializer_range=0.16 * width**-0.5,  # 0.02 at width 64, and as gentle at any other
        segment_size=segment,
        memory_tokens=memory,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = RmtLlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at one and biases at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, dtype))
    return model.eval(), (token_ids(segments * segment, batch),)
