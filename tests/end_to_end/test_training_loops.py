"""The usual loops around a compiled model: Trainer, accelerate, several processes. What comes out is that of eager."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import rmtc
from rmtc.examples import armt_gpt2, armt_llama, train_armt
from rmtc.runtime import training

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"
LAYERS, SEGMENTS = 3, 3


class Ids(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Texts of three segments."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids = torch.randint(256, (20,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": torch.where(torch.arange(20) < 2 * number, -100, ids)}


def pair(dtype: str = "float64", example: Any = armt_llama) -> tuple[Any, Any]:
    """A model that is compiled, and its twin that is not."""
    eager, _ = example.build(layers=LAYERS, width=16, heads=2, segment=8, memory=2, key_size=4, dtype=dtype)
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fast = copy.deepcopy(eager)
    rmtc.compile(fast, schedule="shortest", strict=True)
    return fast, eager


def trainer(model: Any, folder: Path, steps: int, **more: Any) -> Trainer:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=1e-3, report_to=[], logging_steps=1, use_cpu=True,
        disable_tqdm=True, **{**sizes, **more},
    )  # fmt: skip
    return Trainer(model=model, args=settings, train_dataset=Ids(), eval_dataset=Ids())


def losses(trained: Trainer) -> list[float]:
    return [each["loss"] for each in trained.state.log_history if "loss" in each]


def alike(fast: Any, eager: Any, close: float = 1e-5) -> None:
    for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=1e-2 * close)


def ran(fast: Any, backwards: int) -> None:
    stats = rmtc.stats(fast)
    assert stats.backwards == backwards and not stats.fallbacks and stats.last_run is not None
    assert stats.last_run.steps == SEGMENTS + LAYERS - 1
    assert stats.last_run.backward is not None and stats.last_run.backward.steps == stats.last_run.steps


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    fast, eager = pair()
    trained = [trainer(model, tmp_path, 50, save_strategy="no") for model in (fast, eager)]
    for each in trained:
        each.train()
    found = [losses(each) for each in trained]
    assert len(found[0]) == 50
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    ran(fast, 100)
    alike(fast, eager)
    evaluated = [each.evaluate()["eval_loss"] for each in trained]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)
    assert rmtc.stats(fast).runs > 100 and not rmtc.stats(fast).fallbacks


def test_an_interrupted_backward_leaves_what_an_interrupted_eager_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that add up and the state of AdamW are as before it, and the next steps are those of eager."""
    fast, eager = pair()
    batch, visit, left = Ids()[3], training._visit, [0]
    batch = {name: each[None] for name, each in batch.items()}

    def interrupted(visited: set[int], number: int, gradients: Any) -> None:
        visit(visited, number, gradients)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_visit", interrupted)
    steps = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (fast, eager)]
    for model, optimizer in zip((fast, eager), steps, strict=True):
        model(**batch).loss.backward()
        optimizer.step()  # its gradients stay
    kept = [(each, each.detach().clone(), each.grad, each.grad.clone()) for each in fast.parameters()]
    state = copy.deepcopy(steps[0].state_dict())
    value, left[0] = fast(**batch).loss, 3
    with pytest.raises(KeyboardInterrupt):
        value.backward()
    assert left == [0] and rmtc.stats(fast).backwards == 1
    for each, before, gradient, was in kept:
        assert each.grad is gradient and torch.equal(gradient, was) and torch.equal(each, before)
    torch.testing.assert_close(steps[0].state_dict(), state, rtol=0, atol=0)
    for _ in range(2):
        for model, optimizer in zip((fast, eager), steps, strict=True):
            model(**batch).loss.backward()
            optimizer.step()
    ran(fast, 3)
    assert rmtc.stats(fast).captures == 1
    alike(fast, eager)
    torch.testing.assert_close(steps[0].state_dict(), steps[1].state_dict(), rtol=1e-4, atol=1e-7)


