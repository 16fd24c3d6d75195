"""The embedded default: what the task promises, and what the base must be before any recipe can rely on it.

The base is built into the shared default cache, about a minute the first time on a machine. That it learns is the
business of the end-to-end tests.
"""

import hashlib
import json
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from justrl_trl.data import tiny
from justrl_trl.data.problems import EVAL_BOXED_SUFFIX, format_prompt
from justrl_trl.grading.strict import last_boxed

MAX_PROMPT_TOKENS = 48
# Plain text, the task, LaTeX, digits of three scripts, CJK, emoji with joiners, controls, spaces.
TEXTS = [
    "",
    " ",
    "What is 37 + 45?",
    "Ones: 7+5=12. Then 3+4+1=8. So it is \\boxed{82}.",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. It's 1,234.56 dollars!",
    "\\frac{1}{2} \\boxed{\\text{x}}{}}{",
    "naïve café Straße Ωμέγα ١٢٣ 数学四 한국어",
    "👩‍👩‍👧 🇨🇭 \u200b zero width",
    "tabs\tand\r\nnew\n\n\nlines   and   spaces ",
    "\x00\x01\x7f control",
]


def operands(split: str) -> list[tuple[int, int]]:
    return [tuple(map(int, re.findall(r"\d+", row["problem"]))) for row in tiny.arithmetic_problems(split)]


@pytest.fixture(scope="session")
def base() -> Path:
    return tiny.tiny_base()


@pytest.fixture(scope="session")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def test_no_unordered_operand_pair_is_in_both_splits():
    train, heldout = ({frozenset(pair) for pair in operands(split)} for split in ("train", "heldout"))
    assert not train & heldout


def test_splits_are_large_enough_and_hold_no_problem_twice():
    for split, at_least in (("train", 200), ("heldout", 64)):
        problems = [row["problem"] for row in tiny.arithmetic_problems(split)]
        assert len(set(problems)) == len(problems) >= at_least


def test_solutions_are_the_sums_as_text():
    for split in ("train", "heldout"):
        for row, (a, b) in zip(tiny.arithmetic_problems(split), operands(split), strict=True):
            assert row["solution"] == str(a + b)


def test_the_splits_never_change_and_leave_global_randomness_alone():
    """Pinned: a held-out problem of yesterday must not be a training problem of today."""
    state = random.getstate()
    heldout = "\n".join(row["problem"] for row in tiny.arithmetic_problems("heldout"))
    assert hashlib.sha256(heldout.encode()).hexdigest().startswith("53e10834fedc99cf")
    assert random.getstate() == state


def test_an_unknown_split_is_an_error():
    with pytest.raises(KeyError):
        tiny.arithmetic_problems("test")


def test_warm_up_answers_keep_the_mixture():
    """Shares of boxed answers and of rewarded ones, within 5 standard errors (n = 4000) of what `MIXTURE` says."""
    rng = random.Random(3)
    answers = [tiny._answer(37, 45, rng) for _ in range(4000)]
    boxes = [last_boxed(answer) for answer in answers]
    lucky = tiny.MIXTURE["guess"] * tiny.GUESS_OFFSETS.count(0) / len(tiny.GUESS_OFFSETS)
    assert sum(box is not None for box in boxes) / 4000 == pytest.approx(1 - tiny.MIXTURE["unboxed"], abs=0.04)
    assert sum(box == "82" for box in boxes) / 4000 == pytest.approx(tiny.MIXTURE["boxed"] + lucky, abs=0.04)
    assert all("7+5=12" in answer and "3+4+1=8" in answer for answer in answers if "+" in answer)


