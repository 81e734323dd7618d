"""Measure the perplexity of a set of texts of many lengths, several of which are read at once.

The texts are Python's help topics, cut to whole segments. Without a folder in which a model was saved its weights are
random, and its perplexity is that of guessing.

python -m rmtc.examples.evaluate [--model folder] [--texts 64] [--one-by-one]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

import rmtc
from rmtc.examples import armt_gpt2, armt_llama

__all__ = ["perplexity", "texts"]

ARMT = armt_llama.ArmtLlamaConfig, armt_gpt2.ArmtGPT2Config


def texts(segment: int, count: int, most: int = 32) -> list[Tensor]:
    """Return texts as bytes.

    Args:
        segment: positions of a segment.
        count: the most texts.
        most: the most segments of a text.

    Returns:
        Token ids (1, N) each, int64, N a multiple of ``segment``, at least two of them.
    """
    found = []
    for name in sorted(topics):
        data = torch.frombuffer(bytearray(topics[name].encode()), dtype=torch.uint8).long()
        segments = min(len(data) // segment, most)
        if segments > 1:
            found.append(data[None, : segments * segment])
    return found[: max(0, count)]


def results(model: Any, given: Sequence[Tensor], packed: bool) -> Iterator[tuple[int, Any]]:
    """Yield the number and the result of each text, as they are done."""
    calls = [{"input_ids": each, "labels": each, "logits_to_keep": 1} for each in given]  # the loss is of all
    if packed:
        yield from rmtc.pack(model).as_completed(calls)
    else:
        yield from ((number, model(**each)) for number, each in enumerate(calls))


@torch.no_grad()
def perplexity(model: Any, given: Sequence[Tensor], packed: bool = True) -> float:
    """Return the perplexity of texts, with a progress bar and tokens per second on standard error.

    Args:
        model: a compiled causal language model, whose loss is the mean cross entropy of the next token.
        given: token ids (1, N) of each text.
        packed: whether several are read at once.

    Returns:
        ``exp`` of the mean cross entropy of all tokens but the first of each text.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    loss, tokens, start = 0.0, 0, time.perf_counter()
    from rich.console import Console

    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("texts", total=len(given), speed="")
        for number, result in results(model, given, packed):
            count = given[number].shape[1] - 1
            loss, tokens = loss + float(result.loss) * count, tokens + count
            speed = f"{tokens / (time.perf_counter() - start):.0f} tokens/s"
            progress.update(task, advance=1, speed=speed)
    return math.exp(loss / max(1, tokens))


def main(say: Callable[[str], None] = print) -> None:
    """Measure a model, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a saved ARMT over Llama or GPT-2 that reads bytes")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--one-by-one", action="store_true", help="one call after another")
    options = parser.parse_args()
    if options.model is not None:
        kind = PreTrainedConfig.get_config_dict(options.model)[0].get("model_type")
        if kind not in (each.model_type for each in ARMT):
            parser.error(f"{options.model} holds a model of type {kind}: give a folder in which an ARMT was saved")
    model: Any = (
        armt_llama.build()[0] if options.model is None else AutoModelForCausalLM.from_pretrained(options.model).eval()
    )
    given = texts(model.config.segment_size, options.texts)
    found = perplexity(rmtc.compile(model), given, packed=not options.one_by_one)
    say(f"perplexity {found:.2f} of {len(given)} texts, {sum(each.shape[1] for each in given)} tokens")


if __name__ == "__main__":
    main()
