"""`JustRLTrainer`: TRL's `GRPOTrainer` with the JustRL training step and rollouts from vLLM servers.

Who calls whom, once for each optimizer step (HF's `global_step`):

    transformers.Trainer.train
      training_step                          forward and backward passes of one optimizer step
        _prepare_inputs                      at the start of a rollout step:
          _generate_and_score_completions      TRL's; calls _generate_single_turn (sampling.py) and _calculate_rewards
          exchange, Scores, share_out          old log-probabilities, this rank's micro-batches of every optimizer step
      callbacks.SyncAfterRolloutStep         after the last optimizer step of a rollout step: push_weights (push.py)

What TRL does (prompt sampling, reward functions, shuffling into optimizer steps, logging, checkpoints, Hub) stays TRL's.

Overridden private methods of TRL 1.16.0: `_generate_single_turn`, `_generate_and_score_completions`, `_calculate_rewards`,
`_get_per_token_logps_and_entropies`, `_prepare_inputs`, `training_step`; of transformers 5.17.0: `_get_grad_norm`.
`tests/unit/test_upstream.py` pins their signatures.
"""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError, DataError
from justrl_trl.grading.strict import dapo_reward
from justrl_trl.policy.micro_batches import exchange, share_out
from justrl_trl.policy.packed_policy import PackedPolicy
from justrl_trl.policy.packing import PackedRow, unpad
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.training.advantage import group_advantages
from justrl_trl.training.callbacks import SyncAfterRolloutStep
from justrl_trl.training.metrics import STEP_SUMS, reduce_once, step_sums
from justrl_trl.training.old_logps import Scores
from justrl_trl.training.optimizer import SkipCounter, is_finite, warmup_schedule
from justrl_trl.training.push import WeightPush
from justrl_trl.training.sampling import sample_responses
from justrl_trl.training.stages import StageClock


