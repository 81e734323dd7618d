"""Answers from a memory: ``generate`` for models that read in segments.

The prompt's segments but the last are read by the model's own call, which rmtc runs by its schedule. The last segment
stays open: its tokens are decoded one by one beside a cache of its keys and values. Where it is full, it is closed as
the model closes segments, which writes the memory, and the next one begins.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["CACHE", "SegmentCache", "SegmentGeneration"]

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What transformers calls the argument, and the field of the output, that hold a cache."""
NEW_TOKENS = 20
"""Tokens to generate where nobody sets a length, as in transformers."""


class SegmentCache(Cache):
    """What a model has read: the memories of the closed segments, and the keys and values of the open one.

    Attributes:
        memories: what the last closed segment has left, tuples of tensors (batch size, ...); empty before there is one.
        open: the keys and values of the open segment.
        before: tokens in it that stand before those of the text.
        closed: tokens of the text in closed segments.

    Raises:
        ValueError: if ``closed`` is no multiple of the segment size.
    """

    def __init__(self, config: Any, memories: Sequence[tuple[Tensor, ...]] = (), closed: int = 0) -> None:
        if rest := closed % config.segment_size:
            raise ValueError(
                f"closed is a multiple of the segment size {config.segment_size}, not {closed}: a memory is written "
                f"where a segment is full. Read {closed - rest} tokens before, and the others with this cache"
            )
        super().__init__(layers=[])
        self.config, self.memories, self.closed, self.before = config, memories, closed, 0
        self.open = DynamicCache(config=config)

    @property
    def length(self) -> int:
        """Tokens of the text in the open segment."""
        return max(0, int(self.open.get_seq_length()) - self.before)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the text that were read."""
        return self.closed + self.length

    def close(self, memories: Sequence[tuple[Tensor, ...]]) -> None:
        """Begin a new segment with some memories."""
        self.closed += self.config.segment_size
        self.memories, self.open = memories, DynamicCache(config=self.config)

    def __repr__(self) -> str:
        return f"SegmentCache({self.get_seq_length()} tokens, {self.length} of them in the open segment)"

    def widen(self, batch: int) -> None:
        """Repeat the memories of each text, as ``generate`` repeats the texts for beams."""
        sizes = {tensor.shape[0] for memory in self.memories for tensor in memory}
        if sizes and sizes != {batch}:
            (size,) = sizes
            self._map(lambda tensor: tensor.repeat_interleave(batch // size, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let beams go on from others."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        self.open.reorder_cache(beam_idx)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memories = [tuple(map(change, memory)) for memory in self.memories]

    @property
    def is_croppable(self) -> bool:
        """False: what a memory has read it does not forget."""
        return False

    def crop(self, max_length: int) -> None:
        """Refuse to forget tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a memory cannot be cropped: it does not forget single tokens. Generate without an assistant model, "
            "prompt lookup or other ways to take tokens back"
        )


