"""Command-line arguments and recipe files of the training scripts; a recipe may build on another one."""

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from trl import ModelConfig

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError
from justrl_trl.knobs import knob
from justrl_trl.option_parser import OptionParser
from justrl_trl.runs.option_groups import GROUPS

_HELP = {  # of TRL's ModelConfig, where this package does something else or more
    "model_name_or_path": "Hub id, local folder with safetensors, or embedded:tiny-base.",
    "model_revision": "Branch, tag or commit of a Hub model.",
    "dtype": "Dtype of the master weights; the recipe's is float32, and bf16 is compute only.",
    "attn_implementation": "auto: PyTorch's varlen FlashAttention on a GPU in bfloat16, else SDPA sequence by sequence. "
    "varlen, sdpa: that one. flash_attention_2, flash_attention_3: the installed package.",
}
_DESCRIPTION = "Every option is also a key of a recipe, a YAML file given as --config FILE; options win over the file."


@dataclass
class RunArguments:
    """What to train on. Names are TRL's where TRL has one."""

    dataset_name: str = knob(
        "BytedTsinghua-SIA/DAPO-Math-17k", "Hub id, local .parquet/.jsonl/.json file or folder, or embedded:arithmetic."
    )
    dataset_config: str | None = knob(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = knob("train", "Split to train on.")
    dataset_revision: str | None = knob(None, "Commit of a Hub dataset; pin it for a paper.")
    heldout_dataset_name: str | None = knob(
        None, "Problems to sample before and after training, in any format of dataset_name; split 'test' of a folder."
    )
    heldout_size: int = knob(0, "Without heldout_dataset_name: so many training problems are held out instead.", min=0)
    dry_run: bool = knob(False, "Print the resolved configuration and the plan, then exit.")


def parse_run(default_recipe: Path, *more: type) -> tuple:
    """Arguments from `--config FILE` and the command line; without any `--config`, from `default_recipe`.

    Args:
        default_recipe: YAML file.
        more: further dataclasses of arguments.

    Returns:
        `RunArguments`, `JustRLConfig`, `ModelConfig`, and one of each of `more`.

    Raises:
        ConfigError: for an unknown key or option, or a rule that is broken.
    """
    argv = sys.argv[1:]
    # an option is --config FILE for TrlParser, which does not know the --config=FILE spelling
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in argv:
        argv = ["--config", str(default_recipe), *argv]
    path = Path("".join(argv[argv.index("--config") + 1 :][:1]))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as whole:
        yaml.safe_dump(read_recipe(path), whole)
        whole.flush()
        argv[argv.index("--config") + 1] = whole.name
        own = {"this script": [field.name for one in more for field in dataclasses.fields(one)]} if more else {}
        parser = OptionParser((RunArguments, JustRLConfig, ModelConfig, *more), own | GROUPS, description=_DESCRIPTION)
        for name, words in _HELP.items():
            next(action for action in parser._actions if action.dest == name).help = words
        parsed = parser.parse_args_and_config(argv)
    if not parsed[2].model_name_or_path:
        raise ConfigError("model_name_or_path is not set: give a Hub id, a local folder, or embedded:tiny-base.")
    return tuple(parsed)


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The keys of a recipe file; with those of the recipe that its `base` names (relative to it) where it has none itself.

    Args:
        seen: recipes that led here.

    Raises:
        ConfigError: no such file, one that holds no keys, or recipes that are each other's base.
    """
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"Recipes are each other's base: {' -> '.join(p.name for p in (*seen, path))}. Break the circle.")
    if not path.is_file():
        asked = f"base of {seen[-1]}: {path}" if seen else f"--config {path}"
        raise ConfigError(f"{asked}: there is no such file. Recipes are in recipes/*.yaml.")
    try:
        keys = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{path} holds no keys. A recipe is a list of `name: value` lines, see recipes/tiny.yaml.")
    base = keys.pop("base", None)
    return keys if base is None else read_recipe(path.parent / base, (*seen, path)) | keys