class JustRLTrainer(GRPOTrainer):
    """GRPO as JustRL runs it.

    Args:
        model: Hub id, local folder or model instance (fp32; bf16 is a matter of autocast and DeepSpeed).
        args: `JustRLConfig`.
        train_dataset: columns `prompt` (conversation) and whatever `reward_funcs` read, `solution` for the default.
        pool: rank 0's `RolloutPool`; None on the other ranks.
        heldout_dataset: same columns; sampled before and after training, never trained on.
        reward_funcs, processing_class, callbacks, peft_config: as in TRL.
    """

    _tag_names = ["trl", "grpo", "justrl"]
    _name = "JustRL"

    def __init__(
        self,
        model,
        args: JustRLConfig,
        train_dataset: Dataset,
        pool: RolloutPool | None,
        *,
        heldout_dataset: Dataset | None = None,
        reward_funcs: Callable | list[Callable] = dapo_reward,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config=None,
    ):
        # TRL builds its own vLLM client in its constructor, which wants CUDA and knows no deadline; ours replaces it
        args.use_vllm = False
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                peft_config=peft_config,
            )
        finally:
            args.use_vllm = True
        self.pool = pool
        self.heldout_dataset = heldout_dataset
        self.weight_push = WeightPush(self)
        self.clock = StageClock()
        self._rewards = None  # (B,) of the current rollout step, all ranks
        self.policy = PackedPolicy(self.model, args, self.accelerator, self._clip, self.temperature)
        self._scores: Scores | None = None  # of the current rollout step
        self._scoring_sums: torch.Tensor | None = None  # of the current rollout step, reported with its first optimizer step
        self._skipped = SkipCounter(args.max_skipped_steps)
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # prints every metric as one line of JSON; RecordRun prints what matters
        self.callback_handler.callbacks.insert(0, SyncAfterRolloutStep(self))  # others may sample, and need the weights pushed

    # -- sample -------------------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Responses to this rank's prompts, from the servers (TRL's seam between prompt and completion)."""
        if images is not None:
            raise DataError("The dataset has images; the JustRL recipe is text only.")
        with self.clock.stage("generation"):
            self.weight_push.require_current()
            early = self._scores if self.args.score_while_sampling else None
            return sample_responses(self, prompt_ids, num_generations, early), None

    def save_before_giving_up(self) -> None:
        """A checkpoint at the last finished rollout step, unless there is one; on all ranks."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if broadcast_object_list([self.state.global_step > 0 and not folder.exists()])[0]:  # rank 0 decides for all
            self._save_checkpoint(self.model, trial=None)
            if self.accelerator.is_main_process:
                self.pool.say(f"saved {folder}; --resume_from_checkpoint True goes on from it")

    # -- score --------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        """TRL's generation and scoring, then the reference's advantages: TRL adds 1e-4 to the deviation, verl 1e-6."""
        self._scores = Scores(self.score, self.accelerator, self.args.max_tokens_per_micro_batch)
        with self.clock.stage("scoring"):
            output = super()._generate_and_score_completions(inputs)
        rows = len(output["advantages"])
        groups = torch.arange(len(self._rewards), device=self._rewards.device) // self.num_generations
        advantages = group_advantages(self._rewards, groups, self.args.advantage_epsilon)
        start = self.accelerator.process_index * rows
        output["advantages"] = advantages[start : start + rows]
        output["rollout_row"] = torch.arange(start, start + rows)
        spread = {"std": advantages.std(), "max": advantages.max(), "min": advantages.min()}
        self._note({f"advantages/{name}": value.item() for name, value in spread.items()})
        self._logs["advantages"].extend(advantages.tolist())  # a deque of one rollout step: TRL's own values fall out
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's rewards; the weighted sum of all ranks is kept for the advantages."""
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        self._rewards = rewards.masked_fill(per_function.isnan().all(dim=1), torch.nan)  # no function knew a reward
        return per_function

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """Nothing: TRL would score padded rows here, and `_prepare_inputs` scores packed ones."""
        return None, None, None

    # -- share out and score ------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        """This rank's share of the next optimizer step; samples and scores when a new rollout step begins.

        As in TRL, each rank's responses are shuffled and cut into `steps_per_generation` optimizer steps. Only then are those
        of all ranks dealt out again by length.
        """
        if self._step % self.args.optimizer_steps_per_rollout_step == 0:
            batch = shuffle_sequence_dict(self._generate_and_score_completions(generation_batch))
            with self.clock.stage("scoring"):
                steps = [unpad(one) for one in split_tensor_dict(batch, self.args.steps_per_generation)]
                everyone = exchange(steps, self.accelerator)
                self._scores.score(everyone)  # what has not been scored while others were sampled
                shares = share_out(everyone, len(steps), self.accelerator, self.args.max_tokens_per_micro_batch)
                self._scores.hand_out(everyone, shares)
                self._scoring_sums = self._scores.sums(everyone)
                self._buffered_inputs = shares
                self._note(self.weight_push.compare_responses(shares))
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def score(self, row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of every response token of a packed row, see `PackedPolicy.score`."""
        return self.policy.score(self.model, row)

    # -- train --------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One optimizer step's forward and backward passes (HF calls it once per `global_step`).

        Replaces TRL's, whose micro-batches are padded rows and whose metrics cost six collectives each. Here a micro-batch is
        a packed row, every rank runs the same number of them, and metrics are reduced once.
        """
        model.train()
        step = self._prepare_inputs(inputs)
        with self.clock.stage("training"):
            sums = torch.zeros(len(STEP_SUMS), device=self.accelerator.device)
            for number, batch in enumerate(step.micro_batches, start=1):
                with self._accumulating(model, last=number == len(step.micro_batches)):
                    loss, logps = self.policy.loss(model, batch, step)
                    kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                    # ranks' gradients are averaged, contributions to the loss are to be summed
                    self.accelerator.backward(loss * self.accelerator.num_processes, **kwargs)
                mask = torch.ones_like(logps)
                sums += step_sums(loss, logps.detach(), batch.old_logps, batch.advantages, mask, *self._clip)
            first = self._step % self.args.optimizer_steps_per_rollout_step == 0
            metrics, loss = reduce_once(sums, self._scoring_sums if first else None, self.accelerator)
            computed = sum(batch.row.input_ids.numel() for batch in step.micro_batches)
            metrics["padding_share"] = 1 - sum(sum(batch.row.lengths) for batch in step.micro_batches) / computed
            metrics["load_imbalance"] = step.load_imbalance
            self._note(metrics)
        self._step += 1
        return loss

    @property
    def _clip(self) -> tuple[float, float, float]:
        return self.epsilon_low, self.epsilon_high, self.args.delta

    @contextmanager
    def _accumulating(self, model, last: bool):
        """Gradients are synchronised (and DeepSpeed steps) with the last micro-batch only."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        if last or self.is_deepspeed_enabled:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def _get_grad_norm(self, model, grad_norm=None):
        """Leave out the update if the gradient norm is not finite, on all ranks alike (reference: `dp_actor.py`,
        `_optimizer_step`). The norm is global, so ranks agree without asking. DeepSpeed has already left it out by now."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        skipped = not is_finite(norm)
        if skipped and not self.is_deepspeed_enabled:
            self.optimizer.zero_grad(set_to_none=True)  # AdamW passes over parameters without a gradient
        self._skipped.record(skipped)
        return norm

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay on every parameter: the reference has one flat group, HF exempts norms and biases."""
        return [name for name, _ in model.named_parameters()]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The reference's warm-up, per rollout step."""
        self.lr_scheduler = self.lr_scheduler or warmup_schedule(optimizer or self.optimizer, self.args)
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs):
        """Raises `ConfigError`: TRL's evaluation samples padded rows with the training settings."""
        raise ConfigError(
            "JustRLTrainer has no evaluate(): use heldout_size or validation_benchmarks while it trains, and "
            "recipes/evaluate.py for a checkpoint."
        )

    # -- push ---------------------------------------------------------------------------------------------------------

    def push_weights(self) -> None:
        """Send the policy to the servers and check that it arrived, see `push.WeightPush`."""
        with self.clock.stage("sync"):
            metrics = self.weight_push.push()
        self._note(metrics)

    # -- measure ------------------------------------------------------------------------------------------------------

    @property
    def rollout_step(self) -> int:
        """Finished rollout steps."""
        return self.args.rollout_step(self.state.global_step)

    def record_rollout_step(self) -> None:
        """Metrics of the finished rollout step as a whole."""
        metrics = self._metrics["train"]
        # TRL's log averages what is in a list: totals and peaks are made here
        metrics["tokens/trained"] = [sum(metrics["tokens/trained"])]
        metrics["memory/peak_gib"] = [max(metrics["memory/peak_gib"])]
        metrics["tokens/generated"] = [metrics["completions/mean_length"][-1] * self.args.generation_batch_size]
        metrics["skipped_optimizer_steps"] = [self._skipped.take()]
        self._note(self.clock.metrics(metrics["tokens/generated"][0], metrics["tokens/trained"][0], self.pool))

    def _note(self, values: dict[str, float]) -> None:
        """Add to TRL's next log, which averages the values noted since the last one."""
        for name, value in values.items():
            self._metrics["train"][name].append(value)
