"""Train an ARMT to recall what it read segments ago, as written and compiled, and draw both losses over time.

A text is noise with a few pairs of a key and a value in it. Its last segment has the keys again, and the model is to
say the values. The number of segments is drawn anew in each step, of up to two at first and of up to eight later on.

python -m rmtc.examples.train_armt [--seconds 120] [--plot losses.svg] [--save weights.safetensors]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import rmtc
from rmtc.examples.armt_llama import ArmtLlamaConfig, ArmtLlamaForCausalLM

__all__ = ["Step", "built", "texts", "train"]

KEYS, VALUES, NOISE = 8, 8, 16
SEGMENT, SEGMENTS, PAIRS = 4, 8, 2
GROWS, WARM = 40, 60  # steps after which texts may have one more segment; steps in which the learning rate grows
RECENT = 60  # steps whose mean is told


class Step(NamedTuple):
    """One step of training.

    Attributes:
        seconds: since the first step began, by the wall clock, captures counted.
        segments: of the texts.
        loss: of the values.
        right: share of the values that were told rightly.
    """

    seconds: float
    segments: int
    loss: float
    right: float


def texts(segments: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return texts with pairs, and their labels.

    Args:
        segments: at least 2. All but the last may hold a pair each.
        batch: number of texts.
        generator: draws them.

    Returns:
        Ids and labels, both (batch, segments * SEGMENT), int64. Labels are -100 but for the last segment's values.
    """
    pairs = min(PAIRS, segments - 1)
    rows, last = torch.arange(batch)[:, None], (segments - 1) * SEGMENT

    def some(count: int, of: int) -> Tensor:
        return torch.rand(batch, of, generator=generator).argsort(1)[:, :count]

    ids = torch.full((batch, segments * SEGMENT), NOISE)
    keys, values = some(pairs, KEYS), KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)
    places = some(pairs, segments - 1) * SEGMENT + 2 * torch.randint(SEGMENT // 2, (batch, pairs), generator=generator)
    asked = last + 2 * some(pairs, pairs)
    labels = torch.full_like(ids, -100)
    for at in (places, asked):
        ids[rows, at], ids[rows, at + 1] = keys, values
    labels[rows, asked + 1] = values
    return ids, labels


def built(seed: int = 0, layers: int = 4, width: int = 64) -> ArmtLlamaForCausalLM:
    """Return a model with random weights."""
    config = ArmtLlamaConfig(
        vocab_size=NOISE + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        segment_size=SEGMENT,
        memory_tokens=2,
        memory_key_size=32,
        memory_orders=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ArmtLlamaForCausalLM(config)
    model.train()
    return model


def train(model: nn.Module, batch: int = 32, seed: int = 0) -> Iterator[Step]:
    """Train a model, and yield each step. The texts are the same for all models."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM, total_iters=WARM)
    begun = time.perf_counter()
    for number in itertools.count():
        longest = min(SEGMENTS, 2 + number // GROWS)
        segments = int(torch.randint(2, longest + 1, (), generator=generator))
        ids, labels = texts(segments, batch, generator)
        found = model(ids, labels=labels)
        optimizer.zero_grad()
        found.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        asked = labels[:, 1:] >= 0
        right = (found.logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].double().mean()
        yield Step(time.perf_counter() - begun, segments, float(found.loss.detach()), float(right))


def drawn(curves: Mapping[str, Sequence[Step]]) -> str:
    """Return an SVG of the losses, each the mean of the last steps, over time."""
    width, height, left, colors = 720, 360, 48, ("#888888", "#0b6e99")
    longest = max(steps[-1].seconds for steps in curves.values())
    highest = max(step.loss for steps in curves.values() for step in steps)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    lines.append(f'<path d="M{left} 12V{height - 32}H{width - 12}" fill="none" stroke="currentColor"/>')
    for number, (name, steps) in enumerate(curves.items()):
        points = []
        for at, step in enumerate(steps):
            mean = sum(each.loss for each in steps[max(0, at + 1 - RECENT) : at + 1]) / min(at + 1, RECENT)
            x = left + (width - left - 12) * step.seconds / longest
            points.append(f"{x:.1f},{12 + (height - 44) * (1 - mean / highest):.1f}")
        lines.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colors[number % 2]}" stroke-width="2"/>'
        )
        lines.append(f'<text x="{width - 130}" y="{32 + 20 * number}" fill="{colors[number % 2]}">{name}</text>')
    lines.append(f'<text x="{width - 110}" y="{height - 10}" fill="currentColor">{longest:.0f} s</text>')
    lines.append(f'<text x="4" y="20" fill="currentColor">{highest:.1f}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main(say: Callable[[str], None] = print) -> None:
    """Train twice and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, each")
    parser.add_argument("--plot", type=Path, default=Path("train_armt.svg"), help="where both losses are drawn")
    parser.add_argument("--save", type=Path, help="where the weights of the compiled model are written")
    options = parser.parse_args()
    curves: dict[str, list[Step]] = {}
    for name in ("as written", "rmtc"):
        model = built()
        if name == "rmtc":
            rmtc.compile(model, schedule="shortest", strict=True)
        steps = curves[name] = []
        for step in train(model):
            steps.append(step)
            if step.seconds > options.seconds:
                break
        last = steps[-RECENT:]
        right = sum(step.right for step in last) / len(last)
        took = (last[-1].seconds - last[0].seconds) / max(1, len(last) - 1)
        say(
            f"{name}: {len(steps)} steps of {1e3 * took:.0f} ms; {100 * right:.0f} % of the values are right at the end"
        )
    say(f"backward passes by the schedule: {rmtc.stats(model).backwards}")
    options.plot.write_text(drawn(curves))
    say(f"both losses over time: {options.plot}")
    if options.save is not None:
        save_model(model, str(options.save))


if __name__ == "__main__":
    main()
