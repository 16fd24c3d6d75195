"""Every shipped recipe and launch configuration loads, and the paper recipes state every value of Table 2."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError
from justrl_trl.runs import arguments as run_arguments
from justrl_trl.runs.option_groups import GROUPS
from tests.unit.test_config import SCRIPT, TABLE_2

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PAPER = ("justrl_deepseek_1.5b", "justrl_nemotron_1.5b")
TINY = ROOT / "recipes" / "tiny.yaml"


@pytest.fixture
def parse(monkeypatch):
    """`parse(*options)`: what the launch line would make of these options."""

    def run(*options: str, default: Path = TINY):
        monkeypatch.setattr("sys.argv", ["grpo_justrl.py", *map(str, options)])
        return run_arguments.parse_run(default_recipe=default)

    return run


def test_the_promised_recipes_exist():
    assert {"tiny", *PAPER} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in RECIPES])
def test_every_recipe_loads_and_takes_effect(path, parse):
    run, training, model = parse("--config", path)
    for name, value in run_arguments.read_recipe(path).items():
        if name == "bf16" and not torch.cuda.is_available():
            continue  # a matter of the machine
        part = next(part for part in (run, training, model) if hasattr(part, name))
        expected = [value] if name == "report_to" else value  # HF makes it a list
        assert getattr(part, name) == expected, name


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_states_every_value_of_table_2_itself(name):
    stated = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    for key, value in TABLE_2.items():
        assert key in stated, f"{key} is left to its default"
        assert stated[key] == pytest.approx(value), key
    for key in SCRIPT.keys() & stated.keys() - {"num_rollout_steps"}:
        assert stated[key] == pytest.approx(SCRIPT[key]), key


@pytest.mark.parametrize(
    ("name", "model", "steps"),
    [
        ("justrl_deepseek_1.5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 4380),  # paper, section 4
        ("justrl_nemotron_1.5b", "nvidia/OpenMath-Nemotron-1.5B", 3440),
    ],
)
def test_a_paper_recipe_is_the_papers_run_on_32_ranks(name, model, steps, parse, ranks):
    ranks(32)
    run, training, models = parse("--config", ROOT / "recipes" / f"{name}.yaml")
    assert run.dataset_name == "BytedTsinghua-SIA/DAPO-Math-17k"
    assert models.model_name_or_path == model
    assert models.dtype == "float32"  # master weights: updates of 1e-6 vanish in bfloat16
    assert training.num_rollout_steps == steps and training.max_steps == 4 * steps
    assert training.generation_batch_size == 4 * 512
    assert training.per_device_train_batch_size == 16  # per rank and optimizer step
    assert training.per_device_train_batch_size * training.steps_per_generation == 64  # per rank and rollout step
    assert training.save_steps % training.optimizer_steps_per_rollout_step == 0


def test_the_two_paper_recipes_differ_in_model_length_and_folder_only():
    deepseek, nemotron = (yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()) for name in PAPER)
    different = {key for key in deepseek.keys() | nemotron.keys() if deepseek.get(key) != nemotron.get(key)}
    assert different == {"model_name_or_path", "num_rollout_steps", "output_dir"}


def test_the_embedded_recipe_fits_two_ranks(parse, ranks):
    ranks(2)
    _, training, model = parse("--config", TINY)
    assert model.model_name_or_path == "embedded:tiny-base"
    assert training.prompts_per_rollout_step == 32 and training.per_device_train_batch_size == 32  # 256 / 4 / 2
    # only sizes differ from the paper: the objective is the recipe's
    recipe = TABLE_2 | SCRIPT
    for key in ("epsilon", "epsilon_high", "delta", "beta", "num_generations", "steps_per_generation"):
        assert getattr(training, key) == pytest.approx(recipe[key]), key
    assert training.loss_normalization == recipe["loss_normalization"]


def test_without_config_the_default_recipe_is_used_and_options_win(parse):
    run, training, model = parse("--learning_rate", "5e-7", "--dry_run")
    assert training.learning_rate == 5e-7 and run.dry_run
    assert model.model_name_or_path == "embedded:tiny-base" and training.num_rollout_steps == 40


def test_both_spellings_of_config_are_understood(parse, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TINY.read_text() + "\nnum_rollout_steps: 3\n")
    assert parse(f"--config={path}")[1].max_steps == parse("--config", path)[1].max_steps == 4 * 3


def test_an_unknown_key_of_a_recipe_is_an_error_that_names_it(parse, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TINY.read_text() + "\nlerning_rate: 1.0e-6\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        parse("--config", path)


def test_an_unknown_option_is_an_error_that_names_it(parse):
    with pytest.raises(ValueError, match="--lerning_rate"):
        parse("--lerning_rate", "1e-6")


def test_an_option_with_an_impossible_value_is_an_error_that_names_it(parse):
    with pytest.raises(ConfigError, match="--learning_rate.*invalid float value: 'slow'.*--help lists the options"):
        parse("--learning_rate", "slow")


@pytest.mark.parametrize(("typo", "meant"), [("--lerning_rate", "--learning_rate"), ("--managed_server", "--managed_servers")])
def test_an_unknown_option_names_the_nearest_known_one(parse, typo, meant):
    with pytest.raises(ConfigError, match=f"{typo}: did you mean {meant}\\?"):
        parse(typo, "1")


def test_help_shows_what_users_set_in_groups_and_leaves_the_rest_to_help_all(parse, capsys):
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            parse(option)
    short, everything = capsys.readouterr().out.split("usage: ")[1:]
    groups = ["recipe and model:", "data:", "rollout step:", "objective and optimizer:", "rollout servers:", "Hub:"]
    assert sorted(groups, key=short.index) == groups
    assert len(short.splitlines()) < 250 < len(everything.splitlines())
    assert "--torch_compile_backend" in everything and "--torch_compile_backend" not in short
    assert "At least 1." in short and "--help_all shows" in short


def test_every_option_of_ours_is_in_a_group_of_the_help(parse):
    ours = {name for cls in (run_arguments.RunArguments, JustRLConfig) for name in vars(cls).get("__annotations__", {})}
    derived = {"per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "use_vllm", "vllm_mode"}
    fixed = {"beta", "temperature", "vllm_importance_sampling_correction", "vllm_server_base_url", "disable_tqdm"}
    assert ours - derived - fixed <= {name for names in GROUPS.values() for name in names}


def test_a_recipe_that_is_not_there_is_an_error_that_says_where_recipes_are(parse):
    with pytest.raises(ValueError, match=r"absent\.yaml: there is no such file. Recipes are in recipes"):
        parse("--config", "absent.yaml")


def test_a_recipe_without_a_model_is_an_error_that_says_what_to_give(parse, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset_name: embedded:arithmetic\n")
    with pytest.raises(ValueError, match="model_name_or_path is not set: give a Hub id"):
        parse("--config", path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ablation_overlong", {"overlong_buffer_length": 4096, "overlong_penalty_factor": 1.0}),
        (
            "ablation_overlong_robust_verifier",
            {"overlong_buffer_length": 4096, "overlong_penalty_factor": 1.0, "verifier": "robust"},
        ),
    ],
)
def test_an_ablation_of_figure_3_is_the_base_recipe_but_for_what_it_ablates(name, changes):
    base, ablation = (run_arguments.read_recipe(ROOT / "recipes" / f"{one}.yaml") for one in (PAPER[0], name))
    assert ablation == base | changes | {"output_dir": f"runs/{name}"}


def test_recipes_that_are_each_others_base_are_named(parse, tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"base: {other}.yaml\n")
    with pytest.raises(ValueError, match=r"each other's base: a\.yaml -> b\.yaml -> a\.yaml"):
        parse("--config", tmp_path / "a.yaml")


def test_a_base_that_is_not_there_is_named_with_who_asked(parse, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: absent.yaml\n")
    with pytest.raises(ValueError, match=r"base of .*mine\.yaml: .*absent\.yaml: there is no such file"):
        parse("--config", path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "a: [1\n"])
def test_a_recipe_that_is_no_list_of_keys_is_refused(parse, tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml (holds no keys|is not YAML)"):
        parse("--config", path)


# file, machines, processes over all of them, mixed precision
EXPECTED = {
    "zero3_cpu_2proc": (1, 2, "no"),
    "zero3_1gpu": (1, 1, "bf16"),
    "zero3_8gpu": (1, 8, "bf16"),
    "zero3_32gpu": (4, 32, "bf16"),  # 4 nodes x 8
}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *RECIPES, *(ROOT / "recipes").glob("*.md"), *LAUNCHES], ids=lambda p: p.name
)
def test_every_file_that_a_text_names_is_there(path):
    named = re.findall(
        r"\b(?:justrl_trl|recipes|accelerate_configs|tests)/[\w./-]+\.(?:py|ya?ml|md|sh|png)\b", path.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_launch_configuration_is_expected_here():
    assert {path.stem for path in LAUNCHES} == set(EXPECTED)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_launch_configuration_is_zero3_with_its_ranks(path):
    loaded = load_config_from_file(str(path))
    assert (loaded.num_machines, loaded.num_processes, loaded.mixed_precision) == EXPECTED[path.stem]
    assert loaded.distributed_type == DistributedType.DEEPSPEED
    assert loaded.deepspeed_config["zero_stage"] == 3
    assert loaded.use_cpu is False  # with true, accelerate drops DeepSpeed without a word


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("launch_name", EXPECTED)
def test_every_launch_configuration_shares_the_papers_batch(launch_name, name, ranks):
    processes = EXPECTED[launch_name][1]
    ranks(processes)
    stated = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    geometry = ("generation_batch_size", "steps_per_generation", "num_generations", "num_iterations")
    training = JustRLConfig(**{key: stated[key] for key in geometry})
    assert training.per_device_train_batch_size * processes == 512
    assert training.steps_per_generation == 4