def test_a_cached_build_is_reused(base):
    before = {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
    assert tiny.tiny_base() == base == tiny.tiny_base_folder()
    assert {path.name: path.stat().st_mtime_ns for path in base.iterdir()} == before


def test_the_cache_is_the_argument_then_justrl_cache_then_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("JUSTRL_CACHE", "")  # empty counts as unset
    assert tiny.tiny_base_folder().parent == tmp_path / "xdg" / "justrl_trl"
    monkeypatch.setenv("JUSTRL_CACHE", str(tmp_path / "own"))
    assert tiny.tiny_base_folder().parent == tmp_path / "own"
    assert tiny.tiny_base_folder(tmp_path / "argument").parent == tmp_path / "argument"


def test_a_build_that_loses_the_race_takes_the_winners_folder(monkeypatch, tmp_path):
    folder = tiny.tiny_base_folder(tmp_path)

    def build_while_another_finishes(partial: Path) -> None:
        for place in (partial, folder):
            place.mkdir()
            (place / "by").write_text("loser" if place == partial else "winner")

    monkeypatch.setattr(tiny, "_build", build_while_another_finishes)
    assert (tiny.tiny_base(tmp_path) / "by").read_text() == "winner"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_build_leaves_nothing_behind_and_says_why(monkeypatch, tmp_path):
    threads = torch.get_num_threads()

    def fail(partial: Path) -> None:
        partial.mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(tiny, "_build", fail)
    with pytest.raises(OSError, match="No space left"):
        tiny.tiny_base(tmp_path)
    assert list(tmp_path.iterdir()) == [] and torch.get_num_threads() == threads


def test_the_module_prints_the_folder_last(base):
    printed = subprocess.run([sys.executable, "-m", "justrl_trl.data.tiny"], check=True, capture_output=True, text=True)
    assert printed.stdout.splitlines()[-1] == str(base)


def test_a_reloaded_tokenizer_gives_the_ids_of_the_one_that_was_trained(tokenizer):
    trained = tiny._tokenizer()
    chat = tokenizer.apply_chat_template(format_prompt("What is 37 + 45?"), tokenize=False)
    for text in [*TEXTS, chat, *(row["problem"] for row in tiny.arithmetic_problems("train")[:50])]:
        assert tokenizer(text)["input_ids"] == trained(text)["input_ids"], text
    assert tokenizer.get_vocab() == trained.get_vocab()
    assert tokenizer.chat_template == trained.chat_template == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    """Up to Qwen2's own NFC normalisation."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234567890")["input_ids"]) == list("1234567890")


def test_every_templated_prompt_of_the_task_is_short_and_all_are_equally_long(tokenizer):
    rows = tiny.arithmetic_problems("train") + tiny.arithmetic_problems("heldout")
    for suffix in ({}, {"suffix": EVAL_BOXED_SUFFIX}):
        messages = [format_prompt(row["problem"], **suffix) for row in rows]
        prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert len({len(prompt) for prompt in prompts}) == 1
        assert len(prompts[0]) <= MAX_PROMPT_TOKENS


def test_templated_text_and_templated_ids_agree(tokenizer):
    """Servers template and tokenize in one step, a trainer may do it in two."""
    messages = format_prompt("What is 37 + 45?")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer(text)["input_ids"] == ids
    assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_ends_with_eos_and_padding_is_another_token(base, tokenizer):
    generation = json.loads((base / "generation_config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert not {"temperature", "top_p", "top_k"} & generation.keys()  # a server would sample with them


def test_special_tokens_vanish_from_decoded_text(tokenizer):
    ids = tokenizer("<|im_start|>82<|im_end|><|endoftext|>")["input_ids"]
    assert len(ids) == 5
    assert tokenizer.decode(ids, skip_special_tokens=True) == "82"


def test_the_model_keeps_what_servers_and_recipes_need(base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = model.config
    assert config.model_type == "qwen2" and model.dtype == torch.float32
    assert config.head_dim >= 32  # vLLM on CPU fails with 16
    assert not config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert config.max_position_embeddings >= 2048
    assert config.vocab_size == len(tokenizer)  # every id the model can sample is a token
    assert 0.3e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6


def test_the_base_starts_weak_but_open_minded(base, tokenizer):
    """At T=1 on held-out problems: 12-35 % of responses are right and boxed, nearly all end, no opening dominates.

    500 responses have a standard error of 2 points; greedy decoding would show the (unboxed) mode and score about 0.
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = tiny.arithmetic_problems("heldout") * 4
    messages = [format_prompt(row["problem"]) for row in rows]
    prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=48
        )
        first_token = model(input_ids=prompts[:1]).logits[0, -1].softmax(-1)
    responses = tokenizer.batch_decode(tokens[:, prompts.shape[1] :], skip_special_tokens=True)
    right = [last_boxed(response) == row["solution"] for response, row in zip(responses, rows, strict=True)]
    ended = (tokens[:, prompts.shape[1] :] == tokenizer.eos_token_id).any(1)
    assert 0.12 < sum(right) / len(right) < 0.35
    assert ended.float().mean() > 0.95
    assert torch.special.entr(first_token).sum() > 1.5  # nats, of at most ln 12 = 2.5 for its twelve ways to begin
