"""Answers from a memory: ``generate`` reads the prompt by the schedule, and gives the tokens of eager."""

from __future__ import annotations

import copy
import logging
import warnings
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from live import Live
from tokenizers import Tokenizer as Bytewise
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, pipeline

import rmtc
from rmtc.compiler import compiled_of
from rmtc.examples import answer, armt_gpt2, armt_llama, rmt_llama
from rmtc.examples.armt import ArmtForCausalLM
from rmtc.examples.generation import CACHE, SegmentCache
from rmtc.examples.text import token_ids
from rmtc.examples.train_armt import SEGMENTS, built
from rmtc.examples.train_armt import texts as train_texts

SEGMENT, LAYERS, NEW = 8, 2, 2 * 8 + 3
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


ARMTS = pytest.mark.parametrize("example", [armt_llama, armt_gpt2], ids=["llama", "gpt2"])


def made(example: Any = armt_llama) -> tuple[Any, Any]:
    """A compiled model, and the same as written, in float64."""
    sizes: dict[str, Any] = {"layers": LAYERS, "width": 32, "segment": SEGMENT, "memory": 2, "dtype": "float64"}
    model, eager = (example.build(**sizes)[0] for _ in range(2))
    return rmtc.compile(model, strict=True, schedule="shortest"), eager


def read_anew(model: Any, ids: Tensor) -> Tensor:
    """The same by another way: the whole text is read anew for each token."""
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "prompts"),
    [pytest.param(armt_llama, (1, 2, 3, 7, 16, 64), id="llama"), pytest.param(armt_gpt2, (1, 3, 7), id="gpt2")],
)
def test_greedy(example: Any, prompts: tuple[int, ...]) -> None:
    fast, eager = made(example)
    for segments in prompts:
        for length in {1, segments * SEGMENT - 3, segments * SEGMENT, segments * SEGMENT + 1}:
            ids, runs = token_ids(length, 2), rmtc.stats(fast).runs
            found = fast.generate(ids, **GREEDY)
            assert torch.equal(found, eager.generate(ids, **GREEDY))
            if length < 4 * SEGMENT:
                assert torch.equal(found, read_anew(eager, ids))
                assert torch.equal(found, eager.generate(ids, **GREEDY, use_cache=False))
            assert rmtc.stats(fast).runs == runs + (length > 2 * SEGMENT)
    last = rmtc.stats(fast).last_run
    assert last is not None and last.steps == last.segments + LAYERS - 1 and not rmtc.stats(fast).fallbacks


@ARMTS
def test_a_prompt_may_be_longer_than_the_positions_of_a_segment(example: Any) -> None:
    """Where nobody sets a length, 20 tokens are generated, as for a model without positions."""
    _, model = made(example)
    for length in (SEGMENT + 1, 3 * SEGMENT + 1):  # of SEGMENT + 2 positions
        ids, options = token_ids(length, 2), {"do_sample": False, "pad_token_id": 0}
        wanted = model.generate(ids, **options, max_new_tokens=20)
        given = GenerationConfig(**options)
        for more in (options, {**options, "use_cache": False}, {"generation_config": given}):
            assert torch.equal(model.generate(ids, **more), wanted)
        assert given.max_new_tokens is None
        five = GenerationConfig(**options, max_length=length + 5)
        assert torch.equal(model.generate(ids, generation_config=five), wanted[:, : length + 5])
        assert torch.equal(model.generate(ids, **options, max_length=length + 5), wanted[:, : length + 5])
        model.generation_config.max_new_tokens = 3
        assert torch.equal(model.generate(ids, **options), wanted[:, : length + 3])
        model.generation_config.max_new_tokens = None


