"""What the owner of a checkpoint does with a compiled model: load, evaluate, adapt, save."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from held import one_in
from pairs import KINDS, Pair, captured_once, left_in, relative
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import rmtc
from rmtc.errors import FallbackWarning
from rmtc.examples import armt_gpt2, armt_llama

LAYERS, SEGMENT = 2, 4
SIZES: dict[str, Any] = {
    "layers": LAYERS,
    "width": 16,
    "heads": 2,
    "segment": SEGMENT,
    "memory": 2,
    "key_size": 4,
    "segments": 5,
    "batch": 3,
}


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


def pair_of(model: nn.Module, fast: Any = None, layers: int = LAYERS) -> Pair:
    """A model held against a copy that is never compiled."""
    eager = copy.deepcopy(model)
    return Pair(eager, fast or rmtc.compile(model), layers, lambda segments: segments + layers - 1)


class Texts(Dataset[dict[str, Tensor]]):
    """Texts of several lengths, each padded to the longest."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids = self.ids[number]
        mask = torch.ones_like(ids)
        mask[len(ids) - 3 * number :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("attention", one_in(2, ["sdpa", "eager"]))
def test_load_evaluate_save(attention: str, tmp_path: Path) -> None:
    source, _ = armt_llama.build(**SIZES)
    source.save_pretrained(tmp_path / "source")
    kind = armt_llama.ArmtLlamaForCausalLM
    model = kind.from_pretrained(tmp_path / "source", dtype=torch.bfloat16, attn_implementation=attention).eval()
    before = saved(model, tmp_path / "before")
    assert "model.safetensors" in before
    eager = copy.deepcopy(model)
    fast = rmtc.compile(model)
    _, (ids,) = armt_llama.build(**{**SIZES, "batch": 5})
    texts = Texts(ids[:, :-1])
    settings = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_eval_batch_size=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    metrics = {
        name: Trainer(model=each, args=settings, eval_dataset=texts).evaluate()
        for name, each in (("eager", eager), ("fast", fast))
    }
    stats = rmtc.stats(fast)
    assert stats.runs == 2 and captured_once(Pair(eager, fast, LAYERS, lambda s: s + LAYERS - 1))
    assert stats.last_run is not None
    assert (stats.last_run.segments, stats.last_run.batch, stats.last_run.tail) == (5, 2, 3)
    assert stats.last_run.steps == 5 + LAYERS - 1
    assert metrics["fast"]["eval_loss"] == pytest.approx(metrics["eager"]["eval_loss"], rel=1e-2)
    after, expected = saved(fast, tmp_path / "after"), saved(eager, tmp_path / "expected")
    assert after == expected, "the trainer changes the configuration of both"
    assert after["model.safetensors"] == before["model.safetensors"]
    wanted, found = left_in(eager), left_in(fast)
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            assert relative(found[name], value) < 3e-2, name


def test_the_trainer_wraps_the_forward_in_autocast(tmp_path: Path) -> None:
    model, (ids,) = armt_llama.build(**SIZES)
    pair = pair_of(model)
    settings = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True, bf16=True
    )
    metrics = [
        Trainer(model=each, args=settings, eval_dataset=Texts(ids)).evaluate()["eval_loss"]
        for each in (pair.eager, pair.fast)
    ]
    stats = rmtc.stats(pair.fast)
    assert (stats.runs, stats.fallbacks) == (1, {})
    assert stats.last_run is not None and stats.last_run.steps == 5 + LAYERS - 1
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-2)


