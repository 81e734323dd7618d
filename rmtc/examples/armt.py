"""ARMT over Llama, GPT-2 and the like: models of transformers whose layers are wrapped with their memories.

Shapes: B batch, N tokens of the text, T tokens of a segment with memory, D width, M memory tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from rmtc.examples.associative import AssociativeLayer
from rmtc.examples.generation import CACHE, SegmentCache, SegmentGeneration, check_mask, kept_from

__all__ = ["ArmtForCausalLM"]


class ArmtForCausalLM(SegmentGeneration, PreTrainedModel, GenerationMixin):
    """Reads a text of any length in segments and predicts the next token everywhere.

    The segments are ``[embed(ids) ; memory tokens]``, the last one as short as what is left of the text. ``generate``
    reads a prompt so, and leaves its last segment open, without the memory tokens, for what it generates.

    A class for one model derives from this one and then from that model's ``PreTrainedModel``. It annotates ``config``
    with its configuration, by which transformers loads it. It makes the base model, the memory tokens (M, D) as
    ``memory``, and ``lm_head``. The base model takes ``inputs_embeds`` and hands ``remember`` on to its layers.
    """

    memory: nn.Parameter
    lm_head: nn.Linear

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.memory, std=self.config.initializer_range)

    def layers_with_memory(self) -> list[AssociativeLayer]:
        """Return the layers from bottom to top."""
        return [module for module in self.modules() if isinstance(module, AssociativeLayer)]

    def reset_memory(self) -> None:
        """Forget the text, and let go of the memory's tensors (and of their graph, after a training step)."""
        for layer in self.layers_with_memory():
            layer.reset()

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
            labels: ``(B, N)``, usually the ``input_ids``: they are shifted here; -100 is ignored. Not with a
                cache that is given.
            cache: what was read before: the ids are the text that follows, and the mask is that of all. It is written
                to. Older releases of transformers call it ``past_key_values``.
            use_cache: whether to leave the last segment open, in the cache of the output.
            logits_to_keep: give the logits of so many last tokens only; 0 for all. The loss is that of all tokens: with
                ``logits_to_keep=1`` no logits are kept for it.
            return_dict: False for a tuple; by default the configuration's.
            kwargs: what else transformers hands to a model, as ``num_items_in_batch``, by which the sum of the cross
                entropy is divided in place of the number of labels.

        Returns:
            ``logits`` (B, N, V), with labels their mean cross entropy as ``loss``, and what was read as ``cache``.

        Raises:
            ValueError: if there are labels and a given cache, or the cache or the mask is not of this text.
        """
        given = past_key_values if cache is None else cache
        if given is not None or use_cache:
            return self.answer_on(input_ids, attention_mask, labels, given, logits_to_keep, return_dict, **kwargs)
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
        inputs = torch.cat([self.get_input_embeddings()(ids), memory], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(memory.shape[:2])], dim=1)
        given = {"use_cache": False, "return_dict": True}
        hidden: Tensor = self.base_model(inputs_embeds=inputs, attention_mask=mask, **given).last_hidden_state
        return hidden[:, : ids.shape[1]]

    def memories_left(self) -> list[tuple[Tensor, ...]]:
        """Return the memory ``(A, z)`` of each layer after a call."""
        layers = self.layers_with_memory()
        return [(layer.A, layer.z) for layer in layers if layer.A is not None and layer.z is not None]

    def extend(self, ids: Tensor, mask: Tensor | None, cache: SegmentCache) -> Tensor:
        """Read tokens of the open segment, which do not write to the memory."""
        return self._beside(self.get_input_embeddings()(ids), mask, cache, remember=False)

    def close(self, mask: Tensor | None, cache: SegmentCache) -> None:
        """Let the memory tokens read the open segment, and write the memory."""
        memory = self.memory.expand(len(cache.open.layers[0].keys), -1, -1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(memory.shape[:2])], dim=1)
        self._beside(memory, mask, cache, remember=True)
        cache.close(self.memories_left())

    def _beside(self, inputs: Tensor, mask: Tensor | None, cache: SegmentCache, remember: bool) -> Tensor:
        """Run the layers beside the keys and values of the open segment."""
        layers = self.layers_with_memory()
        for layer in layers:
            layer.reset()
        for layer, memory in zip(layers, cache.memories, strict=False):
            layer.A, layer.z = memory
        given = {CACHE: cache.open, "use_cache": True, "return_dict": True, "remember": remember}
        hidden: Tensor = self.base_model(inputs_embeds=inputs, attention_mask=mask, **given).last_hidden_state
        return hidden
