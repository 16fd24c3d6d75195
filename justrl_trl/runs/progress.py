"""Terminal output of a run: the plan, and one line per rollout step."""

from datetime import timedelta

from trl import ModelConfig

from justrl_trl.config import JustRLConfig
from justrl_trl.policy.attention import describe_attention
from justrl_trl.runs.arguments import RunArguments
from justrl_trl.runs.materials import Materials


def run_plan(run: RunArguments, training: JustRLConfig, model: ModelConfig, found: Materials) -> list[str]:
    """The plan of a run, before anything expensive starts; in a dry run without what could not be looked up."""
    responses, prompts = training.generation_batch_size, training.prompts_per_rollout_step
    per_rollout = training.optimizer_steps_per_rollout_step
    most = prompts * training.num_generations * training.max_completion_length
    count = training.managed_servers
    managed = f"{count} managed vLLM server{'s' if count > 1 else ''} on this machine"
    server = ", ".join(training.rollout_servers or [managed])
    ranks = f"{training.world_size} rank{'s' if training.world_size > 1 else ''}"
    sharding = f"DeepSpeed ZeRO-{found.zero_stage}" if found.zero_stage else "no sharding"
    every = f"every {training.save_rollout_steps} rollout steps" if training.save_rollout_steps else "at the end"
    saved = found.disk.describe(every) if found.disk else [every]
    heldout = found.data.heldout if found.data else None
    held_out = f"{len(heldout or ())} problems x {training.heldout_generations} responses, before and after training"
    held = (
        [f"{task.title} ({len(task.problems)} x {task.samples})" for task in found.validation.tasks] if found.validation else []
    )
    attention = describe_attention(found.attention, training.bf16 or training.fp16)
    when = f", every {training.validation_every} rollout steps, by {training.validation_grader}"
    rows = [
        ("model", model.model_name_or_path),
        ("data", run.dataset_name),
        *(("", line) for line in (found.data.report.lines() if found.data else ())),
        ("held out", held_out if heldout else "none" if found.data else "not looked up"),
        ("validation", ", ".join(held) + when if held else "not looked up" if training.validation_benchmarks else "none"),
        ("rollouts", f"{server}, weights in {training.server_dtype}"),
        *([("", found.sharing.describe())] if found.sharing else []),
        ("trainer", f"{ranks}, {sharding}, {'bfloat16 over float32' if training.bf16 else 'float32'}"),
        (
            "rollout step",
            f"{prompts} prompts x {training.num_generations} responses = {responses:,}; at most "
            f"{training.max_prompt_length:,} + {training.max_completion_length:,} tokens each, {most:,} new tokens in all",
        ),
        (
            "length",
            f"{training.num_rollout_steps:,} rollout steps x {per_rollout} optimizer steps of "
            f"{responses // training.steps_per_generation} responses = {training.max_steps:,} optimizer steps",
        ),
        (
            "objective",
            f"clip [{1 - training.epsilon:g}, {1 + training.epsilon_high:g}], dual clip {training.delta:g}, no KL, "
            f"no entropy bonus, {training.loss_normalization} normalization{_rewards(training)}",
        ),
        (
            "micro-batch",
            f"packed rows of up to {training.max_tokens_per_micro_batch:,} tokens, no padding; {training.loss_backend} loss; "
            f"attention: {attention}",
        ),
        (
            "optimizer",
            f"AdamW, lr {training.learning_rate:g} constant after {training.warmup_rollout_steps} rollout steps of warm-up, "
            f"weight decay {training.weight_decay:g}",
        ),
        ("checkpoints", saved[0]),
        *(("", line) for line in saved[1:]),
        ("results", f"{training.output_dir}/"),
        *(("missing", line) for line in found.missing),
    ]
    return ["plan", *(f"  {name:<13}{text}" for name, text in rows)]


def _rewards(training: JustRLConfig) -> str:
    """What the rewards have that the recipe's have not."""
    extra = ", robust verifier" if training.verifier == "robust" else ""
    if training.overlong_buffer_length:
        extra += (
            f", overlong penalty {training.overlong_penalty_factor:g} over the last {training.overlong_buffer_length:,} tokens"
        )
    return extra


class RolloutStepPrinter:
    """One line per rollout step: reward, accuracy, lengths, entropy, seconds per stage, time left.

    Args:
        total: rollout steps of the run.
    """

    def __init__(self, total: int):
        self._total, self._width = total, len(str(total))
        self._recent: list[float] = []

    def __call__(self, row: dict) -> None:
        step = row["rollout_step"]
        self._recent = [*self._recent[-9:], row["seconds/total"]]
        left = timedelta(seconds=round((self._total - step) * sum(self._recent) / len(self._recent)))
        names = {"gen": "generation", "score": "scoring", "train": "training", "sync": "sync"}
        names |= {"validate": "validation"} if row["seconds/validation"] else {}
        norm = "-" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
        if row["skipped_optimizer_steps"]:
            norm += f" ({row['skipped_optimizer_steps']:.0f} skipped)"
        stages = " ".join(f"{short} {row[f'seconds/{name}']:.1f}" for short, name in names.items())
        print(
            f"rollout step {step:>{self._width}}/{self._total}  reward {row['reward']:+.3f}  entropy {row['entropy']:.2f}  "
            f"length {row['completions/mean_length']:,.0f} (max {row['completions/max_length']:,.0f}, "
            f"cut {row['completions/clipped_ratio']:.0%})  grad {norm}  gap {row['sync/logprob_gap_max']:.3f}  "
            f"| {stages} = {row['seconds/total']:.1f} s, {row['tokens_per_second/total']:,.0f} tok/s, left {left}",
            flush=True,
        )
