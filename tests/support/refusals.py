"""Small models that rmtc refuses: docs/refusals.md is made of them.

Each function is a whole loop: a text (B, N, D), layers, one memory (B, D) a layer.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmtc

Layers = list[nn.Linear]


def item(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            if piece.mean().item() > 0:
                memories[number] = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def boolean_indexing(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = memories[number] + piece[piece > 0].mean()
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def growing_memory(layers: Layers, text: Tensor) -> Tensor:
    memories: list[Tensor | None] = [None for _ in layers]
    pieces = []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            before = memories[number]
            context = piece if before is None else torch.cat([before, piece], dim=1)
            memories[number] = context
            piece = piece + F.scaled_dot_product_attention(layer(piece), context, context)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def backward_inside(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            memory = memories[number].detach().requires_grad_()
            with torch.enable_grad():
                loss = (layer(piece) - memory[:, None]).square().sum()
                (gradient,) = torch.autograd.grad(loss, memory)
            memories[number] = memory.detach() - 0.1 * gradient
            piece = torch.tanh(layer(piece) + memories[number][:, None])
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def transform_inside(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            read = torch.func.functionalize(lambda piece, memory, layer=layer: layer(piece).add_(memory).tanh_())
            piece = read(piece, memories[number][:, None])
            memories[number] = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def setting_left(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            torch.set_grad_enabled(number == 0)
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = piece.mean(1).detach()
        pieces.append(piece.detach())
    torch.use_deterministic_algorithms(True)
    return torch.cat(pieces, dim=1)


def asked(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    scale = 1.0 if layers[0].weight.grad is None else 0.5
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + scale * memories[number][:, None])
            memories[number] = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def flagged(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1).requires_grad_()


def own_generator(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    generator = torch.Generator()
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None]) + torch.randn(4, generator=generator)
            memories[number] = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def python_random(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None] * random.random())
            memories[number] = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def segment_in_a_branch(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for s, piece in enumerate(text.split(5, dim=1)):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = piece.mean(1) if s % 2 else piece.amax(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def constant_of_the_segment(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for s, piece in enumerate(text.split(5, dim=1)):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = memories[number] + piece.mean(1) / 2**s
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def list_indexed_by_the_segment(
    layers: Layers, text: Tensor, scales: tuple[float, ...] = (0.5, 0.9, 0.1, 0.7)
) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    for s, piece in enumerate(text.split(5, dim=1)):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + scales[s % 4] * memories[number][:, None])
            memories[number] = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def special_last_segments(layers: Layers, text: Tensor) -> Tensor:
    memories, pieces = [text.new_zeros(len(text), 4) for _ in layers], []
    segments = text.split(5, dim=1)
    for s, piece in enumerate(segments):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = piece.mean(1)
        if s >= len(segments) - 2:
            piece = F.normalize(piece, dim=-1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def nothing_returned(layers: Layers, text: Tensor) -> None:
    memories = [text.new_zeros(len(text), 4) for _ in layers]
    for piece in text.split(5, dim=1):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = piece.mean(1)


def results_without_pattern(layers: Layers, text: Tensor) -> dict[str, Tensor]:
    memories, found = [text.new_zeros(len(text), 4) for _ in layers], {}
    for s, piece in enumerate(text.split(5, dim=1)):
        for number, layer in enumerate(layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = piece.mean(1)
        found["even" * (s % 2 == 0) + "odd" * (s % 2) + str(s * s)] = piece
    return found


def top_to_bottom(layers: Layers, text: Tensor) -> Tensor:
    memory, pieces = text.new_zeros(len(text), 4), []
    for piece in text.split(5, dim=1):
        piece = piece + memory[:, None]
        for layer in layers:
            piece = torch.tanh(layer(piece))
        memory = piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def no_loop(layers: Layers, text: Tensor) -> Tensor:
    for layer in layers:
        text = torch.tanh(layer(text))
    return text


class Refusal(NamedTuple):
    """A model that is refused.

    Attributes:
        title: what is refused.
        example: the model.
        line: a part of the line that the message names; empty if there is none to name.
        reason: a part of the reason.
        instead: what to write instead.
    """

    title: str
    example: Callable[..., Any]
    line: str
    reason: str
    instead: str


REFUSALS = (
    Refusal(
        "A value of a tensor decides what runs",
        item,
        ".item()",
        "reads a tensor's value into Python",
        "Keep the decision in a tensor: `memories[number] = torch.where(piece.mean() > 0, piece.mean(1), "
        "memories[number])`. A value that the loop does not need is read after it.",
    ),
    Refusal(
        "Boolean indexing",
        boolean_indexing,
        "piece[piece > 0]",
        "depends on the data",
        "Use a mask of fixed shape: `(piece * (piece > 0)).sum() / (piece > 0).sum()`.",
    ),
    Refusal(
        "A memory that grows",
        growing_memory,
        "torch.cat([before, piece]",
        "grows",
        "Keep a window: `memories[number] = context[:, -16:]`. That is Transformer-XL "
        "(`rmtc/examples/transformer_xl.py`).",
    ),
    Refusal(
        "Gradients inside the forward",
        backward_inside,
        "torch.autograd.grad",
        "gradients",
        "Write it with `torch.func.grad`, which runs by the schedule (`rmtc/examples/ttt.py`), or as a formula, here "
        "`2 * (memory[:, None] - layer(piece)).sum(1)`.",
    ),
    Refusal(
        "A transform inside the forward",
        transform_inside,
        "read(piece",
        "uses torch.func.functionalize",
        "Call the function itself. Other transforms inside the forward run by the schedule: `vmap`, `grad`, `vjp`, "
        "`jvp`, `hessian`, `functional_call`. A transform around the whole call, `torch.func.vmap(model)(texts)`, runs "
        "as before.",
    ),
    Refusal(
        "A setting of torch that stays changed",
        setting_left,
        "",
        "leaves a setting of torch changed",
        "Change it before the call; or in the forward by a context manager, which puts it back: "
        "`with torch.set_grad_enabled(False):`.",
    ),
    Refusal(
        "What a tensor was before the call",
        asked,
        "weight.grad",
        "reads or sets grad of a tensor that was there before the call",
        "While a call is captured, tensors without values stand in for the user's: they have no gradient, are leaves "
        "and no views, and lie at the start of their memory. Shapes, dtypes, devices, strides and `requires_grad` can "
        "be asked for. Ask for the rest before the call, and pass the answer as an argument.",
    ),
    Refusal(
        "A result that requires gradients",
        flagged,
        "",
        "that requires gradients",
        "Call `requires_grad_()` on what the call returns.",
    ),
    Refusal(
        "Random numbers of a generator",
        own_generator,
        "torch.randn(4, generator=generator)",
        "a torch.Generator of its own",
        "Dropout draws from torch's own generator.",
    ),
    Refusal(
        "Random numbers of Python",
        python_random,
        "random.random()",
        "in place of",
        "Draw them before the loop, into a tensor that is an argument.",
    ),
    Refusal(
        "A branch on the segment's number",
        segment_in_a_branch,
        "if s % 2",
        "does not run what",
        "Let all segments run the same and choose with a tensor: `torch.where(odd[s], piece.mean(1), piece.amax(1))`, "
        "where `odd` is a tensor with an entry a segment. The first segments may be special, later ones may not.",
    ),
    Refusal(
        "A constant that is not affine in the segment's number",
        constant_of_the_segment,
        "2**s",
        "does not follow the pattern",
        "Compute it with tensors: `decay = decay / 2` once a segment, or a tensor of powers made before the loop and "
        "indexed by `s`. Whole numbers `a * s + b` are fine.",
    ),
    Refusal(
        "A list of numbers indexed by the segment's number",
        list_indexed_by_the_segment,
        "scales[s % 4]",
        "in place of",
        "Make it a tensor, a buffer or an argument, and read `scales[s]`: an index that advances with the segment.",
    ),
    Refusal(
        "Several last segments that are special",
        special_last_segments,
        "F.normalize",
        "does not run what",
        "Do it after the loop: take what the last segments made, and normalise that. One last segment may be special: "
        "it runs after the loop over all others.",
    ),
    Refusal(
        "Segments that nothing needs",
        nothing_returned,
        "",
        "no result of the call needs what its segments compute",
        "Return what the last segment made, or leave it in an attribute of the model. Of a loop that no result needs "
        "nothing can be checked.",
    ),
    Refusal(
        "Results whose number or names follow no pattern",
        results_without_pattern,
        "",
        "follows no pattern",
        "Return one tensor for all segments (`torch.cat`, `torch.stack`), a list with one item a segment, or a dict "
        'whose keys count on: `found[f"segment {s}"]`.',
    ),
    Refusal(
        "A memory from the top of a segment to the bottom of the next",
        top_to_bottom,
        "piece.mean(1)",
        "closes a cycle",
        "There is nothing to mend in the code: this is what the model computes. [designing.md](designing.md) says "
        "which memories do better.",
    ),
    Refusal(
        "No loop over segments",
        no_loop,
        "",
        "no loop over segments",
        "If the segments are folded into the batch, they run at once already. If the loop is in the code that calls "
        "this module, compile the function with the loop.",
    ),
)

_HEAD = """# Refusals

