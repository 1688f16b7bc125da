"""Batched generation equals generation of one text at a time, which equals plain argmax."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from architectures import ENCODER_DECODERS, Architecture, spanish_questions
from grasp_lora.generation.answer import can_answer_in_one_pass
from grasp_lora.generation.generate import GenerationSettings, StopAtNewline, generate_texts
from helpers import EOS_ID, PAD_ID, packaged_tokenizer, tiny_model, tiny_peft_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [[5, 6, 7, 8, 9, 10], [40, 41], [100], [7, 6, 5, 4]]
NEWLINE = TOKENIZER.encode("\n")[0]


class Numbers:
    """Decodes tokens to their ids, because different invalid bytes give the same text."""

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [spelled(row) for row in ids.tolist()]


def spelled(ids: Sequence[int]) -> str:
    return " ".join(str(i) for i in ids if i not in (PAD_ID, EOS_ID))


def texts(model: nn.Module, prompts: Any = PROMPTS, tokenizer: Any = None, **changes: Any):
    calls = {name: changes.pop(name) for name in ("advance", "notice") if name in changes}
    defaults: dict[str, Any] = {
        "max_new_tokens": 6,
        "batch_size": 4,
        "pad_id": PAD_ID,
        "stop_ids": [EOS_ID],
    }
    settings = GenerationSettings(**(defaults | changes))
    return generate_texts(model, tokenizer or Numbers(), prompts, settings, **calls)


@torch.no_grad()
def by_hand(model: nn.Module, prompt: Sequence[int], count: int = 6) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == EOS_ID:
            break
        ids.append(token)
    return ids[len(prompt) :]


@torch.no_grad()
def beams_by_hand(model: nn.Module, prompt: Sequence[int], beams: int, count: int) -> list[int]:
    """Return a textbook beam search: the best mean log probability of the first `beams` ended."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for step in range(1, count + 1):
        grown: list[tuple[float, list[int]]] = []
        for total, new in alive:
            logits = model(input_ids=torch.tensor([[*prompt, *new]])).logits[0, -1]
            best = logits.log_softmax(-1).topk(2 * beams)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            grown += [(total + value, [*new, token]) for value, token in pairs]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        last = step == count
        for total, new in grown[:beams]:
            if last or new[-1] == EOS_ID:
                ended.append((total / step, new))
        ended = sorted(ended, reverse=True)[:beams]
        alive = [(total, new) for total, new in grown if new[-1] != EOS_ID][:beams]
        if len(ended) == beams:
            break
    return ended[0][1]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_batched_generation_equals_argmax_without_batch_or_cache(arch):
    model = tiny_model(arch)
    assert texts(model) == [spelled(by_hand(model, prompt)) for prompt in PROMPTS]


def test_the_batch_size_changes_nothing():
    model = tiny_model("llama")
    assert texts(model, batch_size=1) == texts(model, batch_size=3)


@pytest.mark.parametrize(("arch", "seed"), [("llama", 3), ("llama", 11), ("qwen3", 0)])
def test_beam_search_equals_the_textbook_without_batch_or_cache(arch, seed):
    model = tiny_model(arch, seed=seed)
    raise_logit(model, EOS_ID, 0.3)  # so that some beams end early
    found = texts(model, beams=3, max_new_tokens=8)
    assert found == [spelled(beams_by_hand(model, prompt, 3, 8)) for prompt in PROMPTS]
    assert found != texts(model, max_new_tokens=8)
    assert len({len(text.split()) for text in found}) > 1


def raise_logit(model: Any, token: int, factor: float) -> None:
    """Make a token likely: set its output weights to the mean of often chosen tokens."""
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        chosen = sorted({i for prompt in PROMPTS for i in by_hand(model, prompt)} - {EOS_ID})
        weight[token] = factor * weight[chosen].sum(0)


def not_ended_by_hand(model: nn.Module, prompt: Sequence[int], least: int) -> list[int]:
    ids = list(prompt)
    for made in range(6):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].detach().clone()
        if made < least:
            logits[EOS_ID] = -torch.inf
        token = int(logits.argmax())
        if token == EOS_ID:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("beams", [1, 2])
def test_no_answer_ends_before_its_least_tokens(beams):
    model = tiny_model("llama", seed=3)
    raise_logit(model, EOS_ID, 5.0)
    assert "" in texts(model), "a model that is to end at once somewhere"
    for least in (1, 3):
        found = texts(model, min_new_tokens=least, beams=beams)
        assert all(len(text.split()) >= least for text in found)
        if beams == 1:
            assert found == [spelled(not_ended_by_hand(model, p, least)) for p in PROMPTS]
    assert texts(model, min_new_tokens=0) == texts(model)


@pytest.mark.parametrize("least", [-1, 7])
def test_least_tokens_out_of_range_are_refused(least):
    with pytest.raises(ValueError, match=rf"must be 0 to 6 \(max_new_tokens\), got {least}"):
        texts(tiny_model("llama"), min_new_tokens=least)


