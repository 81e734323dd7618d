"""Read a long text once, and ask several questions against the memory that is left of it.

The text is noise with pairs of a key and a value in it, as in train_armt.py; a question is a key, and the answer is the
token that the model generates. A model with random weights guesses.

python -m rmtc.examples.train_armt --save weights.safetensors
python -m rmtc.examples.answer --weights weights.safetensors
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model
from torch import Tensor

import rmtc
from rmtc.examples.generation import CACHE, SegmentCache
from rmtc.examples.train_armt import SEGMENT, SEGMENTS, built, texts

__all__ = ["Answer", "ask", "read"]


class Answer(NamedTuple):
    """What a model says to a question.

    Attributes:
        key: the question.
        said: the token that it generated.
        value: the right one.
    """

    key: int
    said: int
    value: int


@torch.no_grad()
def read(model: Any, text: Tensor) -> SegmentCache:
    """Read a text.

    Args:
        model: an ARMT over Llama or GPT-2, compiled or not.
        text: token ids (1, N), N a multiple of the segment size.

    Returns:
        A cache that holds the memory of it.

    Raises:
        ValueError: if the text ends within a segment: its memory would be written before the segment is full.
    """
    size = model.config.segment_size
    if text.dim() != 2 or len(text) != 1 or not text.shape[1] or text.shape[1] % size:
        raise ValueError(
            f"the text is (1, N), N a multiple of the segment size {size}, not {tuple(text.shape)}: "
            "put the rest of it before the question"
        )
    model(text, logits_to_keep=1)
    return SegmentCache(model.config, model.memories_left(), text.shape[1])


def ask(model: Any, text: Tensor, memory: SegmentCache, question: Tensor, tokens: int = 1) -> Tensor:
    """Return the tokens (1, tokens) that a model generates after a question.

    Args:
        model: the model that has read the text.
        text: what it has read, (1, N). It is not read again.
        memory: what :func:`read` returned; it stays as it is.
        question: token ids (1, n).
        tokens: number of new tokens.
    """
    asked = torch.cat([text, question], dim=1)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    found: Tensor = model.generate(asked, **options, **{CACHE: copy.deepcopy(memory)})
    return found[:, asked.shape[1] :]


def answers(model: Any, seed: int = 0) -> list[Answer]:
    """Return what a model says to each question about one text."""
    ids, labels = texts(SEGMENTS, 1, torch.Generator().manual_seed(seed))
    text, last = ids[:, :-SEGMENT], ids[0, -SEGMENT:]
    memory = read(model, text)
    asked = [place for place in range(SEGMENT) if labels[0, place - SEGMENT] != -100]
    pairs = [(last[place - 1], last[place]) for place in asked]
    return [Answer(int(key), int(ask(model, text, memory, key.view(1, 1))), int(value)) for key, value in pairs]


def main(say: Callable[[str], None] = print) -> None:
    """Ask questions about some texts, and say what was answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="file that train_armt.py saved")
    parser.add_argument("--texts", type=int, default=4)
    options = parser.parse_args()
    model = built()
    if options.weights is not None:
        load_model(model, options.weights)
    fast = rmtc.compile(model.eval())
    for seed in range(options.texts):
        found = answers(fast, seed)
        said = ", ".join(
            f"{each.key} -> {each.said} ({'right' if each.said == each.value else each.value})" for each in found
        )
        say(f"text {seed}: {said}")


if __name__ == "__main__":
    main()