class SegmentGeneration:
    """``generate`` for a model whose call reads a text in segments, to stand before ``GenerationMixin``.

    The model has :meth:`memories_left`, :meth:`extend` and :meth:`close`, and its configuration ``segment_size``.
    """

    config: Any
    generation_config: Any

    def memories_left(self) -> list[tuple[Tensor, ...]]:
        """Return the memories after a call, as :attr:`SegmentCache.memories` holds them."""
        raise NotImplementedError

    def extend(self, ids: Tensor, mask: Tensor | None, cache: SegmentCache) -> Tensor:
        """Read tokens of the open segment.

        Args:
            ids: (B, n), no more than the segment has room for.
            mask: (B, length + n) of the open segment, or None.
            cache: what was read; takes their keys and values.

        Returns:
            Their hidden states (B, n, D).
        """
        raise NotImplementedError

    def close(self, mask: Tensor | None, cache: SegmentCache) -> None:
        """Write the memory at the end of the open segment, and begin a new one.

        Args:
            mask: (B, segment_size) of the open segment, or None.
            cache: what was read.
        """
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generate as transformers does. All segments of the prompt but the last are read by one call of the model.

        Rows of a batch are padded on the left, and have an ``attention_mask``. Padding moves the borders of segments:
        a padded row is read in other segments than the same text alone. The layers hold the memory meanwhile, so no
        two threads generate with one model at once. Without a length, 20 tokens are generated.

        Raises:
            ValueError: if there are no token ids (batch size, positions), or a cache of another kind is given.
        """
        settings: list[Any] = [generation_config, self.generation_config]
        lengths = [kwargs, *(vars(each) for each in settings if each is not None)]
        if all(each.get(name) is None for each in lengths for name in ("max_length", "max_new_tokens")):
            # transformers would end at max_position_embeddings, which here limit a segment and no text
            if generation_config is None:
                kwargs["max_new_tokens"] = NEW_TOKENS
            else:
                generation_config = copy.deepcopy(generation_config)
                generation_config.max_new_tokens = NEW_TOKENS
        if kwargs.get("use_cache") is False:  # the whole text is read anew for each token
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1] or kwargs.get("inputs_embeds") is not None:
            what = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"generate reads a tensor of token ids (batch size, positions), not {what}")
        for name in ("cache", "past_key_values"):
            if (given := kwargs.pop(name, None)) is not None:
                kwargs[CACHE] = given
        if kwargs.get(CACHE) is None:
            mask, size = kwargs.get("attention_mask"), self.config.segment_size
            closed = (ids.shape[1] - 1) // size * size
            if closed:
                read: Any = self  # the model's call
                read(ids[:, :closed], attention_mask=None if mask is None else mask[:, :closed], logits_to_keep=1)
            kwargs[CACHE] = SegmentCache(self.config, self.memories_left() if closed else (), closed)
        check_cache(kwargs[CACHE])
        if kwargs[CACHE].get_seq_length() >= ids.shape[1]:
            raise ValueError(f"{kwargs[CACHE]} holds all of these {ids.shape[1]} tokens: hand over the whole text")
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def answer(
        self,
        logits: Sequence[Tensor],
        kept: Sequence[Tensor],
        labels: Tensor | None,
        logits_to_keep: int,
        return_dict: bool | None,
        cache: SegmentCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output of a call that has read a text.

        Args:
            logits: of each segment, (B, n, V); none where neither a loss nor the caller asks for them.
            kept: hidden states (B, n, D) of the last segments, if only the logits of the last positions are asked for.
            labels, logits_to_keep, return_dict: of the call.
            cache: for the output.
            kwargs: what is for the loss, as ``num_items_in_batch``: the labels of all batches that a step accumulates.
        """
        model: Any = self
        found = torch.cat(list(logits), dim=1) if logits else None
        loss = None
        if labels is not None:
            loss = model.loss_function(logits=found, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if logits_to_keep:
            found = model.lm_head(torch.cat(list(kept), dim=1)[:, -logits_to_keep:])
        output = CausalLMOutputWithPast(loss=loss, logits=found, **{CACHE: cache})
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def answer_on(
        self,
        ids: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        cache: SegmentCache | None,
        logits_to_keep: int,
        return_dict: bool | None,
        **kwargs: Any,
    ) -> Any:
        """Return the output of a call that reads on from a cache, by default an empty one.

        Raises:
            ValueError: if there are labels and a given cache: the loss is that of a whole text.
        """
        if labels is not None and cache is not None:
            raise ValueError(
                "labels and a cache do not go together: a loss is that of a whole text. Call the model without cache "
                "and past_key_values for the loss, or without labels for what follows in the cache"
            )
        model: Any = self
        read = SegmentCache(self.config) if cache is None else cache
        hidden = self.read_on(ids, mask, read)
        logits = [model.lm_head(hidden)] if labels is not None or not logits_to_keep else []
        return self.answer(logits, [hidden], labels, logits_to_keep, return_dict, read, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a call: the tokens that were not read yet."""
        cache = kwargs.get(CACHE)
        done = cache.get_seq_length() if cache is not None else 0
        given = {"input_ids": input_ids[:, done:], "attention_mask": kwargs.get("attention_mask"), CACHE: cache}
        return {**given, "logits_to_keep": 1, "use_cache": kwargs.get("use_cache")}

    def read_on(self, ids: Tensor, mask: Tensor | None, cache: SegmentCache) -> Tensor:
        """Read on from what a cache holds, token by token of its open segment.

        Args:
            ids: (B, n), n at least 1.
            mask: (B, n more than were read), or None.
            cache: what was read, and what is read.

        Returns:
            Hidden states (B, n, D).
        """
        check_cache(cache)
        check_mask(mask, ids.shape[0], cache.get_seq_length() + ids.shape[1])
        cache.widen(ids.shape[0])
        pieces = []
        while ids.shape[1]:
            if cache.length == self.config.segment_size:
                self.close(self._open(mask, cache, 0), cache)
            count = min(self.config.segment_size - cache.length, ids.shape[1])
            pieces.append(self.extend(ids[:, :count], self._open(mask, cache, count), cache))
            ids = ids[:, count:]
        return torch.cat(pieces, dim=1)

    @staticmethod
    def _open(mask: Tensor | None, cache: SegmentCache, more: int) -> Tensor | None:
        """The mask of the open segment with some more tokens."""
        return None if mask is None else mask[:, cache.closed : cache.closed + cache.length + more]


def check_cache(cache: Any) -> None:
    """Check that a cache is of these models.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(cache, SegmentCache):
        raise ValueError(f"{CACHE} is a SegmentCache, not a {type(cache).__name__}")


def check_mask(mask: Tensor | None, batch: int, length: int) -> None:
    """Check that a mask is of the text: attention on a CPU takes others, too.

    Raises:
        ValueError: if it is not.
    """
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"attention_mask is ({batch}, {length}), as the text is, and not {tuple(mask.shape)}")


def kept_from(length: int, size: int, logits_to_keep: int) -> int:
    """Return a position such that the segments that begin there or later hold the last positions of the text.

    Args:
        length: positions of the text.
        size: of a segment.
        logits_to_keep: how many last positions; 0 for none: where all logits are made nothing is kept.
    """
    return length - ((logits_to_keep + size - 2) // size + 1) * size if logits_to_keep else length
