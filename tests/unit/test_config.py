"""The defaults are the paper's run, the geometry is 4 x 512 on any number of ranks, and every rule says what to do instead."""

import pytest
import torch

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError

# Table 2 of arXiv 2512.16649; "k" is 1,024 there, as the script spells it out
TABLE_2 = {
    "num_generations": 8,  # rollout n
    "generation_batch_size": 256 * 8,  # train batch size 256 prompts
    "steps_per_generation": 256 // 64,  # mini-batch size 64 prompts
    "max_prompt_length": 1024,  # 1k
    "max_completion_length": 15 * 1024,  # 15k
    "epsilon": 1 - 0.8,  # clip ratio range [0.8, 1.28]
    "epsilon_high": 1.28 - 1,
    "learning_rate": 1e-6,
    "temperature": 1.0,
    "beta": 0.0,  # use KL loss: no
    "entropy_coef": 0.0,  # use entropy regularization: no
    "scale_rewards": "group",  # advantage estimator: GRPO
}
# what the paper does not say: the script of the released code, and what its trainer does where the script is silent
SCRIPT = {
    "delta": 10.0,  # actor.clip_ratio_c
    "max_tokens_per_micro_batch": 32768,  # actor.ppo_max_token_len_per_gpu
    "warmup_rollout_steps": 10,  # optim.lr_warmup_steps
    "weight_decay": 0.1,  # optim.weight_decay
    "max_grad_norm": 1.0,  # actor.grad_clip
    "gradient_checkpointing": True,  # model.enable_gradient_checkpointing
    "vllm_gpu_memory_utilization": 0.85,  # rollout.gpu_memory_utilization
    "save_rollout_steps": 50,  # trainer.save_freq
    "num_rollout_steps": 4380,  # paper, section 4: the checkpoint of its tables
    "num_iterations": 1,  # trainer: ppo_epochs
    "lr_scheduler_type": "constant",  # trainer: constant after warm-up
    "adam_beta1": 0.9,  # torch's defaults
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "advantage_epsilon": 1e-6,  # core_algos
    "loss_normalization": "reference",  # dp_actor: token mean of a micro-batch x its share of the sequences
    "importance_sampling_level": "token",  # core_algos: the ratio is per token
    "vllm_importance_sampling_correction": False,  # there is none
    "mask_truncated_completions": False,  # truncated responses train fully
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "seed": 1,  # the sampler's
}


def config(**given) -> JustRLConfig:
    return JustRLConfig(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("validation_samples", 0),
        ("validation_temperature", -1.0),
        ("validation_top_p", 0.0),
        ("validation_top_p", 1.5),
        ("validation_every", 0),
        ("overlong_penalty_factor", -1.0),
        ("overlong_penalty_factor", float("nan")),
        ("verifier", "lenient"),
        ("validation_grader", "model"),
    ],
)
def test_values_of_validation_and_ablations_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {value!r}"):
        JustRLConfig(**{name: value})


@pytest.mark.parametrize("name", TABLE_2)
def test_default_is_the_value_of_table_2(name, ranks):
    ranks(32)
    assert getattr(config(), name) == pytest.approx(TABLE_2[name])


@pytest.mark.parametrize("name", SCRIPT)
def test_default_is_the_value_of_the_reference_script(name, ranks):
    ranks(32)
    assert getattr(config(), name) == SCRIPT[name]


def test_context_holds_prompt_and_response():
    assert config().vllm_max_model_length == 1024 + 15360
    assert config(max_prompt_length=10, max_completion_length=20).vllm_max_model_length == 30
    assert config(vllm_max_model_length=32768).vllm_max_model_length == 32768


def test_paper_geometry_on_32_ranks(ranks):
    ranks(32)
    paper = config()
    assert paper.world_size == 32  # HF agrees on how many ranks there are
    assert paper.per_device_train_batch_size == 16  # 512 / 32 per optimizer step
    assert paper.per_device_train_batch_size * paper.world_size == 512
    assert paper.steps_per_generation * paper.per_device_train_batch_size == 64  # per rank and rollout step
    assert paper.generation_batch_size == 2048
    assert paper.prompts_per_rollout_step == 256
    assert paper.optimizer_steps_per_rollout_step == 4
    assert paper.gradient_accumulation_steps == 1


@pytest.mark.parametrize(("count", "per_device"), [(1, 512), (2, 256), (8, 64), (16, 32), (512, 1)])
def test_any_number_of_ranks_shares_the_same_batch(count, per_device, ranks):
    ranks(count)
    got = config()
    assert (got.world_size, got.per_device_train_batch_size, got.generation_batch_size) == (count, per_device, 2048)


def test_steps_are_counted_in_rollout_steps():
    run = config(num_rollout_steps=40, save_rollout_steps=20)
    assert (run.max_steps, run.save_steps, run.logging_steps, run.warmup_steps) == (160, 80, 4, 0)
    assert [run.rollout_step(step) for step in (0, 3, 4, 159, 160)] == [0, 0, 1, 39, 40]


def test_passes_over_a_rollout_step_multiply_its_optimizer_steps():
    run = config(num_rollout_steps=10, num_iterations=3, steps_per_generation=2)
    assert run.optimizer_steps_per_rollout_step == 6
    assert (run.max_steps, run.logging_steps, run.rollout_step(12)) == (60, 6, 2)


def test_no_checkpoint_interval_means_one_at_the_end():
    run = config(num_rollout_steps=7, save_rollout_steps=0)
    assert run.save_steps == run.max_steps == 28


