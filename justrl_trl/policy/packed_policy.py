"""Score and train the model on packed rows.

Scoring and training take the same way through the model, inside its own forward pass: that is where DDP and ZeRO-3 do their
work, and where a ratio of 1 before the first update comes from.
"""

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing

from justrl_trl.config import JustRLConfig
from justrl_trl.policy.attention import packed_arguments, use_packed_attention
from justrl_trl.policy.fused_loss import add_liger_loss, check_dense, check_liger_support
from justrl_trl.policy.loss import denominator, normalize, policy_loss
from justrl_trl.policy.micro_batches import MicroBatch, OptimizerStep
from justrl_trl.policy.packing import PackedRow


class PackedPolicy:
    """Teaches a model packed rows and the fused loss, and calls it with them; a call is a collective under ZeRO-3.

    Args:
        model: unwrapped, with or without adapters; it is changed in place.
        args: of the trainer: `loss_backend`, `loss_normalization`, gradient checkpointing.
        accelerator: of the trainer.
        clip: epsilon_low, epsilon_high, delta.
        temperature: of the rollouts; logits are divided by it.

    Raises:
        ValueError: if the model has what the objective or the loss backend lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: JustRLConfig,
        accelerator: Accelerator,
        clip: tuple[float, float, float],
        temperature: float,
    ):
        self._args, self._accelerator, self._clip = args, accelerator, clip
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        use_packed_attention(self._base, half_precision=args.bf16 or args.fp16)
        check_dense(self._base)
        if args.loss_backend == "liger":
            check_liger_support(self._base, args.cast_lm_head_to_fp32)
            add_liger_loss(self._base, *clip, temperature=temperature)

    @torch.no_grad()
    def score(self, model: torch.nn.Module, row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy `(N,)` of every response token, without gradients.

        It takes the same way through the model as training does: DeepSpeed loses track of an untied head that is called as a
        module once and read directly later.
        """
        training = model.training
        model.eval()  # as the reference scores: without the dropout that adapters bring along
        try:
            with disable_gradient_checkpointing(model, self._args.gradient_checkpointing_kwargs):
                return self._forward(model, row)
        finally:
            model.train(training)

    def loss(self, model: torch.nn.Module, batch: MicroBatch, step: OptimizerStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Contribution of a micro-batch to the loss of its optimizer step, and log-probabilities `(N,)`.

        Args:
            model: as the trainer wraps it, so that gradients are synchronised.
        """
        sizes = {
            "sequences_in_micro_batch": len(batch.indices),
            "sequences_in_step": step.sequences,
            "tokens_in_step": step.tokens,
        }
        mode = self._args.loss_normalization
        if self._args.loss_backend == "trl":
            logps, _ = self._forward(model, batch.row)
            mask = torch.ones_like(logps)  # a packed row has response tokens only, and TRL has emptied masked responses
            per_token = policy_loss(logps, batch.old_logps, batch.advantages, mask, *self._clip)
            return normalize(per_token, mask, mode, **sizes), logps
        weight = float(denominator(mode, tokens_in_micro_batch=batch.tokens, **sizes))
        liger = {
            "positions": batch.row.scored,
            "targets": batch.row.targets,
            "old_per_token_logps": batch.old_logps,
            "advantages": batch.advantages,
            # made on the device: Liger would copy a number there, and wait
            "denominator": torch.full((), weight, device=self._accelerator.device),
        }
        with self._accelerator.autocast():
            outputs = model(**self._arguments(batch.row), liger=liger)
        return outputs.loss, outputs.log_probs

    def _forward(self, model: torch.nn.Module, row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy `(N,)` of every response token of a packed row, through TRL's fused head."""
        with self._accelerator.autocast():
            outputs = model(**self._arguments(row), labels=row.labels, fused_lm_head=True)
        return outputs.log_probs[0, row.scored], outputs.entropy[0, row.scored]

    def _arguments(self, row: PackedRow) -> dict:
        return {"input_ids": row.input_ids, "position_ids": row.position_ids, **packed_arguments(self._base, row)}