def test_a_token_costs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = made()
    seen: list[int] = []
    beside = ArmtForCausalLM._beside

    def counted(self: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(inputs.shape[1])
        return beside(self, inputs, *args, **kwargs)

    monkeypatch.setattr(ArmtForCausalLM, "_beside", counted)
    fast.generate(token_ids(5 * SEGMENT + 2), **GREEDY)
    assert rmtc.stats(fast).runs == 1
    assert max(seen) == 2 and seen.count(2) == 1 + 2  # the open segment, and memory tokens twice
    assert seen.count(1) == NEW - 1


def test_peak_memory_of_the_prefill_does_not_grow_with_the_prompt() -> None:
    fast, eager = made()
    rmt = rmt_llama.build(layers=LAYERS, width=32, segment=SEGMENT, memory=2, dtype="float64")[0]
    call, peaks = compiled_of(fast), []
    assert call is not None
    ids = token_ids(192 * SEGMENT + 1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    for segments in (128, 144, 192):
        for _ in range(2):  # the second call begins with the memory that the first one leaves
            text, beside = ids[:, : segments * SEGMENT + 1], mask[:, : segments * SEGMENT + 1]
            fast.generate(text, **{**GREEDY, "max_new_tokens": 1}, attention_mask=beside)
        given = {"attention_mask": beside[:, :-1], "logits_to_keep": 1}  # of the call that generate makes
        with torch.no_grad(), Live(ids, mask, *fast.parameters()) as watch:
            call.captures.run_once((text[:, :-1],), given)
        last = rmtc.stats(fast).last_run
        assert last is not None and last.steps == segments + LAYERS - 1
        peaks.append(watch.peak)
    assert peaks[0] == peaks[1] == peaks[2] > 0
    for model in (eager, rmt):
        peaks = []
        for segments in (3, 5, 9):
            given = {"attention_mask": mask[:, : segments * SEGMENT], "logits_to_keep": 1}
            with torch.no_grad(), Live(ids, mask, *model.parameters(), *model.buffers()) as watch:
                model(ids[:, : segments * SEGMENT], **given)
            peaks.append(watch.peak)
        assert peaks[0] == peaks[1] == peaks[2] > 0


def test_a_memory_from_top_to_bottom() -> None:
    """RMT has no schedule; it generates by the same means."""
    eager = rmt_llama.build(layers=3, width=32, segment=SEGMENT, memory=2, dtype="float64")[0]
    for length in (1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 4 * SEGMENT + 5):
        ids = token_ids(length, 2)
        assert torch.equal(eager.generate(ids, **GREEDY), read_anew(eager, ids))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    other = torch.where(mask.bool(), ids, 7)
    found = [eager.generate(each, **GREEDY, attention_mask=mask, num_beams=2)[:, length:] for each in (ids, other)]
    assert torch.equal(*found)
    with torch.no_grad():
        whole = eager(ids).logits
        for keep in (1, SEGMENT + 2):
            torch.testing.assert_close(eager(ids, logits_to_keep=keep).logits, whole[:, -keep:], rtol=1e-10, atol=1e-10)


def test_a_memory_without_a_schedule_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "segment": SEGMENT, "memory": 2, "dtype": "float64"}
    fast, eager = rmtc.compile(rmt_llama.build(**sizes)[0]), rmt_llama.build(**sizes)[0]
    with caplog.at_level(logging.INFO, "rmtc"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", rmtc.FallbackWarning)
        for length in (4 * SEGMENT + 1, 4 * SEGMENT + 1, 6 * SEGMENT + 3):
            ids = token_ids(length, 2)
            assert torch.equal(fast.generate(ids, **GREEDY), eager.generate(ids, **GREEDY))
    stats = rmtc.stats(fast)
    assert stats.runs == 0 and sum(stats.fallbacks.values()) == 3  # a prompt each
    (said,) = [str(each.message) for each in caught if each.category is rmtc.FallbackWarning]
    assert "RmtLlamaForCausalLM runs as it did before" in said and "last_memory closes a cycle" in said
    assert sum("closes a cycle" in each for each in caplog.messages) == 1


SEVERAL = {"num_beams": 2, "num_return_sequences": 2, "do_sample": True}


@pytest.mark.parametrize(
    ("example", "options"), [(armt_llama, {"num_beams": 3}), (armt_llama, SEVERAL), (armt_gpt2, {"num_beams": 3})]
)
def test_beams(example: Any, options: dict[str, Any]) -> None:
    fast, eager = made(example)
    ids = token_ids(4 * SEGMENT + 5, 2)
    for _ in range(2):
        found = []
        for model in (fast, eager):
            torch.manual_seed(0)
            found.append(model.generate(ids, **{**GREEDY, **options}))
        assert torch.equal(*found)
    assert rmtc.stats(fast).runs == 2


@ARMTS
def test_sampling(example: Any) -> None:
    fast, eager = made(example)
    ids, found = token_ids(3 * SEGMENT + 1, 2), []
    for model in (fast, eager):
        torch.manual_seed(0)
        found.append(model.generate(ids, **{**GREEDY, "do_sample": True, "top_k": 9, "temperature": 1.3}))
    assert torch.equal(*found) and rmtc.stats(fast).runs == 1


def test_the_pipeline_for_text_generation() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Bytewise(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token=letters[0], padding_side="left")
    texts = [topics["assert"][: 5 * SEGMENT + 3], topics["yield"][: 3 * SEGMENT]]
    pair = made()
    found = [
        pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
            texts, batch_size=2, return_full_text=False, **GREEDY
        )
        for model in pair
    ]
    assert found[0] == found[1] and all(len(each["generated_text"]) > 0 for (each,) in found[0])
    assert rmtc.stats(pair[0]).runs == 1 and not rmtc.stats(pair[0]).fallbacks


@ARMTS
def test_padding_on_the_left(example: Any) -> None:
    fast, eager = made(example)
    ids = token_ids(5 * SEGMENT + 3, 3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, SEGMENT + 5)):
        mask[row, :padding] = 0
    for options in ({}, {"num_beams": 2}):
        given = {**GREEDY, **options, "attention_mask": mask}
        found = fast.generate(ids, **given)
        assert torch.equal(found, eager.generate(ids, **given))
        other = torch.where(mask.bool(), ids, 7)
        assert torch.equal(found[:, ids.shape[1] :], fast.generate(other, **given)[:, ids.shape[1] :])
    assert rmtc.stats(fast).runs == 4


