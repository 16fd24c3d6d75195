"""Arguments of an evaluation, the settings that identify its samples, and its plan."""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from justrl_trl.choices import Grader
from justrl_trl.data.benchmarks import BENCHMARKS
from justrl_trl.data.tiny import ARITHMETIC
from justrl_trl.errors import ConfigError
from justrl_trl.evaluation.sampling import Request, Task
from justrl_trl.evaluation.tasks import OWN_SAMPLES
from justrl_trl.knobs import check_bounds, knob
from justrl_trl.option_parser import OptionParser

_SERVER = ("managed_servers", "rollout_servers", "weight_version", "server_dtype", "server_max_num_seqs", "server_kv_cache_mib")
GROUPS = {
    "what is evaluated": ("model", "model_revision", "benchmarks", "data_dir", "samples", "limit"),
    "sampling": ("temperature", "top_p", "max_new_tokens", "seed"),
    "grading": ("grader", "grading_workers"),
    "verifier": ("verifier_server", "verifier_model", "verifier_protocol", "verifier_concurrency"),
    "servers": (*_SERVER, "vllm_gpu_memory_utilization", "vllm_server_timeout", "request_timeout", "server_wait"),
    "output": ("output_dir", "dry_run"),
}


@dataclass
class EvaluateArguments:
    """What to evaluate. Defaults are the paper's protocol."""

    model: str = field(metadata={"help": "Hub id, local folder with safetensors (a checkpoint too), or embedded:tiny-base."})
    model_revision: str | None = knob(None, "Branch, tag or commit of a Hub model.")
    benchmarks: str = knob(
        "paper",
        f"Comma list of {', '.join(BENCHMARKS)}; paper (or all) for these nine; also any .parquet, .jsonl or .json "
        f"file of problems, and {ARITHMETIC}.",
    )
    data_dir: str | None = knob(None, "Folder with <NAME>/test.parquet as in thunlp/JustRL's data/; without it, the Hub.")
    samples: int | None = knob(
        None, f"Responses per problem; unset: 4 for math500, minerva, olympiad, {OWN_SAMPLES} for a file, else 32.", min=1
    )
    limit: int | None = knob(None, "Only the first so many problems of each benchmark, for a trial.", min=1)
    temperature: float = knob(0.7, "Sampling temperature; 0 is greedy.", min=0.0)
    top_p: float = knob(0.9, "Tokens beyond this share of the probability are never sampled.", above=0, max=1)
    max_new_tokens: int = knob(31_744, "Tokens of a response at most; longer ones are cut.", min=1)
    seed: int = knob(0, "Seed of the evaluation; every sample's own seed follows and is recorded.", min=0)

    managed_servers: int = knob(
        0, "Servers to start on this machine, a GPU (or a core) each; 0: one per GPU, one without any.", min=0
    )
    rollout_servers: list[str] | None = knob(
        None, "Use these running servers instead, e.g. http://10.0.0.5:8000; key in JUSTRL_SERVER_KEY."
    )
    weight_version: str = knob(
        "default", "Weights that given servers must hold: 'default' are those from disk, else the version a trainer pushed."
    )
    server_dtype: str = knob("bfloat16", "Precision of the weights: bfloat16, float16 or float32.")
    server_max_num_seqs: int = knob(256, "Sequences that a server decodes at once.", min=1)
    server_kv_cache_mib: int = knob(512, "KV cache of a managed CPU server, MiB.", min=1)
    vllm_gpu_memory_utilization: float = knob(0.85, "Share of a GPU for its managed server, 0-1.", above=0, max=1)
    vllm_server_timeout: float = knob(600.0, "Seconds to wait for a server to become healthy.")
    request_timeout: float = knob(3600.0, "Seconds that one response may take.")
    server_wait: float = knob(600.0, "Seconds to wait for a server when none is left; then it ends.")

    grader: str = knob(
        Grader.RULE.value,
        "rule: the paper's tables. math_verify: the paper's Figure 1.",
        choices=[grader.value for grader in Grader],
    )
    grading_workers: int = knob(0, "Processes that grade, where the text alone does not decide; 0: one per core.", min=0)
    verifier_server: str | None = knob(
        None, "OpenAI-compatible server that judges what the grader rejects; key in JUSTRL_VERIFIER_KEY."
    )
    verifier_model: str | None = knob(None, "Its name for the model; unset: the one it serves.")
    verifier_protocol: str = knob(
        "exact",
        "exact: without the question, as the paper's numbers were made. with_question: as the model was trained.",
        choices=["exact", "with_question"],
    )
    verifier_concurrency: int = knob(64, "Requests to the verifier at a time.", min=1)

    output_dir: str | None = knob(None, "Folder of samples and results; unset: runs/eval/<model>-<hash of the settings>.")
    dry_run: bool = knob(False, "Print the plan and exit; nothing is started or written.")

    def __post_init__(self):
        check_bounds(self)
        for url in self.rollout_servers or ():
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"rollout_servers: {url!r} is not an address. Write it as http://HOST:PORT.")
        if self.rollout_servers and self.managed_servers:
            raise ConfigError(
                f"managed_servers={self.managed_servers} and rollout_servers={self.rollout_servers}: start servers or use "
                "running ones, not both. Leave one out."
            )