What rmtc cannot run by a schedule, runs as it did before: `rmtc.compile` warns once, `strict=True` raises, and
`rmtc.explain` answers with the reason. The message names the place, the reason and what to do. Each kind with a small
model, the message as it is printed, and what to write instead; `python tests/support/refusals.py` writes this page,
and a test holds it true. A "run of 3" is one of the short runs of the model in which rmtc looks for the loop, with 3
segments, counted from 0; `...` is a tensor that the model computes.

Every example is called with three layers and a text of six segments:

```python
layers = [torch.nn.Linear(4, 4) for _ in range(3)]
text = torch.randn(2, 30, 4)
rmtc.compile(example, strict=True)(layers, text)
```
"""


def message(refusal: Refusal) -> rmtc.RefusedError | rmtc.CaptureError:
    """What rmtc raises for an example."""
    random.seed(0)  # so that the page is the same each time
    layers = [nn.Linear(4, 4) for _ in range(3)]
    try:
        with torch.no_grad():
            rmtc.compile(refusal.example, strict=True)(layers, torch.randn(2, 30, 4))
    except (rmtc.RefusedError, rmtc.CaptureError) as error:
        return error
    finally:
        torch.set_default_dtype(torch.float32)
    raise ValueError(f"{refusal.title} is not refused")


def section(refusal: Refusal, error: rmtc.RefusedError | rmtc.CaptureError) -> str:
    """The part of docs/refusals.md for one refusal: lines are counted from the example's ``def``."""
    source, start = inspect.getsourcelines(refusal.example)
    text = re.sub(r"\S*\brefusals\.py:(\d+)", lambda found: f"example.py:{int(found[1]) - start + 1}", str(error))
    code = "".join(source).rstrip()
    return f"\n## {refusal.title}\n\n```python\n{code}\n```\n\n```text\n{text}\n```\n\n{refusal.instead}\n"


def page() -> str:
    """docs/refusals.md."""
    return _HEAD + "".join(section(refusal, message(refusal)) for refusal in REFUSALS)


if __name__ == "__main__":
    from pathlib import Path

    Path(__file__).parents[2].joinpath("docs", "refusals.md").write_text(page())