def test_a_memory_serves_several_questions() -> None:
    fast, eager = made()
    text = token_ids(6 * SEGMENT + 2)
    fast.generate(text, **GREEDY)
    with torch.no_grad():
        fast(text[:, : 6 * SEGMENT])
    cache = SegmentCache(fast.config, fast.memories_left(), 6 * SEGMENT)
    for seed in range(3):
        question = torch.randint(256, (1, 5), generator=torch.Generator().manual_seed(seed))
        asked = torch.cat([text, question], dim=1)
        found = fast.generate(asked, **GREEDY, **{CACHE: copy.deepcopy(cache)})
        assert torch.equal(found, eager.generate(asked, **GREEDY))
    assert cache.get_seq_length() == 6 * SEGMENT


@ARMTS
def test_a_cache_continues_a_text(example: Any) -> None:
    _, eager = made(example)
    ids = token_ids(4 * SEGMENT + 3)
    with torch.no_grad():
        whole = eager(ids).logits
        for cuts in ([1, 2, 9, 4 * SEGMENT + 3], [SEGMENT, 2 * SEGMENT, 4 * SEGMENT + 3], [4 * SEGMENT + 3]):
            cache, pieces, start = SegmentCache(eager.config), [], 0
            for end in cuts:
                found = eager(ids[:, start:end], use_cache=True, **{CACHE: cache})
                assert found[CACHE] is cache
                start = end
                pieces.append(found.logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
            assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize(
    ("example", "fewer"), [(armt_llama, (1, 2, 3, SEGMENT)), (armt_gpt2, (2,))], ids=["llama", "gpt2"]
)
def test_logits_to_keep_and_tuples(example: Any, fewer: tuple[int, ...]) -> None:
    fast, eager = made(example)
    with torch.no_grad():
        for ids, models in ((token_ids(3 * SEGMENT + 2), [eager]), (token_ids(3 * SEGMENT), [eager, fast, fast])):
            whole = eager(ids).logits
            for keep in (1, 2, 3, SEGMENT, 2 * SEGMENT + 3, 1000) if len(models) == 1 else fewer:
                for model in models:
                    found = model(ids, logits_to_keep=keep).logits
                    torch.testing.assert_close(found, whole[:, -keep:], rtol=1e-10, atol=1e-10)
        assert isinstance(fast(ids, return_dict=False), tuple)
    assert rmtc.stats(fast).runs == 2 * len(fewer) + 1 and not rmtc.stats(fast).fallbacks


@pytest.mark.parametrize("example", [armt_llama, armt_gpt2, rmt_llama], ids=["llama", "gpt2", "rmt"])
def test_the_configuration_asks_for_tuples(example: Any) -> None:
    model = example.build(layers=1, segment=SEGMENT)[0]
    ids = token_ids(2 * SEGMENT + 2)
    wanted = model(ids).logits
    model.config.return_dict = False
    for given in ({}, {"use_cache": True}):
        (logits, *_) = found = model(ids, **given)
        assert isinstance(found, tuple)
        torch.testing.assert_close(logits, wanted)
    assert torch.equal(model(ids, return_dict=True).logits, wanted)
    assert model.generate(ids, **GREEDY).shape[1] > ids.shape[1]


@pytest.mark.parametrize("example", [armt_llama, armt_gpt2, rmt_llama], ids=["llama", "gpt2", "rmt"])
def test_a_loss_beside_the_cache_of_the_output(example: Any) -> None:
    model = example.build(layers=2, segment=SEGMENT, dtype="float64")[0]
    ids = token_ids(3 * SEGMENT + 2, 2)
    parameters = list(model.parameters())
    for more in ({}, {"num_items_in_batch": 7}, {"logits_to_keep": 1}):
        found, wanted = (model(ids, labels=ids, use_cache=each, **more) for each in (True, None))
        assert found[CACHE].get_seq_length() == ids.shape[1] and CACHE not in wanted
        torch.testing.assert_close((found.loss, found.logits), (wanted.loss, wanted.logits), rtol=1e-10, atol=1e-10)
        gradients = (torch.autograd.grad(each.loss, parameters, allow_unused=True) for each in (found, wanted))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_labels_are_not_lost_beside_a_cache() -> None:
    ids = token_ids(2 * SEGMENT + 2)
    for example in (armt_llama, armt_gpt2, rmt_llama):
        model = example.build(layers=1, segment=SEGMENT)[0]
        assert model.config.use_cache and model(ids, labels=ids).loss is not None  # of a Trainer, say
        caches: list[dict[str, Any]] = [{name: SegmentCache(model.config)} for name in ("cache", "past_key_values")]
        for given in caches:
            with pytest.raises(ValueError, match=r"do not go together: .* Call the model without cache"):
                model(ids, labels=ids, **given)
            assert model(ids, **given).loss is None


def test_what_takes_tokens_back_is_refused() -> None:
    fast, eager = made()
    ids = token_ids(2 * SEGMENT + 2)
    with pytest.raises((ValueError, NotImplementedError), match="be cropped"):  # by transformers, or by the cache
        fast.generate(ids, **GREEDY, prompt_lookup_num_tokens=3)
    with pytest.raises((ValueError, NotImplementedError), match="be cropped"):
        fast.generate(ids, **GREEDY, assistant_model=eager)
    with pytest.raises(NotImplementedError, match="a memory cannot be cropped"):
        SegmentCache(fast.config).crop(-1)
    with pytest.raises(ValueError, match="generate reads a tensor of token ids"):
        fast.generate(inputs_embeds=torch.zeros(1, 3, 32), **GREEDY)
    for wrong in (ids[0], ids[:, :0], ids.tolist()):
        with pytest.raises(ValueError, match="generate reads a tensor of token ids"):
            fast.generate(wrong, **GREEDY)
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="is a SegmentCache"):
            fast.generate(ids, **GREEDY, **{name: object()})
    with pytest.raises(ValueError, match=r"multiple of the segment size 8, not 18: .* Read 16 tokens before"):
        SegmentCache(fast.config, (), ids.shape[1])
    read = SegmentCache(fast.config, (), 2 * SEGMENT)
    with pytest.raises(ValueError, match="holds all of these 16 tokens"):
        fast.generate(ids[:, : 2 * SEGMENT], **GREEDY, past_key_values=read)
    for width in (1, 17, 19):
        with torch.no_grad(), pytest.raises(ValueError, match="attention_mask is"):
            eager(ids, attention_mask=torch.ones(1, width))


