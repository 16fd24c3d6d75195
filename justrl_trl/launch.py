"""What the launch line does before there is a trainer: read arguments, find model and data, start or check the server."""

import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
import transformers
from datasets import Dataset
from huggingface_hub import whoami
from trl import ModelConfig, TrlParser

from justrl_trl.attention import check_attention
from justrl_trl.collectives import StoppedByRankZero
from justrl_trl.config import JustRLConfig
from justrl_trl.data import (
    DataError,
    DataReport,
    load_problems,
    prepare_problems,
    split_heldout,
    to_training_dataset,
)
from justrl_trl.optimizer import NonFiniteGradientError
from justrl_trl.pool import RolloutPool
from justrl_trl.progress import Waiting
from justrl_trl.rollout import RolloutClient, Unreachable
from justrl_trl.server import ManagedServer, ServerError, ServerSpec, check_compiler, pick_hardware
from justrl_trl.tiny import ARITHMETIC, TINY_BASE, arithmetic_problems, tiny_base_folder


@dataclass
class RunArguments:
    """What to train on. Names are TRL's where TRL has one."""

    dataset_name: str = field(
        default="BytedTsinghua-SIA/DAPO-Math-17k",
        metadata={"help": "Hub id, local .parquet/.jsonl/.json file or folder, or embedded:arithmetic."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit of a Hub dataset; pin it for a paper."})
    heldout_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Problems to sample before and after training, in any format of dataset_name; split 'test' of a folder."
        },
    )
    heldout_size: int = field(
        default=0, metadata={"help": "Without heldout_dataset_name: so many training problems are held out instead."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the resolved configuration and the plan, then exit."})


@dataclass
class TrainingData:
    """Prompts ready for the trainer, and what happened on the way there."""

    train: Dataset
    heldout: Dataset | None
    report: DataReport


def parse(default_recipe: Path, *more: type) -> tuple:
    """Arguments from `--config FILE` and the command line; without any `--config`, from `default_recipe`.

    Args:
        default_recipe: YAML file.
        more: further dataclasses of arguments.

    Returns:
        `RunArguments`, `JustRLConfig`, `ModelConfig`, and one of each of `more`.

    Raises:
        ValueError: for an unknown key or option, or a rule that is broken.
    """
    argv = sys.argv[1:]
    # an option is --config FILE for TrlParser, which does not know the --config=FILE spelling
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in argv:
        argv = ["--config", str(default_recipe), *argv]
    path = Path("".join(argv[argv.index("--config") + 1 :][:1]))
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file. Recipes are in recipes/*.yaml.")
    parsed = TrlParser((RunArguments, JustRLConfig, ModelConfig, *more)).parse_args_and_config(argv)
    if not parsed[2].model_name_or_path:
        raise ValueError("model_name_or_path is not set: give a Hub id, a local folder, or embedded:tiny-base.")
    return tuple(parsed)


def check_machine(training: JustRLConfig, model: ModelConfig) -> None:
    """What the run needs and this machine may lack: the attention it asks for, a login at the Hub.

    Raises:
        ValueError: which, and what to do.
    """
    check_attention(model.attn_implementation)
    if training.push_to_hub and training.distributed_state.is_main_process:
        check_hub_login(training)


def check_hub_login(training: JustRLConfig) -> None:
    """A token that the Hub knows, before hours of work are to be pushed with it.

    Raises:
        ValueError: without one, or when the Hub cannot be reached.
    """
    try:
        whoami(token=training.hub_token)
    except (OSError, httpx.HTTPError) as error:  # no token, refused, offline
        raise ValueError(
            f"push_to_hub=True, but the Hub does not answer with who you are ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Log in with `hf auth login`, or set HF_TOKEN, or leave --push_to_hub out and push "
            "the run folder later."
        ) from error


def resolve_model(model: ModelConfig, training: JustRLConfig) -> str:
    """Path or Hub id of the model; the embedded one is built on first use, once per machine, in a process of its own
    (ZeRO-3's initialisation hooks must not see it)."""
    if model.model_name_or_path != TINY_BASE:
        return model.model_name_or_path
    with training.distributed_state.local_main_process_first():
        if (folder := tiny_base_folder()).is_dir():
            return str(folder)
        launcher = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
        build = [sys.executable, "-m", "justrl_trl.tiny"]
        built = subprocess.run(build, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return built.stdout.strip().splitlines()[-1]


def load_data(run: RunArguments, training: JustRLConfig, tokenizer) -> TrainingData:
    """Load, check, deduplicate, hold out, template.

    Raises:
        DataError: with names, row numbers and the remedy.
    """
    with training.distributed_state.local_main_process_first():
        problems = _load(run.dataset_name, run.dataset_config, run.dataset_train_split, run.dataset_revision, "train")
        problems, report = prepare_problems(problems)
        heldout = None
        if run.heldout_dataset_name:
            heldout, _ = prepare_problems(_load(run.heldout_dataset_name, None, "test", None, "heldout"))
        elif run.dataset_name == ARITHMETIC:
            heldout, _ = prepare_problems(_load(ARITHMETIC, None, "test", None, "heldout"))  # it brings its own
        elif run.heldout_size:
            problems, heldout = split_heldout(problems, run.heldout_size, training.seed)
        kwargs = training.chat_template_kwargs
        train, report = to_training_dataset(problems, tokenizer, training.max_prompt_length, kwargs, report)
        if heldout is not None:
            heldout, _ = to_training_dataset(heldout, tokenizer, training.max_prompt_length, kwargs)
    if len(train) < training.prompts_per_rollout_step:
        raise DataError(
            f"{run.dataset_name}: {len(train)} prompts are fewer than the {training.prompts_per_rollout_step} of one rollout "
            f"step (generation_batch_size {training.generation_batch_size} / num_generations {training.num_generations}). "
            "Use a smaller generation_batch_size or more data."
        )
    return TrainingData(train, heldout, report)


def _load(name: str, config: str | None, split: str, revision: str | None, part: str) -> Dataset:
    if name == ARITHMETIC:
        rows = arithmetic_problems(part)
        return Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)])
    return load_problems(name, config, split, revision)


def start_servers(model: str, training: JustRLConfig, revision: str | None, log_path: Path) -> list[ManagedServer]:
    """Start the managed servers of this machine; returns at once (see `ManagedServer.wait`)."""
    check_compiler()
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), training.managed_servers
    if training.vllm_server_port and count > 1:
        raise ServerError(f"vllm_server_port={training.vllm_server_port} is one port, managed_servers={count}. Leave it at 0.")
    hardware = [pick_hardware(ranks, torch.cuda.device_count(), index, count) for index in range(count)]
    logs = [log_path.with_stem(f"{log_path.stem}_{index + 1}") if index else log_path for index in range(count)]
    specs = [server_spec(model, training, revision, log, **own) for log, own in zip(logs, hardware, strict=True)]
    return [ManagedServer(spec) for spec in specs]


def server_spec(model: str, training: JustRLConfig, revision: str | None, log_path: Path, **own) -> ServerSpec:
    """A server for this recipe; `own` says on which device, and what else is its own."""
    values = dict(
        model=model,
        revision=revision,
        dtype=training.server_dtype,
        max_model_len=training.vllm_max_model_length,
        host=training.vllm_server_host,
        port=training.vllm_server_port,
        max_num_seqs=training.server_max_num_seqs,
        kv_cache_bytes=training.server_kv_cache_mib << 20,
        gpu_memory_utilization=training.vllm_gpu_memory_utilization,
        seed=training.seed,
        log_path=log_path,
    )
    return ServerSpec(**values | own)


def connect(model: str, training: JustRLConfig, servers: list[ManagedServer]) -> RolloutPool:
    """The pool of this run: managed servers once they are healthy, or given ones as soon as all of them answer, and without
    those that do not within `vllm_server_timeout`. Each serves this model, at sufficient length, with weight transfer on.

    Raises:
        ServerError: which of these is not so, or that none answers, and what to do.
    """
    for server in servers:
        server.wait(training.vllm_server_timeout, Waiting(f"starting the vLLM server at {server.url}"))
    addresses = [(server.url, server.key) for server in servers] or [(url, None) for url in training.rollout_servers]
    clients = [RolloutClient(url, key, request_seconds=training.request_timeout) for url, key in addresses]
    missing = wait_for(clients, lambda client: check_server(client, model, training), training.vllm_server_timeout)
    pool = RolloutPool(
        clients,
        servers,
        max_num_seqs=training.server_max_num_seqs,
        heartbeat_timeout=training.server_heartbeat_timeout,
        wait_seconds=training.server_wait,
    )
    for member in pool.members:
        if member.client in missing:
            pool.lose(member, f"{missing[member.client]} The run starts without it, and uses it when it is there.")
    pool.require(lambda client: check_server(client, model, training))
    return pool


def wait_for(
    clients: list[RolloutClient], check: Callable[[RolloutClient], None], seconds: float
) -> dict[RolloutClient, Unreachable]:
    """Wait until all servers answer and pass `check`, but no longer than `seconds`.

    Returns:
        Those that did not answer, and why.

    Raises:
        ServerError: from `check`; or none of them answered.
    """
    missing: dict[RolloutClient, Unreachable | None] = dict.fromkeys(clients)
    started, told = time.monotonic(), Waiting("waiting for rollout servers")
    while True:
        for client in list(missing):
            try:
                check(client)
                del missing[client]
            except Unreachable as error:  # not up yet, perhaps
                missing[client] = error
        waited = time.monotonic() - started
        if not missing or waited > seconds:
            break
        told(waited)
        time.sleep(1)
    if len(missing) == len(clients):
        raise ServerError(
            f"No rollout server answered within vllm_server_timeout={seconds:.0f} s: "
            f"{' '.join(str(error) for error in missing.values())} Start them with recipes/serve.py, or check the addresses."
        )
    return missing


def check_server(client: RolloutClient, model: str, training: JustRLConfig) -> None:
    """Raises `ServerError` if the server is not one that this run can use."""
    url, config = client.url, client.vllm_config()
    served, length = config["model_config"]["model"], config["model_config"]["max_model_len"]
    if _canonical(served) != _canonical(model):
        raise ServerError(
            f"The server at {url} serves {served!r}, the trainer trains {model!r}. Weights of one do not fit the other: start "
            f"the server with --model {model}, or train with --model_name_or_path {served}."
        )
    if length < training.vllm_max_model_length:
        raise ServerError(
            f"The server at {url} holds sequences of {length} tokens, the recipe needs {training.vllm_max_model_length} "
            f"(prompt + response). Start it with --max-model-len {training.vllm_max_model_length}."
        )
    if not config.get("weight_transfer_config"):
        raise ServerError(
            f"The server at {url} was started without weight transfer. Add --weight-transfer-config "
            '\'{"backend": "justrl_gloo"}\' (or nccl on a GPU of its own).'
        )


def _canonical(model: str) -> str:
    return os.path.realpath(model) if os.path.isdir(model) else model


@contextlib.contextmanager
def one_paragraph_errors():
    """Mistakes in the input end the run with one paragraph and status 2 instead of a traceback per rank."""
    try:
        yield
    except (ValueError, ServerError, NonFiniteGradientError, StoppedByRankZero, OSError) as error:
        if os.environ.get("JUSTRL_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\nerror: {error}\n(JUSTRL_TRACEBACK=1 shows where.)", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the first rank to exit has the others terminated: let rank 0 speak
        sys.exit(2)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\ninterrupted. --resume_from_checkpoint True goes on from the last checkpoint, if there is one.", flush=True)
        sys.exit(130)


def quiet_libraries() -> None:
    """Keep other libraries' chatter from burying the plan: no per-rank repeats, no notes on what nobody here can change."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")
    transformers.utils.logging.disable_progress_bar()
    if int(os.environ.get("RANK", 0)):
        transformers.utils.logging.set_verbosity_error()
