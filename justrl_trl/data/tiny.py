"""The embedded arithmetic task and the 0.6M-parameter base model, both made in code.

A laptop should see the real recipe raise a real reward within minutes, so the base must start where a weak pretrained
base starts: it can do the task, but mostly does not. Its short supervised warm-up is drawn from three kinds of answer
to "What is 37 + 45?",

    worked, boxed      "Ones: 7+5=12. Then 3+4+1=8. So it is \\boxed{82}."      reward +1
    worked, unboxed    "Ones: 7+5=12. Then 3+4+1=8. So it is 82."              reward -1
    guessed, boxed     "It looks like \\boxed{73}."                            reward -1, but for a lucky guess

and reinforcement learning has to find what it finds at scale: only a box is read, working it out pays (so responses
grow longer), and the slips of a half-trained model can be unlearned.

Departures from the usual toy: unordered operand pairs are split, not problems, so that 37 + 45 never gives away a
held-out 45 + 37; and the tokenizer is a byte-level BPE in Qwen2's own format, because `AutoTokenizer` rebuilds
whatever lies beside a Qwen2 config with Qwen2's pre-tokenizer (a word-level tokenizer silently comes back as another
one). Bytes encode any text, so other data sets run on this model too, at about one token per letter.

    python -m justrl_trl.data.tiny        # builds it on first use (about a minute on one core) and prints its folder
"""

from __future__ import annotations

import hashlib
import json
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

from justrl_trl.data.problems import BOXED_SUFFIX, EVAL_BOXED_SUFFIX, format_prompt

# What a recipe writes for `dataset_name` and `model_name_or_path`.
ARITHMETIC = "embedded:arithmetic"
TINY_BASE = "embedded:tiny-base"

SEED = 0
OPERANDS = range(10, 50)  # two digits each and two in the sum: the tens never carry, and all prompts are equally long
HELDOUT_PAIRS = 64  # of 820 unordered operand pairs

# The warm-up's answers. Phrases are drawn uniformly: many equally good ways to say one thing keep the entropy healthy.
MIXTURE = {"boxed": 0.25, "unboxed": 0.46, "guess": 0.29}  # probabilities; they set the first reward, about -0.5
ONES = ("Ones: {}.", "Units: {}.", "First {}.", "Start with {}.", "We have {}.", "Adding {}.")
TENS = (" Tens: {}.", " Then {}.", " Next {}.", " Also {}.", " And {}.", " Now {}.")
CLOSERS = (" So the answer is {}.", " The answer is {}.", " So it is {}.", " We get {}.", " Thus {}.", " Hence {}.")
GUESSES = ("I guess {}.", "Maybe {}.", "It looks like {}.", "It is about {}.", "Probably {}.", "The answer is {}.")
GUESS_OFFSETS = (-20, -11, -10, -9, -2, -1, 0, 1, 2, 9, 10, 11)  # guess minus solution: one guess in twelve is right
EVAL_SHARE = 0.25  # share of warm-up prompts that join the instruction as evaluation does (a space, not a blank line)

WARMUP_STEPS = 300  # optimizer steps
WARMUP_BATCH = 32  # sequences per optimizer step
WARMUP_LR = 3e-3  # peak; one cosine cycle

MAX_POSITIONS = 4096  # tokens; the task needs under 100, byte-level prompts of real data sets need several hundred
VOCAB_LIMIT = 1024  # tokens; the task's words are all merged long before (about 400)
EOS, PAD, TURN = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def arithmetic_problems(split: Literal["train", "heldout"]) -> list[dict[str, str]]:
    """Sums of two two-digit numbers, as rows of `problem` and `solution`; the splits share no unordered operand pair.

    Example row: `{"problem": "What is 37 + 45?", "solution": "82"}`; 1,475 rows in train and 125 in heldout.
    """
    return [{"problem": f"What is {a} + {b}?", "solution": str(a + b)} for a, b in _operands(split)]