@ARMTS
def test_the_house_of_transformers(example: Any, tmp_path: Any) -> None:
    _, eager = made(example)
    eager.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.segment_size == SEGMENT and config.model_type == example.__name__.rpartition(".")[2]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(eager) and loaded.can_generate()
    fast, ids = rmtc.compile(loaded.eval(), strict=True, schedule="shortest"), token_ids(4 * SEGMENT + 1)
    assert torch.equal(fast.generate(ids, **GREEDY), eager.generate(ids, **GREEDY))
    assert rmtc.stats(fast).runs == 1


def test_the_answer_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    eager, fast = built().double().eval(), built().double().eval()
    rmtc.compile(fast, strict=True, schedule="shortest")
    text = train_texts(SEGMENTS, 1, torch.Generator().manual_seed(0))[0]
    memory = answer.read(fast, text)
    for key in range(3):
        question = torch.tensor([[key]])
        wanted = eager.generate(torch.cat([text, question], dim=1), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(answer.ask(fast, text, memory, question, 5), wanted[:, text.shape[1] + 1 :])
    assert rmtc.stats(fast).runs == 1  # it is read once
    for length in (0, 1, text.shape[1] - 1):
        with pytest.raises(ValueError, match=f"a multiple of the segment size 4, not .*{length}"):
            answer.read(fast, text[:, :length])
    with pytest.raises(ValueError, match=r"the text is \(1, N\)"):
        answer.read(fast, text.expand(2, -1))
    monkeypatch.setattr("sys.argv", ["answer", "--texts", "2"])
    answer.main()
    assert capsys.readouterr().out.count("text ") == 2