def test_without_prompts_there_are_no_texts():
    assert texts(tiny_model("llama"), []) == []


def test_progress_counts_every_row_once():
    seen: list[int] = []
    texts(tiny_model("llama"), batch_size=3, advance=seen.append)
    assert seen == [3, 1]


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "beams"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        texts(tiny_model("llama"), **{name: 0})


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt holds no tokens"):
        texts(tiny_model("llama"), [[1], []])


@pytest.mark.parametrize("wrap", [lambda model: model, tiny_peft_model], ids=["bare", "peft"])
def test_the_models_own_generation_settings_neither_act_nor_warn(wrap):
    model = wrap(tiny_model("llama"))
    expected = texts(model)
    base = model.get_base_model() if wrap is tiny_peft_model else model
    own = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_p=0.5,
        top_k=3,
        repetition_penalty=9.0,
        max_length=2,
        pad_token_id=1,
    )
    base.generation_config = own
    assert logged_by_transformers(lambda: texts(model) == expected) == []
    assert texts(model) == expected
    assert base.generation_config is own
    # The settings do act where generate() is called without this library.
    plain = model.generate(input_ids=torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=6)
    assert spelled(plain[0, len(PROMPTS[0]) :].tolist()) != expected[0]


def logged_by_transformers(call: Callable[[], bool]) -> list[str]:
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        assert call()
    finally:
        logger.removeHandler(handler)
    return records


def test_dropout_is_off_and_every_module_gets_its_mode_back():
    model = tiny_peft_model(tiny_model("llama"), lora_dropout=0.9)
    expected = texts(model)
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert texts(model) == expected
    assert [module.training for module in model.modules()] == modes


def test_the_mode_comes_back_after_an_error():
    model = tiny_model("llama").train()
    model.generate = out_of_memory_above(0)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a prompt of 1 tokens does not fit the memory"):
        texts(model, [[1]])
    assert model.training


def out_of_memory_above(rows: int, generate: Any = None, sizes: list[int] | None = None) -> Any:
    def limited(**inputs: Any) -> Tensor:
        if sizes is not None:
            sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(**inputs)

    return limited


def test_batches_that_do_not_fit_are_halved_and_no_row_is_lost():
    model = tiny_model("llama")
    prompts = [*PROMPTS, [1, 2], [3, 4, 5], [9]]
    expected = texts(model, prompts)
    sizes: list[int] = []
    notices: list[str] = []
    done: list[int] = []
    model.generate = out_of_memory_above(2, model.generate, sizes)  # type: ignore[method-assign]
    found = texts(model, prompts, batch_size=5, notice=notices.append, advance=done.append)
    assert found == expected
    assert sizes == [5, 2, 2, 2, 1]
    assert done == [2, 2, 2, 1]
    assert notices == ["out of memory with a batch size of 5; continuing with 2"]


class Scripted(nn.Module):
    """Generates given tokens; the first token of a prompt selects the script."""

    def __init__(self, scripts: Sequence[Sequence[int]]):
        super().__init__()
        self.model = tiny_model("llama")
        self.generation_config = None
        self.scripts = scripts
        self.steps = 0

    def generate(self, input_ids: Tensor, stopping_criteria: Any, **_: Any) -> Tensor:
        ids, length = input_ids, input_ids.shape[1]
        done = torch.zeros(len(ids), dtype=torch.bool)
        for step in range(len(self.scripts[0])):
            new = [PAD_ID if d else self.scripts[r][step] for r, d in enumerate(done.tolist())]
            ids = torch.cat([ids, torch.tensor(new).unsqueeze(1)], 1)
            done |= stopping_criteria(ids, None) if len(stopping_criteria) else done
            self.steps = ids.shape[1] - length
            if done.all():
                break
        return ids


def written(text: str, count: int) -> list[int]:
    return (TOKENIZER.encode(text) + TOKENIZER.encode("x" * count))[:count]


def test_a_row_ends_at_the_line_break_behind_its_first_word():
    model = Scripted([written(t, 12) for t in ("ab\ncd", "\n \n red\nno", "\n\n\n\n\n\n")])
    prompts = [[1, 1, 1], [2, 2], [3]]
    found = texts(model, prompts, tokenizer=TOKENIZER)
    assert found == ["ab\n", "\n \n red\n", "\n\n\n\n\n\nxxxxxx"]
    assert model.steps == 12


def test_texts_of_several_lines_run_on():
    model = Scripted([written("ab\ncd\n\nef", 12)])
    assert texts(model, [[1]], tokenizer=TOKENIZER, one_line=False) == ["ab\ncd\n\nefxxx"]


def test_beams_do_not_end_at_a_line_break():
    model = tiny_model("llama")
    raise_logit(model, NEWLINE, 1.0)
    greedy, beams = ({"beams": count, "tokenizer": TOKENIZER} for count in (1, 2))
    wide = texts(model, **beams)
    assert wide == texts(model, one_line=False, **beams)
    assert texts(model, **greedy) != texts(model, one_line=False, **greedy)
    assert any("\n" in text.strip() for text in wide)