def parse_evaluation() -> EvaluateArguments:
    """From the command line and `--config FILE`; options win.

    Raises:
        ConfigError: for an unknown key or option, or a value that makes no sense.
    """
    argv = [part for arg in sys.argv[1:] for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv:
        path = Path("".join(argv[argv.index("--config") + 1 :][:1]))
        if not path.is_file():
            raise ConfigError(f"--config {path}: there is no such file. Give a YAML file with the options' names as keys.")
    words = "Evaluate a model as the paper does. Every option is also a key of a YAML file given as --config FILE; options win."
    return OptionParser(EvaluateArguments, GROUPS, description=words).parse_args_and_config(argv)[0]


def settings_of(args: EvaluateArguments, slug: str, weights: str, stop_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """What must be equal for two responses to be samples of the same thing. Which benchmarks and how many samples is not in it:
    an evaluation may grow."""
    names = ("server_dtype", "weight_version", "temperature", "top_p", "max_new_tokens", "seed")
    own = {"model": slug, "weights": weights, "stop_token_ids": list(stop_token_ids)}
    return own | {name: getattr(args, name) for name in names}


def folder_of(args: EvaluateArguments, settings: dict[str, Any]) -> Path:
    """`--output_dir`, or one of its own for these settings: the same command comes back to it, and another one does not."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(args.output_dir or f"runs/eval/{settings['model']}-{digest}")


def grader_words(args: EvaluateArguments, verifier: str | None) -> str:
    """How responses are graded."""
    grader = "the rule grader" if args.grader == Grader.RULE else args.grader
    if not args.verifier_server:
        return grader
    named = verifier or args.verifier_model or f"the verifier at {args.verifier_server}"
    return f"{grader}, then {named} (protocol {args.verifier_protocol}) on what it rejects"


def evaluation_plan(
    args: EvaluateArguments,
    tasks: list[Task],
    requests: list[Request],
    missing: int,
    places: list[dict[str, Any]],
    weights: str,
    folder: Path,
) -> list[str]:
    """The plan of an evaluation, before anything expensive starts.

    Args:
        missing: samples to ask for.
        places: devices of managed servers.
        weights: what identifies them.
    """
    width = max(len(task.title) for task in tasks)
    each = [
        f"{task.title:<{width}}  {len(task.problems):>3} problems x {task.samples:>2} = {len(task.problems) * task.samples:>6,}"
        for task in tasks
    ]
    lengths = [len(request.prompt) for request in requests]
    kept = len(requests) - missing
    there = f"{kept:,} are there, {missing:,} are missing" if kept else "none is there yet"
    where = ", ".join(f"core {place['core']}" if place["gpu"] is None else f"GPU {place['gpu']}" for place in places)
    managed = f"{len(places)} managed vLLM server{'s' * (len(places) > 1)} on this machine ({where})"
    servers = ", ".join(args.rollout_servers or [managed])
    rows = [
        ("model", f"{args.model} (weights {weights})"),
        ("benchmarks", each[0]),
        *(("", line) for line in each[1:]),
        ("samples", f"{len(requests):,} responses of at most {args.max_new_tokens:,} tokens; {there}"),
        ("prompts", f"{min(lengths):,} to {max(lengths):,} tokens, chat template and boxed instruction included"),
        ("sampling", f"temperature {args.temperature:g}, top-p {args.top_p:g}, seed {args.seed}"),
        ("servers", f"{servers}, weights in {args.server_dtype}" if missing else "none needed: nothing is missing"),
        ("grader", grader_words(args, None)),
        ("results", f"{folder}/"),
    ]
    return ["plan", *(f"  {name:<13}{text}" for name, text in rows)]