def test_a_checkpoint_that_eager_wrote_is_trained_on(tmp_path: Path) -> None:
    fast, eager = pair()
    first = trainer(eager, tmp_path, 4, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer(fast, tmp_path, 4, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(losses(second)[-2:], losses(first)[-2:], rtol=1e-6, atol=1e-6)
    ran(fast, 4)
    alike(fast, eager)


@pytest.mark.parametrize("example", [armt_llama, armt_gpt2], ids=["llama", "gpt2"])
def test_accumulated_batches_count_as_one(example: Any, tmp_path: Path) -> None:
    """Batches with unequal numbers of labels make about the step that one batch of all their texts makes."""
    plain = {"save_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    (fast, eager), (whole, before) = pair(example=example), pair(example=example)
    found = [trainer(each, tmp_path, 2, **plain) for each in (fast, eager)] + [
        trainer(whole, tmp_path, 2, **plain, **one)
    ]
    for each in found:
        each.train()
    ran(fast, 4)
    alike(fast, eager)
    moved = [
        torch.cat([(one - other).flatten() for one, other in zip(each.parameters(), before.parameters(), strict=True)])
        for each in (fast, whole)
    ]
    # Some releases count the first label of each text, which nothing predicts.
    assert 0 < (moved[0] - moved[1]).norm() < 0.1 * moved[1].norm() or torch.equal(*moved)


def test_gradient_checkpointing_is_left_to_rmtc(tmp_path: Path) -> None:
    fast, eager = pair()
    found = [trainer(model, tmp_path, 2, save_strategy="no") for model in (fast, eager)]
    found[1].args.gradient_checkpointing = True
    for each in found:
        each.train()
    torch.testing.assert_close(losses(found[0]), losses(found[1]), rtol=1e-6, atol=1e-6)
    ran(fast, 4)
    fast.gradient_checkpointing_enable()
    with pytest.raises(rmtc.RmtcError, match=r"gradient checkpointing; remedy: leave .* recompute='cells'"):
        fast(**{name: value[None] for name, value in Ids()[0].items()})


def test_the_trainer_with_adapters(tmp_path: Path) -> None:
    found = []
    for model in pair():
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        found.append(trainer(adapted, tmp_path, 3, save_strategy="no"))
        found[-1].train()
    torch.testing.assert_close(losses(found[0]), losses(found[1]), rtol=1e-6, atol=1e-6)
    fast, eager = (each.model.base_model.model for each in found)
    ran(fast, 6)
    alike(fast, eager)


def test_the_trainer_with_bfloat16(tmp_path: Path) -> None:
    fast, eager = pair("float32")
    trained = [trainer(model, tmp_path, 3, save_strategy="no", bf16=True) for model in (fast, eager)]
    for each in trained:
        each.train()
    torch.testing.assert_close(losses(trained[0]), losses(trained[1]), rtol=1e-2, atol=1e-2)
    ran(fast, 6)


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_accelerate(how: str) -> None:
    found = pair()
    for model in found:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=how == "foreach", fused=how == "fused")
        loader = torch.utils.data.DataLoader(Ids(), batch_size=2)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    fast, eager = found
    ran(fast, 4)
    alike(fast, eager, 1e-4)  # norms round to float32 inside, and AdamW divides by small gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_as_near_to_those_of_double_precision_as_eager_s(dtype: str) -> None:
    fast, eager = pair(dtype)
    exact = copy.deepcopy(eager).double()
    ids = torch.randint(256, (2, 17 * 8 - 3), generator=torch.Generator().manual_seed(0))
    for model in (fast, eager, exact):
        model(input_ids=ids, labels=ids).loss.backward()
    stats = rmtc.stats(fast)
    assert stats.backwards == 1 and stats.last_run is not None and stats.last_run.steps == 17 + LAYERS - 1
    wanted = torch.cat([each.grad.flatten() for each in exact.parameters()])
    far = [
        torch.linalg.vector_norm(torch.cat([each.grad.double().flatten() for each in model.parameters()]) - wanted)
        for model in (fast, eager)
    ]
    assert 0 < far[0] <= 2 * far[1]


def test_a_scaler_of_gradients() -> None:
    """A step with infinite gradients is left out, and the others are made of gradients that were scaled."""
    found, scales = pair(), []
    for model in found:
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), lr=0.1)
        for number, batch in enumerate(torch.utils.data.DataLoader(Ids(), batch_size=2)):
            loss = model(**batch).loss * (torch.inf if number == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
    fast, eager = found
    assert scales == [512.0, 512.0]
    ran(fast, 4)
    alike(fast, eager)


def test_parameters_that_lie_in_one_flat_buffer() -> None:
    """Optimizers that divide their states among processes (ZeRO 1 and 2) keep parameters and gradients like this."""
    found = pair()
    for model in found:
        parameters = [*model.parameters()]
        flat = torch.cat([each.detach().flatten() for each in parameters])
        gradients, at = torch.zeros_like(flat), 0
        for each in parameters:
            place = slice(at, at + each.numel())
            each.data, at = flat[place].view_as(each), place.stop

            def take(parameter: Tensor, own: Tensor = gradients[place]) -> None:
                assert parameter.grad is not None
                own += parameter.grad.flatten()
                parameter.grad = None

            each.register_post_accumulate_grad_hook(take)
        for batch in torch.utils.data.DataLoader(Ids(), batch_size=4):
            model(**batch).loss.backward()
            flat -= 0.1 * gradients
            gradients.zero_()
        assert all(each.data_ptr() == flat.data_ptr() for each in parameters[:1])
    fast, eager = found
    ran(fast, 2)
    alike(fast, eager)


def test_two_processes_train_together(tmp_path: Path) -> None:
    script, meeting = SUPPORT / "data_parallel.py", tmp_path / "meeting"
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(meeting)], stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for rank in range(2)
    ]
    for each in both:
        _, said = each.communicate(timeout=240)
        assert each.returncode == 0, said


