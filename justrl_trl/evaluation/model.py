"""The model to be evaluated: its path, chat template, stop tokens, and a fingerprint of its weights."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from justrl_trl.data.tiny import TINY_BASE, tiny_base
from justrl_trl.errors import DataError

_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of each weight file; training changes every tensor


@dataclass(frozen=True)
class EvaluatedModel:
    """A model as an evaluation needs it.

    Attributes:
        name: as given.
        path: Hub id or local folder, for the servers.
        revision: commit of a Hub model.
        weights: commit, or fingerprint of a local folder's weight files: what tells two checkpoints of one path apart.
        context: tokens that it was made for; None where only the server can tell (stretched positions).
        stop_token_ids: tokens that end a response.
    """

    name: str
    path: str
    revision: str | None
    weights: str
    context: int | None
    stop_token_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    @property
    def slug(self) -> str:
        """A name for a folder: `JustRL-DeepSeek-1.5B`; of a checkpoint, the run's name too."""
        parts = [part for part in re.split(r"[/:]", self.name) if part not in ("", ".", "..")]
        return re.sub(r"[^\w.-]", "-", "-".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:]))


def find_model(name: str, revision: str | None) -> EvaluatedModel:
    """Configuration and tokenizer of a model; `embedded:tiny-base` is built on first use.

    Raises:
        DataError: there is no such model, or it has no weights.
    """
    path = str(tiny_base()) if name == TINY_BASE else name
    folder = Path(path).expanduser()
    if folder.is_dir():
        path = str(folder)
        if revision:
            raise DataError(f"model_revision={revision!r} has no meaning for the folder {path!r}. Leave it out.")
    elif folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1 or folder.parent.is_dir():
        raise DataError(
            f"model={name!r}: there is no such folder (looked from {str(Path.cwd())!r}). A model of the Hub is OWNER/NAME, "
            "read from where no folder is called OWNER."
        )
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())
        raise DataError(
            f"model={name!r} cannot be read: {words} Give a folder with config.json, tokenizer and weights, a Hub id, or "
            f"{TINY_BASE}."
        ) from error
    commit = None if folder.is_dir() else getattr(config, "_commit_hash", None) or revision
    return EvaluatedModel(
        name=name,
        path=path,
        revision=commit,
        weights=fingerprint(folder) if folder.is_dir() else commit or "main",
        context=_context(config),
        stop_token_ids=_stop_token_ids(path, commit, config, tokenizer),
        tokenizer=tokenizer,
    )


def fingerprint(folder: Path) -> str:
    """Hash of name, size and 64 blocks of each weight file: a checkpoint of gigabytes in well under a second.

    Raises:
        DataError: the folder has no weights.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    if not files:
        hint = " It is an adapter: merge it into its base model first." if (folder / "adapter_config.json").exists() else ""
        if any(folder.glob("pytorch_model*.bin")):
            hint = " Its weights are pickles, which are not loaded: save it again with save_pretrained."
        raise DataError(f"model={str(folder)!r}: there is no weight file in that folder (*.safetensors).{hint}")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as data:
            for block in range(_SAMPLED_BLOCKS):
                data.seek(block * max(size - _BLOCK_BYTES, 0) // (_SAMPLED_BLOCKS - 1))
                digest.update(data.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _context(config: PretrainedConfig) -> int | None:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    stretched = isinstance(rope, dict) and rope.get("rope_type", "default") not in ("default", "llama3")
    return None if stretched else getattr(text, "max_position_embeddings", None)


def _stop_token_ids(path: str, revision: str | None, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple:
    """Every token that some file of the model calls the end: vLLM's chat endpoint stops at all of them."""
    found = [tokenizer.eos_token_id, getattr(config.get_text_config(), "eos_token_id", None)]
    try:
        found.append(GenerationConfig.from_pretrained(path, revision=revision).eos_token_id)
    except OSError:
        pass  # a model need not have that file
    flat = [token for one in found for token in (one if isinstance(one, list) else [one])]
    return tuple(dict.fromkeys(token for token in flat if token is not None))