@pytest.mark.full
def test_evaluations_between_epochs(tmp_path: Path) -> None:
    """Evaluations follow the weights, and saving checkpoints disturbs neither them nor the training."""
    model, (ids,) = armt_llama.build(**{**SIZES, "batch": 6})
    pair, losses = pair_of(model), []
    for name, each in (("eager", pair.eager), ("fast", pair.fast)):
        settings = TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_eval_batch_size=3,
            per_device_train_batch_size=3,
            num_train_epochs=3,
            learning_rate=1e-2,
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=each, args=settings, train_dataset=Texts(ids), eval_dataset=Texts(ids))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FallbackWarning)
            trainer.train()
        found = [warning for warning in caught if warning.category is FallbackWarning]
        assert not found
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert len(losses[0]) == 3 and losses[0][0] > losses[0][1] > losses[0][2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    stats = rmtc.stats(pair.fast)
    # The first checkpoint writes the architecture's name into the configuration; the later ones write it again.
    assert (stats.runs - stats.backwards, stats.fallbacks) == (6, {}) and stats.backwards


def test_a_list_may_be_replaced_by_one_that_holds_the_same() -> None:
    """As `save_pretrained` does with the configuration's; the new one is watched from then on."""

    class Tagged(models.ListMemory):
        def __init__(self) -> None:
            super().__init__()
            self.scales = {"one": [2.0, 3.0], "two": []}

        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * self.scales["one"][0]

    pair, text, at = small_pair(Tagged().double()), models.text(4, 2).double(), (4, 2, models.SEGMENT)
    pair.compare(at, (text,), {})
    for _ in range(2):
        pair.fast.scales = copy.deepcopy(pair.fast.scales)
        pair.compare(at, (text,), {})
    assert captured_once(pair)
    for each in (pair.eager, pair.fast):
        each.scales["one"][0] = 5.0
    pair.compare(at, (text,), {})
    assert captured_once(pair, 2)
    for each in (pair.eager, pair.fast):  # where the call writes to the list, its place matters
        each.memories = list(each.memories)
    pair.compare(at, (text,), {})
    assert rmtc.stats(pair.fast).fallbacks == {}


# Adapters


def adapted(model: nn.Module, targets: list[str], **settings: Any) -> Any:
    """The model with LoRA adapters none of which is zero."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        for name, parameter in whole.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    return whole


def associative() -> tuple[Any, Tensor]:
    """A small model with adapters, and a text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return adapted(models.Associative().double(), ["query", "value"]).double(), models.text(4, 2).double()


def small_pair(model: nn.Module) -> Pair:
    eager = copy.deepcopy(model)
    steps = models.LAYERS - 1
    return Pair(eager, rmtc.compile(model), models.LAYERS, lambda segments: segments + steps, models.SEGMENT)


@pytest.mark.full
def test_adapters_are_merged() -> None:
    """The base model is compiled. Merging writes to its weights and takes the adapters out of the way, and back."""
    whole, text = associative()
    at, base = (4, 2, models.SEGMENT), whole.base_model.model
    with torch.no_grad():
        plain = base(text)
        with whole.disable_adapter():
            bare = base(text)
    assert relative(bare, plain) > 1e-2
    pair = small_pair(base)
    pair.compare(at, (text,), {})
    whole.merge_adapter()
    with torch.no_grad():
        assert relative(pair.fast(text), plain) < 1e-10
    whole.unmerge_adapter()
    pair.compare(at, (text,), {})
    assert rmtc.stats(pair.fast).captures == 2, "the first is right again"
    with torch.no_grad():
        with whole.disable_adapter():
            assert relative(pair.fast(text), bare) < 1e-10
        assert whole.merge_and_unload() is pair.fast
        assert relative(pair.fast(text), plain) < 1e-10
    stats = rmtc.stats(pair.fast)
    assert (stats.runs, stats.fallbacks) == (5, {})


def test_a_model_with_adapters() -> None:
    """The whole is compiled; the adapters change in place, and are merged."""
    whole, text = associative()
    at, pair = (4, 2, models.SEGMENT), small_pair(whole)
    pair.compare(at, (text,), {})
    for model in (pair.eager, pair.fast):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.5)
    pair.compare(at, (text,), {})
    assert captured_once(pair)
    pair.eager.merge_adapter()
    pair.fast.merge_adapter()
    pair.compare(at, (text,), {})
    assert rmtc.stats(pair.fast).fallbacks == {}


AT, TIGHT = (5, 3, 3), 1e-7  # Llama's norms round to float32