def test_the_example_trains_as_eager_does() -> None:
    fast, eager = (train_armt.built(layers=2, width=16).double() for _ in range(2))
    rmtc.compile(fast, schedule="shortest", strict=True)
    found, expected = ([*itertools.islice(train_armt.train(model, 4), 12)] for model in (fast, eager))
    assert [(step.segments, step.right) for step in found] == [(step.segments, step.right) for step in expected]
    torch.testing.assert_close([each.loss for each in found], [each.loss for each in expected], rtol=1e-4, atol=1e-4)
    assert rmtc.stats(fast).backwards == 12 and not rmtc.stats(fast).fallbacks


def test_texts_of_the_example_ask_for_what_they_hold() -> None:
    ids, labels = train_armt.texts(5, 3, torch.Generator().manual_seed(0))
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        told = {row[at]: row[at + 1] for at in range(0, 16, 2) if row[at] < train_armt.KEYS}
        asked = [at for at, label in enumerate(wanted) if label >= 0]
        assert len(told) == len(asked) == train_armt.PAIRS and min(asked) > 16
        assert {row[at - 1]: wanted[at] for at in asked} == told


@pytest.mark.full
def test_the_example_learns_to_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, plot, weights = list[str](), tmp_path / "losses.svg", tmp_path / "weights.safetensors"
    monkeypatch.setattr(sys, "argv", ["", "--seconds", "120", "--plot", str(plot), "--save", str(weights)])
    train_armt.main(said.append)
    assert all(int(line.partition(" %")[0].split()[-1]) >= 90 for line in said[:2]), said
    assert plot.read_text().count("<polyline") == 2
    model = train_armt.built(seed=1)
    load_model(model, str(weights))
    rmtc.compile(model, schedule="shortest", strict=True)
    ids, labels = train_armt.texts(train_armt.SEGMENTS, 64, torch.Generator().manual_seed(99))
    with torch.no_grad():
        answers = model(ids).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] >= 0
    assert (answers == labels[:, 1:])[asked].double().mean() > 0.9 and rmtc.stats(model).runs == 1
