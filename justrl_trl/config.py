"""`JustRLConfig`: TRL's `GRPOConfig` with the reference's values as defaults.

What is different from TRL: lengths of a run are counted in *rollout steps* (one generation of `generation_batch_size`
responses), because that is what the paper's "4,380 steps" are, while HF's `global_step` counts *optimizer steps*, four times as
many. And the batch is given whole (2,048 responses), not per device, so one recipe fits 1 to 32 ranks.
"""

import os
from dataclasses import dataclass

from trl import GRPOConfig

from justrl_trl.choices import Grader
from justrl_trl.config_rules import Rules
from justrl_trl.knobs import knob


@dataclass
class JustRLConfig(Rules, GRPOConfig):
    """Training arguments of the JustRL recipe. Every default below is the reference's (paper Table 2 or its script).

    Fields that TRL has keep TRL's name and meaning. `max_steps`, `save_steps`, `logging_steps`, `warmup_steps`,
    `per_device_train_batch_size` and `gradient_accumulation_steps` are derived; setting one to something else is an error.

    Raises:
        ConfigError: naming the value, the reason and the remedy, for every combination that the recipe cannot honour.
    """

    output_dir: str | None = knob("runs/justrl", "Run folder: everything a run writes is in it.")

    # batch geometry (Table 2: batch 256 prompts x 8 rollouts, mini-batch 64 prompts)
    generation_batch_size: int | None = knob(
        2048, "Responses per rollout step, over all ranks: prompts x num_generations.", min=1
    )
    steps_per_generation: int | None = knob(
        4, "Optimizer steps per rollout step; each takes an equal share of the responses.", min=1
    )
    num_generations: int | None = knob(8, "Responses per prompt: the group of GRPO.", min=2)
    per_device_train_batch_size: int | None = knob(
        None, "Derived: generation_batch_size / (steps_per_generation x ranks). Leave unset."
    )
    gradient_accumulation_steps: int = knob(1, "Must stay 1: micro-batches are cut by tokens, see max_tokens_per_micro_batch.")
    max_tokens_per_micro_batch: int = knob(
        32768,
        "Tokens (prompt + response) that one rank runs through the model at a time. Bounds activation memory; at "
        "least one full sequence.",
        min=1,
    )

    # length of the run, in rollout steps
    num_rollout_steps: int = knob(
        4380, "Rollout steps to train for (the paper's 'steps'); x steps_per_generation optimizer steps.", min=1
    )
    warmup_rollout_steps: int = knob(
        10, "Linear warm-up, advanced once per rollout step as in the reference: the first one has lr 0.", min=0
    )
    save_rollout_steps: int = knob(
        50, "Checkpoint every so many rollout steps, always between two of them; 0: only at the end.", min=0
    )

    # lengths (Table 2: 1k prompt, 15k response)
    max_prompt_length: int = knob(1024, "Prompts longer than this many templated tokens are dropped before training.", min=1)
    max_completion_length: int | None = knob(15360, "Response tokens at most; longer ones are cut.", min=1)
    vllm_max_model_length: int | None = knob(
        None, "Context of the server in tokens; default max_prompt_length + max_completion_length."
    )

    # objective
    epsilon: float = knob(0.2, "Lower clip: ratio >= 1 - epsilon (Table 2: 0.8).")
    epsilon_high: float | None = knob(0.28, "Upper clip: ratio <= 1 + epsilon_high (Table 2: 1.28).")
    delta: float | None = knob(
        10.0, "Dual clip: for negative advantages the loss is at most delta x |advantage| (script: clip_ratio_c)."
    )
    beta: float = knob(0.0, "KL coefficient; the recipe has none, and other values are refused.")
    advantage_epsilon: float = knob(1e-6, "Added to a group's standard deviation (reference 1e-6; TRL's own is 1e-4).")
    loss_normalization: str = knob(
        "reference",
        "'reference': token mean of each micro-batch, weighted by its share of the sequences (what the reference "
        "computes). 'token_mean': one global token mean per optimizer step.",
        choices=["reference", "token_mean"],
    )
    verifier: str = knob(
        "strict",
        "Who pays +1 or -1: 'strict' (the recipe: the last box equals the answer character by character) or "
        "'robust' (an ablation: the evaluation grader's rules, equivalent forms count).",
        choices=["strict", "robust"],
    )
    overlong_buffer_length: int = knob(
        0, "An ablation: responses are penalised over the last so many tokens of the limit; 0: not at all.", min=0
    )
    overlong_penalty_factor: float = knob(1.0, "Penalty at the limit, where overlong_buffer_length is not 0.", min=0.0)
    loss_backend: str = knob(
        "liger",
        "Kernel of LM head and loss: 'liger' (Liger's fused linear GRPO loss) or 'trl' (TRL's chunked head, then "
        "the loss in plain torch). Same numbers; 'trl' also knows soft-capped and scaled logits.",
        choices=["liger", "trl"],
    )
    score_while_sampling: bool | None = knob(
        None,
        "Compute old log-probabilities of responses that are there while the servers work on the others. Same "
        "numbers up to rounding, which then depends on the order of responses; default: on with a GPU, off without, "
        "where ranks and servers share the cores.",
    )
    vllm_importance_sampling_correction: bool = knob(
        False, "The reference has no correction for the trainer/server gap; the gap is logged instead."
    )

    # optimizer (Table 2: lr 1e-6; script: constant after warm-up, weight decay 0.1 on everything, clip 1.0)
    learning_rate: float = knob(1e-6, "AdamW learning rate after warm-up.")
    lr_scheduler_type: str = knob("constant", "Must stay 'constant': see warmup_rollout_steps.")
    weight_decay: float = knob(0.1, "On all parameters, norms and biases included, as in the reference.")
    max_grad_norm: float = knob(1.0, "Global gradient norm clip.")
    max_skipped_steps: int = knob(
        8, "Optimizer steps in a row that may be skipped because their gradient norm is not finite; then the run ends.", min=1
    )

    # sampling
    temperature: float = knob(1.0, "Sampling temperature of rollouts.")
    top_k: int = knob(0, "0: every token may be sampled.")
    seed: int = knob(1, "Order of prompts and sampling seeds; 1 gives the reference's prompt order.")

    # rollout server
    use_vllm: bool = knob(True, "Always on: rollouts come from a vLLM server.")
    vllm_mode: str = knob("server", "Always 'server'.")
    rollout_servers: list[str] | None = knob(
        None, "Addresses of running servers, e.g. http://10.0.0.5:8000 http://10.0.0.6:8000; default: managed."
    )
    managed_servers: int = knob(
        1, "Without rollout_servers: so many are started on this machine, each on a core or GPU of its own.", min=1
    )
    vllm_server_base_url: str | None = knob(None, "TRL's name for a single rollout_servers.")
    vllm_server_host: str = knob("127.0.0.1", "Where a managed server binds.")
    vllm_server_port: int = knob(0, "Port of a managed server; 0 takes a free one.")
    vllm_server_timeout: float = knob(600.0, "Seconds to wait for a server to become healthy.", above=0)
    vllm_group_port: int = knob(0, "Port of the weight broadcast group; 0 takes a free one.")
    weight_sync_address: str = knob(
        "127.0.0.1", "Address of rank 0 that rollout workers reach for weights; one interface, never all of them."
    )
    weight_sync_timeout: float = knob(300.0, "Seconds before a push that makes no progress fails.", above=0)
    vllm_gpu_memory_utilization: float = knob(
        0.85, "Share of GPU memory of a managed server that has its GPU for itself.", above=0, max=1
    )
    shared_gpu_memory_utilization: float | None = knob(
        None,
        "The same for a managed server that shares its GPU with a training rank; default: what the rank leaves at "
        "its peak, see the plan.",
        above=0,
        max=1,
    )
    server_dtype: str = knob("bfloat16", "Weights of a managed server: bfloat16 or float32.")
    server_max_num_seqs: int = knob(256, "Sequences that a managed server decodes at once.", min=1)
    server_kv_cache_mib: int = knob(256, "KV cache of a managed CPU server, MiB.", min=1)
    request_timeout: float = knob(
        3600.0, "Seconds that one prompt's responses may take before the server counts as hung.", above=0
    )
    server_wait: float = knob(
        600.0, "Seconds to wait for a server when none is left; then a checkpoint is saved and the run ends.", min=0.0
    )
    server_heartbeat_timeout: float = knob(
        60.0, "Seconds without an answer to a probe after which a server counts as hung and loses its prompts.", above=0
    )
    gap_responses: int = knob(
        4, "Responses per rollout step whose log-probabilities are compared between trainer and server.", min=0
    )
    gap_warning: float = knob(0.1, "Mean |log p_trainer - log p_server| over those responses above which a warning is printed.")
    gap_limit: float = knob(1.0, "The same, above which the run ends: foreign samples.")
    sync_logprob_gap_limit: float = knob(
        0.1,
        "Mean |log p_trainer - log p_server| over the probe tokens after a push; more is an error. bfloat16 noise "
        "is 0.002 on the tiny model and 0.05 on a 135M one, stale weights show 0.2 and more, scrambled ones "
        "several nats.",
    )

    # validation on benchmarks, on the rollout servers with sampling of its own (script: before training, every 50, at the end)
    validation_benchmarks: str | None = knob(
        None, "Comma list as in recipes/evaluate.py, e.g. aime24,aime25,amc23; default: no validation."
    )
    validation_every: int = knob(
        50, "Rollout steps between validations; one comes before the first and one after the last.", min=1
    )
    validation_samples: int | None = knob(
        None, "Responses per problem; default: the paper's, 32 for small benchmarks and 4 for large.", min=1
    )
    validation_max_new_tokens: int = knob(31744, "Response tokens at most, in validation.", min=1)
    validation_temperature: float = knob(0.7, "Sampling temperature of validation.", min=0.0)
    validation_top_p: float = knob(0.9, "Top-p of validation.", above=0, max=1)
    validation_grader: str = knob(
        Grader.MATH_VERIFY.value,
        "math_verify (the reference's, and the paper's Figure 1) or rule (the paper's tables).",
        choices=[grader.value for grader in Grader],
    )
    validation_data_dir: str | None = knob(None, "Folder with <NAME>/test.parquet for the benchmarks; default: from the Hub.")

    # what is recorded
    num_completions_to_save: int = knob(
        4, "Completions written to samples.jsonl per rollout step, with prompt, solution and reward.", min=0
    )
    heldout_generations: int = knob(4, "Responses per held-out problem, before and after training.", min=1)

    # what HF decides differently
    bf16: bool | None = knob(None, "bf16 compute over fp32 master weights; default: on with a GPU.")
    save_only_model: bool = knob(False, "False keeps optimizer and RNG, needed to resume.")
    report_to: list[str] | str | None = knob("none", "trackio, wandb, tensorboard, ... or none.")
    disable_tqdm: bool | None = knob(True, "HF's own bar counts optimizer steps; ours replaces it.")

    def __post_init__(self):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        self._check_fixed_choices()
        self._gather_servers()
        self._check_ranges()
        self._derive_batch(world_size)
        self._derive_steps()
        self._derive_hardware(world_size)
        self._derive_context()
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