def test_derived_values_may_be_stated_if_they_are_right():
    right = config(num_rollout_steps=5, per_device_train_batch_size=512, max_steps=20, logging_steps=4, save_steps=200)
    assert (right.per_device_train_batch_size, right.max_steps) == (512, 20)


def test_without_a_gpu_it_is_float32_over_gloo(ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert config().bf16 is False and config().ddp_backend is None
    ranks(2)
    assert config().ddp_backend == "gloo"


FIXED = {
    "beta": (0.04, "no KL term", "0.0"),
    "use_vllm": (False, "a CPU is enough", "True"),
    "vllm_mode": ("colocate", "colocated engines", "'server'"),
    "vllm_importance_sampling_correction": (True, "trains without it", "False"),
    "gradient_accumulation_steps": (2, "use max_tokens_per_micro_batch", "1"),
    "lr_scheduler_type": ("cosine", "use warmup_rollout_steps", "'constant'"),
    "importance_sampling_level": ("sequence", "ratio is per token", "'token'"),
    "scale_rewards": ("none", "group's standard deviation", "'group'"),
    "top_entropy_quantile": (0.2, "every token", "1.0"),
    "entropy_coef": (0.01, "no entropy bonus", "0.0"),
    "temperature": (0.7, "trains at 1", "1.0"),
    "trust_remote_code": (True, "run code from the Hub", "False"),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_choice_that_the_recipe_fixes_is_refused_with_value_reason_and_remedy(name):
    value, reason, default = FIXED[name]
    with pytest.raises(ValueError) as raised:
        config(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"{name}={value!r} is not supported: ")
    assert reason in message
    assert message.endswith(f"Leave it at {default}.")


def test_tf32_for_the_whole_process_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"tf32=True is not supported.*position 2,048.*unset"):
        config(tf32=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not config(use_cpu=True).tf32  # nor is it switched on by itself


def test_a_batch_that_does_not_divide_over_the_ranks_names_its_neighbours(ranks):
    ranks(32)
    # 4 x 32 = 128 shares; 2000 lies between 15 x 128 and 16 x 128
    with pytest.raises(ValueError, match=r"generation_batch_size=2000 .* 4 optimizer steps x 32 ranks = 128.*1920 or 2048"):
        config(generation_batch_size=2000)


def test_a_batch_that_cuts_a_group_is_refused():
    with pytest.raises(ValueError, match=r"generation_batch_size=12 .*num_generations=8.*full groups: use a multiple of 8"):
        config(generation_batch_size=12)


def test_a_per_device_batch_that_contradicts_the_whole_one_is_refused(ranks):
    ranks(2)
    with pytest.raises(
        ValueError, match=r"per_device_train_batch_size=8 .*=2048 over 2 ranks, which gives 256. Leave it unset"
    ):
        config(per_device_train_batch_size=8)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_without_steps_is_refused(steps):
    with pytest.raises(ValueError, match=rf"num_rollout_steps must be an integer of at least 1, got {steps}"):
        config(num_rollout_steps=steps)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("max_steps", 4380, "num_rollout_steps"),
        ("save_steps", 50, "save_rollout_steps"),
        ("logging_steps", 1, "metrics are logged once per rollout step"),
        ("warmup_steps", 10, "warmup_rollout_steps"),
    ],
)
def test_a_length_in_optimizer_steps_is_refused_with_the_one_in_rollout_steps(name, value, instead):
    with pytest.raises(ValueError) as raised:
        config(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"{name}={value} counts optimizer steps, of which a rollout step has 4.")
    assert instead in message


def test_use_cpu_is_refused_beside_deepspeed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"use_cpu=True makes accelerate drop DeepSpeed.*Leave it off"):
        config(use_cpu=True)


def test_a_context_too_short_for_one_sequence_is_refused():
    with pytest.raises(ValueError, match=r"vllm_max_model_length=16383 .*1024 \+ 15360 = 16384 tokens. Leave it unset"):
        config(vllm_max_model_length=16383)


def test_a_micro_batch_too_small_for_one_sequence_is_refused():
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch=16383 .*= 16384 tokens. Use at least 16384"):
        config(max_tokens_per_micro_batch=16383)
    assert config(max_tokens_per_micro_batch=16384).max_tokens_per_micro_batch == 16384


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="loss_normalization"):
        config(loss_normalization="mean")


def test_deepspeed_accumulates_and_reduces_gradients_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    engine = config().deepspeed_plugin.deepspeed_config
    assert engine["zero_optimization"]["stage"] == 3
    # unset, both are bfloat16 in a bf16 run
    assert engine["data_types"] == {"grad_accum_dtype": "fp32"} and engine["communication_data_type"] == "fp32"


@pytest.mark.parametrize(("name", "value"), [("loss_backend", "lyger"), ("loss_normalization", "mean")])
def test_an_unknown_kernel_or_objective_is_named_with_the_known_ones(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be one of '.*', got '{value}'"):
        config(**{name: value})


def test_trls_name_for_one_server_is_the_list_of_one():
    assert config(vllm_server_base_url="http://h:1").rollout_servers == ["http://h:1"]
    assert config(rollout_servers=["http://h:1", "http://h:2"]).rollout_servers == ["http://h:1", "http://h:2"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rollout_servers": ["h:1"]}, "'h:1' is not an address. Write it as http://HOST:PORT"),
        ({"rollout_servers": ["http://h:1", "http://h:1"]}, "names a server twice"),
        ({"rollout_servers": ["http://h:1"], "vllm_server_base_url": "http://h:2"}, "different servers"),
        ({"managed_servers": 0}, "managed_servers must be an integer of at least 1, got 0"),
    ],
)
def test_servers_that_cannot_be_meant_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        config(**given)
