"""The recipe's knobs: TRL's `GRPOConfig` with the reference's values as defaults, and the rules between them.

What is different from TRL: lengths of a run are counted in *rollout steps* (one generation of `generation_batch_size`
responses), because that is what the paper's "4,380 steps" are, while HF's `global_step` counts *optimizer steps*, four times as
many. And the batch is given whole (2,048 responses), not per device, so one recipe fits 1 to 32 ranks.
"""

import os
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

_HF_DEFAULTS = {"max_steps": -1, "save_steps": 500, "logging_steps": 10, "warmup_steps": 0}


@dataclass
class JustRLConfig(GRPOConfig):
    """Training arguments of the JustRL recipe. Every default below is the reference's (paper Table 2 or its script).

    Fields that TRL has keep TRL's name and meaning. `max_steps`, `save_steps`, `logging_steps`, `warmup_steps`,
    `per_device_train_batch_size` and `gradient_accumulation_steps` are derived; setting one to something else is an error.

    Raises:
        ValueError: naming the value, the reason and the remedy, for every combination that the recipe cannot honour.
    """

    output_dir: str | None = field(default="runs/justrl", metadata={"help": "Run folder: everything a run writes is in it."})

    # batch geometry (Table 2: batch 256 prompts x 8 rollouts, mini-batch 64 prompts)
    generation_batch_size: int | None = field(
        default=2048, metadata={"help": "Responses per rollout step, over all ranks: prompts x num_generations."}
    )
    steps_per_generation: int | None = field(
        default=4, metadata={"help": "Optimizer steps per rollout step; each takes an equal share of the responses."}
    )
    num_generations: int | None = field(default=8, metadata={"help": "Responses per prompt: the group of GRPO."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Derived: generation_batch_size / (steps_per_generation x ranks). Leave unset."},
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Must stay 1: micro-batches are cut by tokens, see max_tokens_per_micro_batch."}
    )
    max_tokens_per_micro_batch: int = field(
        default=32768,
        metadata={
            "help": "Tokens (prompt + response) that one rank runs through the model at a time. Bounds activation memory; "
            "at least one full sequence."
        },
    )

    # length of the run, in rollout steps
    num_rollout_steps: int = field(
        default=4380,
        metadata={"help": "Rollout steps to train for (the paper's 'steps'); x steps_per_generation optimizer steps."},
    )
    warmup_rollout_steps: int = field(
        default=10,
        metadata={"help": "Linear warm-up, advanced once per rollout step as in the reference: the first one has lr 0."},
    )
    save_rollout_steps: int = field(
        default=50,
        metadata={"help": "Checkpoint every so many rollout steps, always between two of them; 0: only at the end."},
    )

    # lengths (Table 2: 1k prompt, 15k response)
    max_prompt_length: int = field(
        default=1024, metadata={"help": "Prompts longer than this many templated tokens are dropped before training."}
    )
    max_completion_length: int | None = field(default=15360, metadata={"help": "Response tokens at most; longer ones are cut."})
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={"help": "Context of the server in tokens; default max_prompt_length + max_completion_length."},
    )

    # objective
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip: ratio >= 1 - epsilon (Table 2: 0.8)."})
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clip: ratio <= 1 + epsilon_high (Table 2: 1.28)."}
    )
    delta: float | None = field(
        default=10.0,
        metadata={"help": "Dual clip: for negative advantages the loss is at most delta x |advantage| (script: clip_ratio_c)."},
    )
    beta: float = field(default=0.0, metadata={"help": "KL coefficient; the recipe has none, and other values are refused."})
    advantage_epsilon: float = field(
        default=1e-6, metadata={"help": "Added to a group's standard deviation (reference 1e-6; TRL's own is 1e-4)."}
    )
    loss_normalization: str = field(
        default="reference",
        metadata={
            "help": "'reference': token mean of each micro-batch, weighted by its share of the sequences (what the reference "
            "computes). 'token_mean': one global token mean per optimizer step.",
            "choices": ["reference", "token_mean"],
        },
    )
    loss_backend: str = field(
        default="liger",
        metadata={
            "help": "Kernel of LM head and loss: 'liger' (Liger's fused linear GRPO loss) or 'trl' (TRL's chunked head, then "
            "the loss in plain torch). Same numbers; 'trl' also knows soft-capped and scaled logits.",
            "choices": ["liger", "trl"],
        },
    )
    score_while_sampling: bool | None = field(
        default=None,
        metadata={
            "help": "Compute old log-probabilities of responses that are there while the servers work on the others. Same "
            "numbers up to rounding, which then depends on who finished when; default: on with a GPU, off without, where ranks "
            "and servers share the cores."
        },
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={"help": "The reference has no correction for the trainer/server gap; the gap is logged instead."},
    )

    # optimizer (Table 2: lr 1e-6; script: constant after warm-up, weight decay 0.1 on everything, clip 1.0)
    learning_rate: float = field(default=1e-6, metadata={"help": "AdamW learning rate after warm-up."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Must stay 'constant': see warmup_rollout_steps."})
    weight_decay: float = field(
        default=0.1, metadata={"help": "On all parameters, norms and biases included, as in the reference."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Global gradient norm clip."})
    max_skipped_steps: int = field(
        default=8,
        metadata={
            "help": "Optimizer steps in a row that may be skipped because their gradient norm is not finite; then the run ends."
        },
    )

    # sampling
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of rollouts."})
    top_k: int = field(default=0, metadata={"help": "0: every token may be sampled."})
    seed: int = field(
        default=1, metadata={"help": "Order of prompts and sampling seeds; 1 gives the reference's prompt order."}
    )

    # rollout server
    use_vllm: bool = field(default=True, metadata={"help": "Always on: rollouts come from a vLLM server."})
    vllm_mode: str = field(default="server", metadata={"help": "Always 'server'."})
    rollout_servers: list[str] | None = field(
        default=None,
        metadata={"help": "Addresses of running servers, e.g. http://10.0.0.5:8000 http://10.0.0.6:8000; default: managed."},
    )
    managed_servers: int = field(
        default=1,
        metadata={"help": "Without rollout_servers: so many are started on this machine, each on a core or GPU of its own."},
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "TRL's name for a single rollout_servers."})
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Where a managed server binds."})
    vllm_server_port: int = field(default=0, metadata={"help": "Port of a managed server; 0 takes a free one."})
    vllm_server_timeout: float = field(default=600.0, metadata={"help": "Seconds to wait for a server to become healthy."})
    vllm_group_port: int = field(default=0, metadata={"help": "Port of the weight broadcast group; 0 takes a free one."})
    weight_sync_address: str = field(
        default="127.0.0.1",
        metadata={"help": "Address of rank 0 that rollout workers reach for weights; one interface, never all of them."},
    )
    weight_sync_timeout: float = field(default=300.0, metadata={"help": "Seconds before a push that makes no progress fails."})
    vllm_gpu_memory_utilization: float = field(default=0.85, metadata={"help": "Share of GPU memory of a managed server."})
    server_dtype: str = field(default="bfloat16", metadata={"help": "Weights of a managed server: bfloat16 or float32."})
    server_max_num_seqs: int = field(default=256, metadata={"help": "Sequences that a managed server decodes at once."})
    server_kv_cache_mib: int = field(default=256, metadata={"help": "KV cache of a managed CPU server, MiB."})
    request_timeout: float = field(
        default=3600.0,
        metadata={"help": "Seconds that one prompt's responses may take before the server counts as hung."},
    )
    server_wait: float = field(
        default=600.0,
        metadata={"help": "Seconds to wait for a server when none is left; then a checkpoint is saved and the run ends."},
    )
    server_heartbeat_timeout: float = field(
        default=60.0,
        metadata={"help": "Seconds without an answer to a probe after which a server counts as hung and loses its prompts."},
    )
    gap_responses: int = field(
        default=4,
        metadata={"help": "Responses per rollout step whose log-probabilities are compared between trainer and server."},
    )
    gap_warning: float = field(
        default=0.1,
        metadata={"help": "Mean |log p_trainer - log p_server| over those responses above which a warning is printed."},
    )
    gap_limit: float = field(default=1.0, metadata={"help": "The same, above which the run ends: foreign samples."})
    sync_logprob_gap_limit: float = field(
        default=0.1,
        metadata={
            "help": "Mean |log p_trainer - log p_server| over the probe tokens after a push; more is an error. bfloat16 noise "
            "is 0.002 on the tiny model and 0.05 on a 135M one, stale weights show 0.2 and more, scrambled ones several nats."
        },
    )

    # what is recorded
    num_completions_to_save: int = field(
        default=4,
        metadata={"help": "Completions written to samples.jsonl per rollout step, with prompt, solution and reward."},
    )
    heldout_generations: int = field(default=4, metadata={"help": "Responses per held-out problem, before and after training."})

    # what HF decides differently
    bf16: bool | None = field(default=None, metadata={"help": "bf16 compute over fp32 master weights; default: on with a GPU."})
    save_only_model: bool = field(default=False, metadata={"help": "False keeps optimizer and RNG, needed to resume."})
    report_to: list[str] | str | None = field(default="none", metadata={"help": "trackio, wandb, tensorboard, ... or none."})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "HF's own bar counts optimizer steps; ours replaces it."})

    def __post_init__(self):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        self._check_fixed_choices()
        self._gather_servers()
        self._check_ranges()
        self._derive_batch(world_size)
        self._derive_steps()
        self._derive_hardware(world_size)
        if self.vllm_max_model_length is None:
            self.vllm_max_model_length = self.max_prompt_length + self.max_completion_length
        super().__post_init__()
        self._accumulate_in_float32()
        self._check_lengths()

    @property
    def optimizer_steps_per_rollout_step(self) -> int:
        """`global_step`s that make one rollout step."""
        return self.steps_per_generation * self.num_iterations

    @property
    def prompts_per_rollout_step(self) -> int:
        """Prompts drawn per rollout step, over all ranks."""
        return self.generation_batch_size // self.num_generations

    def rollout_step(self, global_step: int) -> int:
        """Finished rollout steps after `global_step` optimizer steps."""
        return global_step // self.optimizer_steps_per_rollout_step

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
                raise ValueError(f"{name}={given!r} is not supported: {reason}. Leave it at {value!r}.")

    def _gather_servers(self) -> None:
        if self.vllm_server_base_url:
            if self.rollout_servers not in (None, [self.vllm_server_base_url]):
                raise ValueError(
                    f"rollout_servers={self.rollout_servers} and vllm_server_base_url={self.vllm_server_base_url!r} name "
                    "different servers. Give all of them as rollout_servers."
                )
            self.rollout_servers = [self.vllm_server_base_url]
        for url in self.rollout_servers or ():
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout_servers: {url!r} is not an address. Write it as http://HOST:PORT.")
        if len(set(self.rollout_servers or ())) < len(self.rollout_servers or ()):
            raise ValueError(f"rollout_servers={self.rollout_servers} names a server twice. Give each once.")

    def _check_ranges(self) -> None:
        least = {"generation_batch_size": 1, "steps_per_generation": 1, "num_generations": 2, "num_iterations": 1}
        least |= {"num_rollout_steps": 1, "warmup_rollout_steps": 0, "save_rollout_steps": 0}
        least |= {
            "max_skipped_steps": 1,
            "managed_servers": 1,
            "gap_responses": 0,
            "max_prompt_length": 1,
            "max_completion_length": 1,
            "heldout_generations": 1,
            "num_completions_to_save": 0,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(
                    f"{name}={value!r} makes no sense: it counts something. Give an integer of at least {minimum}."
                )
        for name, known in (("loss_normalization", ("reference", "token_mean")), ("loss_backend", ("liger", "trl"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Use {known[0]!r} or {known[1]!r}.")
        if self.delta is None or self.delta <= 1 + self.epsilon_high:
            raise ValueError(
                f"delta={self.delta} must lie above 1 + epsilon_high = {1 + self.epsilon_high:g}: it bounds ratios that the "
                "upper clip lets through. The reference uses 10; for no dual clip give a large number."
            )

    def _derive_batch(self, world_size: int) -> None:
        shares = self.steps_per_generation * world_size
        if self.generation_batch_size % shares:
            lower = self.generation_batch_size // shares * shares
            examples = f"{lower} or {lower + shares}" if lower else f"{shares}"
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} does not divide into {self.steps_per_generation} "
                f"optimizer steps x {world_size} ranks = {shares} equal shares. Use a multiple of {shares} (for example "
                f"{examples}), or another number of ranks."
            )
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} does not hold whole groups of num_generations="
                f"{self.num_generations}. Advantages need full groups: use a multiple of {self.num_generations}."
            )
        rows = self.generation_batch_size // shares
        if self.per_device_train_batch_size not in (None, rows):
            raise ValueError(
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
                raise ValueError(
                    f"{name}={given} counts optimizer steps, of which a rollout step has {per_rollout}. Here a run is laid out "
                    f"in rollout steps: use {instead} instead."
                )
            setattr(self, name, value)

    def _derive_hardware(self, world_size: int) -> None:
        if self.score_while_sampling is None:
            self.score_while_sampling = torch.cuda.is_available() and not self.full_determinism
        if torch.cuda.is_available():
            self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
            if self.tf32 is None and self.bf16 and torch.cuda.get_device_capability()[0] >= 8:
                self.tf32 = True  # Liger's backward multiplies in float32 also in a bf16 run, several times slower without
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
            raise ValueError(
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

    def _check_lengths(self) -> None:
        full = self.max_prompt_length + self.max_completion_length
        if self.vllm_max_model_length < full:
            raise ValueError(
                f"vllm_max_model_length={self.vllm_max_model_length} cannot hold max_prompt_length + max_completion_length = "
                f"{self.max_prompt_length} + {self.max_completion_length} = {full} tokens. Leave it unset."
            )
        if self.max_tokens_per_micro_batch < full:
            raise ValueError(
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} cannot hold one full sequence of "
                f"max_prompt_length + max_completion_length = {full} tokens. Use at least {full}."
            )
