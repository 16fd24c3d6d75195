"""Checks of the machine, path of the model, and training data of a run."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
from datasets import Dataset
from huggingface_hub import whoami
from trl import ModelConfig

from justrl_trl.config import JustRLConfig
from justrl_trl.data.problems import (
    DataError,
    DataReport,
    load_problems,
    prepare_problems,
    split_heldout,
    to_training_dataset,
)
from justrl_trl.data.tiny import ARITHMETIC, TINY_BASE, arithmetic_problems, tiny_base_folder
from justrl_trl.errors import ConfigError
from justrl_trl.preflight.nodes import check_weight_address, check_writable_folder
from justrl_trl.runs.arguments import RunArguments


@dataclass
class TrainingData:
    """Prompts ready for the trainer, and what happened on the way there."""

    train: Dataset
    heldout: Dataset | None
    report: DataReport


def check_machine(training: JustRLConfig) -> None:
    """What rank 0 needs and its machine may lack: a folder for the run, an address for weights, a login at the Hub.

    Raises:
        ConfigError: which, and what to do.
    """
    if training.distributed_state.is_main_process:
        check_writable_folder(Path(training.output_dir))
        check_weight_address(training)
        if training.push_to_hub:
            check_hub_login(training)


def check_hub_login(training: JustRLConfig) -> None:
    """A token that the Hub knows, before hours of work are to be pushed with it.

    Raises:
        ConfigError: without one, or when the Hub cannot be reached.
    """
    try:
        whoami(token=training.hub_token)
    except (OSError, httpx.HTTPError) as error:  # no token, refused, offline
        raise ConfigError(
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
        build = [sys.executable, "-m", "justrl_trl.data.tiny"]
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