@pytest.mark.parametrize("one_line", [True, False])
def test_a_rule_of_the_caller_ends_a_text_at_a_line_break_too(one_line):
    model = tiny_model("llama")
    raise_logit(model, NEWLINE, 1.0)
    free = texts(model, tokenizer=TOKENIZER, one_line=False, max_new_tokens=40)
    assert any("\n\n" in text for text in free), "a model that writes blank lines"
    settings = {"tokenizer": TOKENIZER, "one_line": one_line, "max_new_tokens": 40}
    found = texts(model, ended=lambda text: "\n\n" in text, **settings)

    def expected(text: str) -> str:
        for end in range(1, len(text) + 1):
            begun = text[:end]
            if begun[-1] == "\n" and ("\n\n" in begun or (one_line and "\n" in begun.lstrip())):
                return begun
        return text

    assert found == [expected(text) for text in free]


def test_only_rows_at_a_line_break_are_decoded():
    calls: list[int] = []

    class Counting:
        def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
            calls.append(ids.shape[1])
            return TOKENIZER.batch_decode(ids, skip_special_tokens=skip_special_tokens)

    rule = StopAtNewline(Counting(), 2)
    ids = torch.tensor([[1, 1, *written("one line\n", 200)]])
    stops = [bool(rule(ids[:, : 3 + i], torch.empty(0))) for i in range(200)]
    assert stops.index(True) == len("one line")
    letters = len(set("one line\nx"))
    assert sum(calls) == letters + len("one line\n")  # each new letter, then one text


def byte_bpe() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with merges that put line breaks into longer tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["red.\n\n  blue\n\tгод\n\u3000年\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer of pieces with byte fallback, as in SentencePiece models."""
    words = ["\u2581", "\u2581red", "blue", "\n", "\n\n", ".\n", "\t", "\u3000", "\u2581\u2581"]
    pieces = ["<unk>", "<end>", *[f"<0x{i:02X}>" for i in range(256)], *words]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": tiny_tokenizer,
    "byte-level BPE": byte_bpe,
    "pieces": sentence_pieces,
    "smollm2": lambda: packaged_tokenizer("smollm2"),
    "gemma3-270m": lambda: packaged_tokenizer("gemma3-270m"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "gemma3-270m" else n for n in TOKENIZERS],
)
def test_rows_stop_where_decoding_them_at_every_step_would_stop_them(name):
    tokenizer = TOKENIZERS[name]()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, len(tokenizer), (300,), generator=generator).tolist()
    # Line breaks, white space and halves of characters in plenty.
    spelled_out = "\n \n\n.\n\t \r\n\u3000\u00a0 red\n年 \n<0x0A>"
    special = [tokenizer.eos_token_id] * 4
    pool = torch.tensor([*whole, *12 * tokenizer.encode(spelled_out), *special])
    rows = pool[torch.randint(0, len(pool), (200, 14), generator=generator)]
    rows[:50, :3] = torch.tensor(tokenizer.encode("\n")[-1])  # leading line breaks
    rule = StopAtNewline(tokenizer, 2)
    found = torch.full((200,), 99)
    expected = torch.full((200,), 99)
    for step in reversed(range(2, 14)):
        written_so_far = tokenizer.batch_decode(rows[:, 2 : step + 1], skip_special_tokens=True)
        found[rule(rows[:, : step + 1], torch.empty(0))] = step
        expected[torch.tensor(["\n" in text.lstrip() for text in written_so_far])] = step
    assert found.tolist() == expected.tolist()
    assert 20 < (expected < 99).sum() < 199


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("one", ENCODER_DECODERS, ids=lambda one: one.name)
def test_an_encoder_decoder_writes_what_transformers_writes_one_by_one(
    one: Architecture, beams: int
):
    model, asked = one.model(), spanish_questions(one)
    rows, tokenizer = [each.row for each in asked], one.tokenizer()
    start, pad, end = rows[0].sides.start, model.config.pad_token_id, tokenizer.eos_token_id
    model.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "encoder_attn." in name or "EncDecAttention." in name:
                weight *= 3  # so that what is written depends on what is read
    begins = {"decoder_start_token_id": start[0]}
    if len(start) == 2:
        begins["forced_bos_token_id"] = start[1]
    wanted = [
        model.generate(
            input_ids=torch.tensor([each.prompt]),
            max_new_tokens=5 + len(start) - 1,
            num_beams=beams,
            early_stopping=beams > 1,
            do_sample=False,
            **begins,
        )[0, len(start) :].tolist()
        for each in asked
    ]
    prompts = [row.input_ids[: row.prompt_length] for row in rows]
    changes = {"pad_id": pad, "stop_ids": [end], "start": start, "beams": beams}
    found = texts(model, prompts, tokenizer, max_new_tokens=5, **changes)
    assert found == tokenizer.batch_decode(wanted, skip_special_tokens=True)
    assert len(set(found)) > 1
    assert not can_answer_in_one_pass(model)