@pytest.mark.full
@pytest.mark.parametrize(("kind", "inside"), [("llama", False), ("gpt2", True)])
def test_armt_with_adapters(kind: str, inside: bool) -> None:
    model, (ids,) = KINDS[kind].build(**SIZES, dtype="float64")
    given = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    targets = ["q_proj", "v_proj", "down_proj", "value"] if kind == "llama" else ["c_attn", "c_proj", "value"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # GPT-2 has both linear layers and transposed ones
        whole = adapted(model, targets).double()
    pair = pair_of(whole.base_model.model if inside else whole)
    pair.compare(AT, (), given, TIGHT)
    with torch.no_grad():
        plain = pair.eager(**given).logits
    if inside:
        assert whole.merge_and_unload() is pair.fast
    else:
        whole.merge_adapter()
    with torch.no_grad():
        assert relative(pair.fast(**given).logits, plain) < TIGHT
    stats = rmtc.stats(pair.fast)
    assert (stats.runs, stats.captures, stats.fallbacks) == (2, 2, {})


# Calls that are no segment loops


def test_generate_caches_and_short_calls_run_eager() -> None:
    from transformers.generation.utils import GenerationMixin

    class Generating(armt_llama.ArmtLlamaForCausalLM, GenerationMixin):  # type: ignore[misc]
        """An ARMT that generates without a cache."""

        def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
            return {"input_ids": input_ids}

        def forward(self, input_ids: Tensor, return_dict: bool = True) -> Any:  # type: ignore[override]
            return super().forward(input_ids)

    source, (ids,) = armt_llama.build(**{**SIZES, "layers": 1})
    model = Generating(source.config).eval()
    model.load_state_dict(source.state_dict())
    pair = pair_of(model, layers=1)
    with torch.no_grad():
        for number, short in enumerate((ids[:, :1], ids[:1, :SEGMENT], ids[:, :SEGMENT]), 1):
            assert torch.equal(pair.fast(short).logits, pair.eager(short).logits)
            assert rmtc.stats(pair.fast).eager == number
        settings = {"max_new_tokens": 3, "do_sample": False, "use_cache": False, "pad_token_id": 0}
        found, expected = (each.generate(ids, **settings) for each in (pair.fast, pair.eager))
    assert torch.equal(found, expected) and found.shape[1] > ids.shape[1]
    stats = rmtc.stats(pair.fast)
    assert (stats.runs, stats.captures, stats.fallbacks) == (0, 0, {})
    assert stats.eager == 3 + found.shape[1] - ids.shape[1]


def test_a_call_with_a_cache_runs_eager() -> None:
    class Cached(nn.Module):
        """Its caller may keep what it has read."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden: Tensor, past_key_values: list[Tensor] | None = None) -> Tensor:
            memories = [hidden.new_zeros(len(hidden), 4) for _ in self.layers]
            memories = memories if past_key_values is None else past_key_values
            pieces = []
            for piece in hidden.split(2, dim=1):
                for number, layer in enumerate(self.layers):
                    piece = torch.tanh(layer(piece) + memories[number][:, None])
                    memories[number] = piece.mean(1)
                pieces.append(piece)
            return torch.cat(pieces, dim=1)

    model = Cached().double()
    pair = Pair(copy.deepcopy(model), rmtc.compile(model), 3, lambda segments: segments + 2, 2)
    text, caches = torch.randn(2, 8, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    pair.compare((4, 2, 2), (text,), {})
    with torch.no_grad():
        one, other = (each(text, past_key_values=list(caches)) for each in (pair.fast, pair.eager))
    assert torch.equal(one, other)
    stats = rmtc.stats(pair.fast)
    assert (stats.runs, stats.eager, stats.fallbacks) == (1, 1, {})


# Lower precision


SINGLE, HALF = 1e-5, 3e-2


def bfloat16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_another_precision_is_another_capture() -> None:
    """Autocast around the call, and the model cast as a whole: both ways and back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.Associative()
    at, text, pair = (4, 2, models.SEGMENT), models.text(4, 2), small_pair(model)
    pair.compare(at, (text,), {}, SINGLE)
    with bfloat16():
        pair.compare(at, (text,), {}, HALF)
    assert rmtc.stats(pair.fast).captures == 2
    pair.compare(at, (text,), {}, SINGLE)
    assert rmtc.stats(pair.fast).captures == 2
    for dtype, tolerance in ((torch.bfloat16, HALF), (torch.float32, SINGLE)):
        for each in (pair.eager, pair.fast):
            each.to(dtype)
        pair.compare(at, (text.to(dtype),), {}, tolerance)
        assert next(pair.fast.parameters()).dtype == dtype
    assert rmtc.stats(pair.fast).fallbacks == {}


@pytest.mark.full
def test_armt_under_autocast() -> None:
    model, (ids,) = armt_gpt2.build(**SIZES)
    given = {"input_ids": ids[:, :-1], "labels": ids[:, :-1]}
    pair = pair_of(model)
    pair.compare(AT, (), given, 1e-4)
    with bfloat16():
        pair.compare(AT, (), given, HALF)
    pair.compare(AT, (), given, 1e-4)
    assert (rmtc.stats(pair.fast).captures, rmtc.stats(pair.fast).fallbacks) == (2, {})
