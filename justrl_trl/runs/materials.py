"""Find what a run needs before anything starts: tokenizer, data, benchmarks, memory and disk estimates."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError, JustRLError
from justrl_trl.policy.attention import choose_attention
from justrl_trl.preflight.checkpoint_disk import CheckpointDisk, checkpoint_disk
from justrl_trl.preflight.gpu_memory import ModelSize, Sharing, model_size
from justrl_trl.runs.arguments import RunArguments
from justrl_trl.runs.folder import RunFolder
from justrl_trl.runs.servers import plan_sharing
from justrl_trl.runs.setup import TrainingData, load_data, resolve_model
from justrl_trl.runs.validation import Validate


@dataclass
class Materials:
    """What was found; in a dry run, parts that could not be looked up are None.

    Attributes:
        attention: name of the attention implementation, see `policy.attention.choose_attention`.
        zero_stage: DeepSpeed ZeRO stage, 0 without DeepSpeed.
        sharing: how server and rank share a GPU; None if they do not.
        missing: in a dry run, what could not be looked up, and why.
    """

    attention: str
    zero_stage: int
    model_path: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    data: TrainingData | None = None
    validation: Validate | None = None
    disk: CheckpointDisk | None = None
    sharing: Sharing | None = None
    missing: list[str] = field(default_factory=list)


def find_materials(run: RunArguments, training: JustRLConfig, model: ModelConfig, folder: RunFolder) -> Materials:
    """Look everything up. In a dry run, what cannot be looked up is noted, and without a network nothing waits for one.

    Raises:
        JustRLError: outside a dry run, for the first part that cannot be used.
    """
    plugin = training.deepspeed_plugin
    found = Materials(
        attention=choose_attention(model.attn_implementation, training.bf16 or training.fp16),
        zero_stage=plugin.zero_stage if plugin else 0,
    )
    if run.dry_run and not _hub_answers():
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True

    def look_up(what: str, find: Callable[[], object]) -> object:
        try:
            return find()
        except JustRLError as error:
            if not run.dry_run:
                raise
            found.missing.append(f"{what} not looked up: {' '.join(str(error).split())[:160]}")
            return None

    found.model_path = resolve_model(model, training)
    found.tokenizer = look_up("tokenizer", lambda: load_tokenizer(found.model_path, model.model_revision))
    if found.tokenizer is not None:
        found.data = look_up("data", lambda: load_data(run, training, found.tokenizer))
        if training.validation_benchmarks:
            found.validation = look_up("benchmarks", lambda: Validate(training, found.tokenizer, folder))
    else:
        found.missing.append("data and benchmarks not looked up: they need the tokenizer")
    size = look_up("model size", lambda: load_size(found.model_path, model.model_revision))
    if size is not None:
        trained = size.parameters // 50 if model.use_peft else size.parameters  # adapters are a few per cent at most
        found.disk = checkpoint_disk(training, size.parameters, trained)
        shards = training.world_size if found.zero_stage == 3 else 1
        found.sharing = plan_sharing(training, size, shards=shards, trained=trained)
    return found


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Raises `ConfigError` if the model has none, or cannot be found."""
    return _loaded(model, lambda: AutoTokenizer.from_pretrained(model, revision=revision, padding_side="left"))


def load_size(model: str, revision: str | None) -> ModelSize:
    """Raises `ConfigError` if the model's config cannot be found, or is not that of a causal language model."""
    return _loaded(model, lambda: model_size(model, revision))


def _loaded(model: str, load: Callable):
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:  # from the Hub, the disk, or transformers' registries
        raise ConfigError(
            f"model_name_or_path={model!r} cannot be loaded ({type(error).__name__}: {str(error).strip().splitlines()[0]}). "
            "Give a Hub id, a local folder with a model and its tokenizer, or embedded:tiny-base."
        ) from error


def _hub_answers() -> bool:
    """Whether a connection to the Hub can be opened within three seconds, or goes through a proxy."""
    if getproxies().get("https"):
        return True
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True
