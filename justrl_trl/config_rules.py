"""Rules between the fields of `JustRLConfig`: what is refused, and what is derived.

Each message names the value, the reason and the remedy. Everything here runs before a model is loaded or a server started.
"""

import dataclasses
import os

import torch
from trl import GRPOConfig

from justrl_trl.errors import ConfigError
from justrl_trl.knobs import check_bounds, check_value

_HF_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}


class Rules:
    """Checks and derivations of `JustRLConfig`, called in the order of its `__post_init__`."""

    def _check_fixed_choices(self) -> None:
        fixed = {
            "beta": (0.0, "the recipe has no KL term, and no reference model is loaded"),
            "use_vllm": (True, "rollouts always come from a vLLM server; a CPU is enough for one"),
            "vllm_mode": ("server", "colocated engines are not part of this design"),
            "vllm_importance_sampling_correction": (
                False,
                "the reference trains without it, and no rollout logprobs are fetched",
            ),
            "gradient_accumulation_steps": (1, "micro-batches are cut by tokens: use max_tokens_per_micro_batch"),
            "lr_scheduler_type": (
                "constant",
                "the reference's schedule is constant after warm-up: use warmup_rollout_steps",
            ),
            "importance_sampling_level": ("token", "the reference's ratio is per token"),
            "scale_rewards": ("group", "the reference divides by the group's standard deviation"),
            "top_entropy_quantile": (1.0, "the recipe trains on every token"),
            "entropy_coef": (0.0, "the recipe has no entropy bonus"),
            "use_adaptive_entropy": (False, "the recipe has no entropy bonus"),
            "loss_type": ("dapo", "the training step is this package's own: use loss_normalization"),
            "multi_objective_aggregation": ("sum_then_normalize", "advantages come from the sum of the rewards"),
            "off_policy_mask_threshold": (None, "the recipe trains on every token"),
            "sync_ref_model": (False, "there is no reference model"),
            "use_liger_kernel": (False, "TRL 1.16 has no Liger loss behind it, and its layer patches are deprecated"),
            "eval_strategy": (
                "no",
                "there is no eval_dataset: use heldout_size or validation_benchmarks",
            ),
            "save_strategy": ("steps", "checkpoints lie between rollout steps: use save_rollout_steps"),
            "temperature": (
                1.0,
                "the reference trains at 1, and trainer and server are compared at 1 after every push",
            ),
            "trust_remote_code": (False, "it would run code from the Hub, which the recipe's models do not need"),
        }
        for name, (value, reason) in fixed.items():
            given = getattr(self, name)
            if getattr(given, "value", given) != value:
                raise ConfigError(f"{name}={given!r} is not supported: {reason}. Leave it at {value!r}.")

        if self.tf32:
            raise ConfigError(
                "tf32=True is not supported: it holds for the whole process, also for the rotary angles, which TF32 computes "
                "exactly only up to position 2,048. Leave it unset: the loss uses TF32 by itself where that is safe."
            )

    def _gather_servers(self) -> None:
        if self.vllm_server_base_url:
            if self.rollout_servers not in (None, [self.vllm_server_base_url]):
                raise ConfigError(
                    f"rollout_servers={self.rollout_servers} and vllm_server_base_url={self.vllm_server_base_url!r} name "
                    "different servers. Give all of them as rollout_servers."
                )
            self.rollout_servers = [self.vllm_server_base_url]
        for url in self.rollout_servers or ():
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"rollout_servers: {url!r} is not an address. Write it as http://HOST:PORT.")
        if len(set(self.rollout_servers or ())) < len(self.rollout_servers or ()):
            raise ConfigError(f"rollout_servers={self.rollout_servers} names a server twice. Give each once.")

    def _check_ranges(self) -> None:
        check_bounds(self)
        check_value("num_iterations", self.num_iterations, {"min": 1})  # TRL's field
        if self.overlong_buffer_length > self.max_completion_length:
            raise ConfigError(
                f"overlong_buffer_length={self.overlong_buffer_length} is more than max_completion_length="
                f"{self.max_completion_length}: even the shortest response would be penalised. Use less."
            )
        if self.delta is None or self.delta <= 1 + self.epsilon_high:
            raise ConfigError(
                f"delta={self.delta} must lie above 1 + epsilon_high = {1 + self.epsilon_high:g}: it bounds ratios that the "
                "upper clip lets through. The reference uses 10; for no dual clip give a large number."
            )

    def _derive_batch(self, world_size: int) -> None:
        shares = self.steps_per_generation * world_size
        if self.generation_batch_size % shares:
            lower = self.generation_batch_size // shares * shares
            examples = f"{lower} or {lower + shares}" if lower else f"{shares}"
            raise ConfigError(
                f"generation_batch_size={self.generation_batch_size} does not divide into {self.steps_per_generation} "
                f"optimizer steps x {world_size} ranks = {shares} equal shares. Use a multiple of {shares} (for example "
                f"{examples}), or another number of ranks."
            )
        if self.generation_batch_size % self.num_generations:
            raise ConfigError(
                f"generation_batch_size={self.generation_batch_size} does not hold whole groups of num_generations="
                f"{self.num_generations}. Advantages need full groups: use a multiple of {self.num_generations}."
            )
        rows = self.generation_batch_size // shares
        if self.per_device_train_batch_size not in (None, rows):
            raise ConfigError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} contradicts generation_batch_size="
                f"{self.generation_batch_size} over {world_size} ranks, which gives {rows}. Leave it unset."
            )
        # TRL takes one of the two sizes and derives the other from the per-device batch
        self.per_device_train_batch_size, self.generation_batch_size = rows, None

    def _derive_steps(self) -> None:
        per_rollout = self.optimizer_steps_per_rollout_step
        derived = {
            "max_steps": (self.num_rollout_steps * per_rollout, "num_rollout_steps"),
            "save_steps": ((self.save_rollout_steps or self.num_rollout_steps) * per_rollout, "save_rollout_steps"),
            "logging_steps": (per_rollout, "nothing: metrics are logged once per rollout step"),
            "warmup_steps": (0, "warmup_rollout_steps"),
        }
        for name, (value, instead) in derived.items():
            given = getattr(self, name)
            if given not in (value, _HF_DEFAULTS[name]):
                raise ConfigError(
                    f"{name}={given} counts optimizer steps, of which a rollout step has {per_rollout}. Here a run is laid out "
                    f"in rollout steps: use {instead} instead."
                )
            setattr(self, name, value)

    def _derive_hardware(self, world_size: int) -> None:
        if self.score_while_sampling is None:
            self.score_while_sampling = torch.cuda.is_available() and not self.full_determinism
        if torch.cuda.is_available():
            self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
            return
        # Without a GPU: float32, as the plan says (a recipe's bf16 is for its GPUs), and gloo
        self.bf16 = False
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            self._prepare_deepspeed_on_cpu()
        elif world_size > 1 and "LOCAL_RANK" in os.environ:
            self.use_cpu = True  # without it accelerate leaves every rank alone with its own model
        if world_size > 1:
            self.ddp_backend = self.ddp_backend or "gloo"

    def _prepare_deepspeed_on_cpu(self) -> None:
        if self.use_cpu:
            raise ConfigError(
                "use_cpu=True makes accelerate drop DeepSpeed without a word. Leave it off: a CPU is found by itself."
            )
        import deepspeed.ops

        # On CPU, DeepSpeed would compile a shared-memory all-reduce for minutes that only its inference engine calls
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def _accumulate_in_float32(self) -> None:
        # With bf16 ZeRO-3 would add up and reduce gradients of micro-batches in bf16; the reference does both in float32
        if self.deepspeed_plugin is not None:
            engine = self.deepspeed_plugin.deepspeed_config
            engine.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            engine.setdefault("communication_data_type", "fp32")

    def _derive_context(self) -> None:
        if self.vllm_max_model_length is None:
            validation = self.validation_max_new_tokens if self.validation_benchmarks else 0
            self.vllm_max_model_length = self.max_prompt_length + max(self.max_completion_length, validation)

    def _check_lengths(self) -> None:
        full = self.max_prompt_length + self.max_completion_length
        if self.vllm_max_model_length < full:
            raise ConfigError(
                f"vllm_max_model_length={self.vllm_max_model_length} cannot hold max_prompt_length + max_completion_length = "
                f"{self.max_prompt_length} + {self.max_completion_length} = {full} tokens. Leave it unset."
            )
        if self.max_tokens_per_micro_batch < full:
            raise ConfigError(
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} cannot hold one full sequence of "
                f"max_prompt_length + max_completion_length = {full} tokens. Use at least {full}."
            )
