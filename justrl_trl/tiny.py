"""The embedded default: a ~0.7M-parameter base model and an arithmetic task, both made in code, nothing downloaded.

A laptop should see the real recipe raise a real reward in minutes. So the base must start where a weak pretrained base starts: it
*can* do the task, but mostly does not. We draw its supervised warm-up from three kinds of answers,

    worked and boxed     "Ones: 7+5=12. Tens: 3+4+1=8. So the answer is \\boxed{82}."       reward +1
    worked, not boxed    "Ones: 7+5=12. Tens: 3+4+1=8. So the answer is 82."                reward -1
    guessed and boxed    "I guess \\boxed{79}."                                             reward -1 nearly always

and reinforcement learning then has to discover what it discovers at scale: that working it out pays, and that only a box is read.

Departures from the usual toy: operand pairs, not problems, are split, so 37 + 45 and 45 + 37 fall on the same side and held-out accuracy
means generalisation; and the tokenizer is a byte-level BPE in Qwen2's own format, because `AutoTokenizer` rebuilds whatever lies beside
a Qwen2 config with Qwen2's pre-tokenizer (a word-level tokenizer silently comes back as another one).

    python -m justrl_trl.tiny        # builds the base on first use (about a minute on one core) and prints its folder
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

ARITHMETIC = "embedded:arithmetic"
TINY_BASE = "embedded:tiny-base"

SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
TRAIN_JOIN, EVAL_JOIN = (
    "\n\n",
    " ",
)  # the reference joins with a blank line in training and with one space in evaluation

OPERANDS = range(10, 50)  # two digits each and two digits in the sum: every prompt has the same number of tokens
HELDOUT_PAIRS = 64  # unordered pairs, so 128 problems less one for every pair of equal operands
SEED = 0

EOS, PAD, TURN = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WARMUP_STEPS, WARMUP_BATCH, WARMUP_LR = (
    500,
    16,
    3e-3,
)  # optimizer steps, sequences, peak learning rate (cosine to a tenth)

ONES = ("Ones: {}.", "Units: {}.", "First {}.", "Start with {}.", "We have {}.", "Adding {}.")
TENS = (" Tens: {}.", " Then {}.", " Next {}.", " Also {}.", " And {}.", " Now {}.")
CLOSERS = (
    " So the answer is {}.",
    " The answer is {}.",
    " So it is {}.",
    " We get {}.",
    " Thus {}.",
    " Therefore {}.",
)
GUESSES = ("I guess {}.", "Maybe {}.", "It looks like {}.", "It is about {}.", "Probably {}.", "The answer is {}.")
GUESS_OFFSETS = (-20, -11, -10, -9, -2, -1, 0, 1, 2, 9, 10, 11)
MIXTURE = {"boxed": 0.28, "unboxed": 0.44, "guess": 0.28}


def arithmetic_problems(split: Literal["train", "heldout"]) -> list[dict[str, str]]:
    """Sums of two two-digit numbers as `{"problem", "solution"}` rows; the two splits share no unordered operand pair."""
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if a <= b]
    random.Random(SEED).shuffle(pairs)
    chosen = {"train": pairs[HELDOUT_PAIRS:], "heldout": pairs[:HELDOUT_PAIRS]}[split]
    ordered = [pair for a, b in chosen for pair in dict.fromkeys([(a, b), (b, a)])]
    return [{"problem": f"What is {a} + {b}?", "solution": str(a + b)} for a, b in ordered]


def _answer(a: int, b: int, rng: random.Random) -> str:
    """One warm-up answer to a + b, its kind drawn from `MIXTURE`."""
    kind = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
    if kind == "guess":
        return rng.choice(GUESSES).format(f"\\boxed{{{a + b + rng.choice(GUESS_OFFSETS)}}}")
    ones, carry = a % 10 + b % 10, "+1" if a % 10 + b % 10 > 9 else ""
    tens = (a + b) // 10
    work = rng.choice(ONES).format(f"{a % 10}+{b % 10}={ones}")
    work += rng.choice(TENS).format(f"{a // 10}+{b // 10}{carry}={tens}")
    return work + rng.choice(CLOSERS).format(f"\\boxed{{{a + b}}}" if kind == "boxed" else a + b)


def _examples(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (user message, answer) pairs over the train split; a quarter carry the evaluation's join."""
    rows = arithmetic_problems("train")
    while True:
        problem = rng.choice(rows)["problem"]
        a, b = int(problem.split()[2]), int(problem.split()[4].rstrip("?"))
        join = EVAL_JOIN if rng.random() < 0.25 else TRAIN_JOIN
        yield problem + join + SUFFIX, _answer(a, b, rng)


def _tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's normalizer and pre-tokenizer, trained on the task's text: any text encodes, digits stay single."""
    examples, rng = _examples(random.Random(SEED)), random.Random(SEED)
    texts = ["user\n", "assistant\n", "system\n"] * 100 + [text for _ in range(1000) for text in next(examples)]
    rng.shuffle(texts)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    )
    vocab = bpe.get_vocab()
    import json

    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens=[TURN],
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A freshly initialised float32 Qwen2: untied head as in the paper's models, head_dim 32 because vLLM on CPU dies on 16."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=H,
        num_hidden_layers=L,
        num_attention_heads=H // 32,
        num_key_value_heads=KV,
        head_dim=32,
        intermediate_size=FF,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=INIT_RANGE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _batch(examples: Iterator[tuple[str, str]], tokenizer: Qwen2Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The next warm-up batch: token ids (B, T), right-padded, and labels (B, T) that are -100 outside the answer and its EOS."""
    rows = []
    for user, answer in (next(examples) for _ in range(WARMUP_BATCH)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], add_generation_prompt=True, tokenize=False
        )
        rows.append((tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def _warm_up(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Supervised warm-up in place; right padding needs no attention mask under causal attention."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP_LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=WARMUP_LR, total_steps=WARMUP_STEPS, pct_start=0.1, final_div_factor=10, cycle_momentum=False
    )
    examples, start = _examples(random.Random(SEED + 1)), time.monotonic()
    for step in range(1, WARMUP_STEPS + 1):
        ids, labels = _batch(examples, tokenizer)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            seconds = time.monotonic() - start
            print(
                f"tiny base: warm-up step {step}/{WARMUP_STEPS}, loss {loss.item():.3f}, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )


INIT_RANGE = 0.05
H, L, KV, FF = 128, 2, 2, 512
