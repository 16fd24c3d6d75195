"""What an evaluation is asked to do: its arguments, the problems behind them, the settings that must not change, the plan."""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from justrl_trl.data.benchmarks import BENCHMARKS
from justrl_trl.data.tiny import ARITHMETIC
from justrl_trl.errors import ConfigError
from justrl_trl.evaluation.sampling import Request, Task
from justrl_trl.evaluation.tasks import OWN_SAMPLES


@dataclass
class EvaluateArguments:
    """What to evaluate. Defaults are the paper's protocol."""

    model: str = field(metadata={"help": "Hub id, local folder with safetensors (a checkpoint too), or embedded:tiny-base."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    benchmarks: str = field(
        default="paper",
        metadata={
            "help": f"Comma list of {', '.join(BENCHMARKS)}; paper (or all) for these nine; also any .parquet, .jsonl or .json "
            f"file of problems, and {ARITHMETIC}."
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with <NAME>/test.parquet as in thunlp/JustRL's data/; without it, the Hub."}
    )
    samples: int | None = field(
        default=None,
        metadata={
            "help": f"Responses per problem; unset: 4 for math500, minerva, olympiad, {OWN_SAMPLES} for a file, else 32."
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "Only the first so many problems of each benchmark, for a trial."}
    )
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=0.9, metadata={"help": "Tokens beyond this share of the probability are never sampled."})
    max_new_tokens: int = field(default=31_744, metadata={"help": "Tokens of a response at most; longer ones are cut."})
    seed: int = field(default=0, metadata={"help": "Seed of the evaluation; every sample's own seed follows and is recorded."})

    managed_servers: int = field(
        default=0,
        metadata={"help": "Servers to start on this machine, a GPU (or a core) each; 0: one per GPU, one without any."},
    )
    rollout_servers: list[str] | None = field(
        default=None,
        metadata={"help": "Use these running servers instead, e.g. http://10.0.0.5:8000; key in JUSTRL_SERVER_KEY."},
    )
    weight_version: str = field(
        default="default",
        metadata={
            "help": "Weights that given servers must hold: 'default' are those from disk, else the version a trainer pushed."
        },
    )
    server_dtype: str = field(default="bfloat16", metadata={"help": "Precision of the weights: bfloat16, float16 or float32."})
    server_max_num_seqs: int = field(default=256, metadata={"help": "Sequences that a server decodes at once."})
    server_kv_cache_mib: int = field(default=512, metadata={"help": "KV cache of a managed CPU server, MiB."})
    vllm_gpu_memory_utilization: float = field(default=0.85, metadata={"help": "Share of a GPU for its managed server, 0-1."})
    vllm_server_timeout: float = field(default=600.0, metadata={"help": "Seconds to wait for a server to become healthy."})
    request_timeout: float = field(default=3600.0, metadata={"help": "Seconds that one response may take."})
    server_wait: float = field(
        default=600.0, metadata={"help": "Seconds to wait for a server when none is left; then it ends."}
    )

    grader: str = field(
        default="rule",
        metadata={"help": "rule: the paper's tables. math_verify: the paper's Figure 1.", "choices": ["rule", "math_verify"]},
    )
    grading_workers: int = field(
        default=0, metadata={"help": "Processes that grade, where the text alone does not decide; 0: one per core."}
    )
    verifier_server: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible server that judges what the grader rejects; key in JUSTRL_VERIFIER_KEY."},
    )
    verifier_model: str | None = field(default=None, metadata={"help": "Its name for the model; unset: the one it serves."})
    verifier_protocol: str = field(
        default="exact",
        metadata={
            "help": "exact: without the question, as the paper's numbers were made. with_question: as the model was trained.",
            "choices": ["exact", "with_question"],
        },
    )
    verifier_concurrency: int = field(default=64, metadata={"help": "Requests to the verifier at a time."})

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of samples and results; unset: runs/eval/<model>-<hash of the settings>."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and exit; nothing is started or written."})

    def __post_init__(self):
        least = {"samples": 1, "limit": 1, "max_new_tokens": 1, "managed_servers": 0, "grading_workers": 0}
        least |= {"server_max_num_seqs": 1, "server_kv_cache_mib": 1, "verifier_concurrency": 1, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name}={value} makes no sense: it counts something. Give at least {minimum}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature}, top_p={self.top_p}: the first must not be negative, the second must lie in "
                "(0, 1]. The paper uses 0.7 and 0.9."
            )
        for url in self.rollout_servers or ():
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"rollout_servers: {url!r} is not an address. Write it as http://HOST:PORT.")
        if self.rollout_servers and self.managed_servers:
            raise ConfigError(
                f"managed_servers={self.managed_servers} and rollout_servers={self.rollout_servers}: start servers or use "
                "running ones, not both. Leave one out."
            )


def parse() -> EvaluateArguments:
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
    return TrlParser(EvaluateArguments, description=words).parse_args_and_config(argv)[0]


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
    grader = {"rule": "the rule grader", "math_verify": "math_verify"}[args.grader]
    if not args.verifier_server:
        return grader
    named = verifier or args.verifier_model or f"the verifier at {args.verifier_server}"
    return f"{grader}, then {named} (protocol {args.verifier_protocol}) on what it rejects"


def plan_lines(
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