def tiny_base_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the base is, or will be: `tiny-base-<hash of this file>` in `cache_dir`, else in `$JUSTRL_CACHE`, else in
    `justrl_trl` under `$XDG_CACHE_HOME` or `~/.cache`. An empty variable counts as unset, as XDG has it."""
    if not (root := cache_dir or os.environ.get("JUSTRL_CACHE")):
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "justrl_trl"
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return Path(root).expanduser().absolute() / f"tiny-base-{digest[:12]}"


def tiny_base(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the base model (safetensors, tokenizer, chat template, generation config), built there on first use.

    The folder appears under its name only when complete, so any number of builds may run at once: the first wins.
    Where DeepSpeed's ZeRO-3 init hooks are active, build by running this module in a subprocess instead.
    """
    folder = tiny_base_folder(cache_dir)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{secrets.token_hex(4)}")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # sums split over threads round differently; one thread gives one machine one model
        _build(partial)
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():  # else: another process built the same base meanwhile, and ours is not needed
            raise
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _operands(split: Literal["train", "heldout"]) -> list[tuple[int, int]]:
    """Ordered operand pairs of one split, both orders of each chosen unordered pair."""
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if a <= b]
    random.Random(SEED).shuffle(pairs)
    chosen = {"train": pairs[HELDOUT_PAIRS:], "heldout": pairs[:HELDOUT_PAIRS]}[split]
    return [pair for a, b in chosen for pair in dict.fromkeys([(a, b), (b, a)])]


def _answer(a: int, b: int, rng: random.Random) -> str:
    """One warm-up answer to a + b; see the module docstring for the three kinds."""
    kind = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
    if kind == "guess":
        return rng.choice(GUESSES).format(f"\\boxed{{{a + b + rng.choice(GUESS_OFFSETS)}}}")
    ones, tens = a % 10 + b % 10, (a + b) // 10
    carry = "+1" if ones > 9 else ""
    work = rng.choice(ONES).format(f"{a % 10}+{b % 10}={ones}")
    work += rng.choice(TENS).format(f"{a // 10}+{b // 10}{carry}={tens}")
    return work + rng.choice(CLOSERS).format(f"\\boxed{{{a + b}}}" if kind == "boxed" else a + b)


def _examples(rng: random.Random) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Endless (messages, answer) pairs over the train split."""
    operands = _operands("train")
    while True:
        a, b = rng.choice(operands)
        suffix = EVAL_BOXED_SUFFIX if rng.random() < EVAL_SHARE else BOXED_SUFFIX
        yield format_prompt(f"What is {a} + {b}?", suffix), _answer(a, b, rng)


def _tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's normalizer and pre-tokenizer (digits stay single), trained on the task's text."""
    examples = _examples(random.Random(SEED))
    texts = ["system\n", "user\n", "assistant\n"] * 100  # the chat template's own words, often enough to be merged
    for messages, answer in (next(examples) for _ in range(1000)):
        texts += [messages[0]["content"], answer]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = sorted(to_bytes.alphabet())  # all 256 bytes, whether the texts hold them or not
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_LIMIT, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=[tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]],
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens=[TURN],
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A fresh float32 Qwen2: untied head as the paper's models have, head_dim 32 because vLLM on CPU fails with 16."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.05,  # the usual 0.02 suits layers ten times as wide
        dtype="float32",
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)  # no sampling defaults: servers would take them from here
    return model


def _batch(examples: Iterator, tokenizer: Qwen2Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The next warm-up batch: token ids (B, T), right-padded, and labels (B, T), -100 outside the answer and EOS."""
    rows = []
    for messages, answer in (next(examples) for _ in range(WARMUP_BATCH)):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        rows.append((prompt, [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _warm_up(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Supervised warm-up, in place. No attention mask: causal attention never looks right, where the padding is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=WARMUP_LR, total_steps=WARMUP_STEPS, pct_start=0.1, cycle_momentum=False
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
        if step % 50 == 0 or step == 1:
            _say(f"warm-up step {step}/{WARMUP_STEPS}, loss {loss.item():.2f}, {time.monotonic() - start:.0f} s")


def _build(folder: Path) -> None:
    """Build the base and save it into `folder`."""
    _say(f"building {TINY_BASE}, once, in {folder.parent} (about a minute)")
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    _warm_up(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _say(line: str) -> None:
    """A progress line on stderr: stdout carries the folder and nothing else."""
    print(f"tiny base: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(tiny_base())
