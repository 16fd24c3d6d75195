"""The trainer's side of a weight push: push, then compare log-probabilities with every server."""

from justrl_trl.errors import ServerError, StoppedByRankZero
from justrl_trl.policy.micro_batches import OptimizerStep, scored_sequences
from justrl_trl.policy.packing import Sequence, pack
from justrl_trl.training.sampling import sampling_of
from justrl_trl.weights.gap import PROBE_PROMPTS, PROBE_TOKENS, check_rollouts, make_probe
from justrl_trl.weights.sync import WeightSync


class WeightPush:
    """Pushes the policy and checks that it arrived; every method is called on every rank.

    Args:
        trainer: the `JustRLTrainer`.

    Attributes:
        sync: None until the first push, when the model is sharded.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self.sync: WeightSync | None = None
        self._probe: list[Sequence] = []  # the same sequences after every push

    def push(self) -> dict[str, float]:
        """Send the policy to all servers, read their versions back, compare log-probabilities on the probe.

        Returns:
            Metrics of the widest gap on the probe.

        Raises:
            ServerError (rank 0) / StoppedByRankZero (others): no server ends up with these weights.
        """
        trainer = self._trainer
        args = trainer.args
        if self.sync is None:
            self.sync = WeightSync(
                trainer.accelerator,
                trainer.accelerator.unwrap_model(trainer.model_wrapped),
                trainer.pool,
                address=args.weight_sync_address,
                port=args.vllm_group_port,
                timeout_seconds=args.weight_sync_timeout,
            )
        gap = None
        while gap is None:  # all servers died between push and comparison: push again to those that come back
            try:
                self.sync.push(str(trainer.state.global_step))
            except (ServerError, StoppedByRankZero):
                trainer.save_before_giving_up()
                raise
            self._probe = self._probe or self._make_probe()
            logps, _ = trainer.score(pack(self._probe, trainer.accelerator.device))
            gap = self.sync.prove(self._probe, logps, args.sync_logprob_gap_limit)
        return {"sync/logprob_gap_max": gap.largest, "sync/logprob_gap_mean": gap.mean}

    def _make_probe(self) -> list[Sequence]:
        trainer = self._trainer
        prompts = trainer._tokenize_prompts(trainer.train_dataset[:PROBE_PROMPTS]["prompt"])[0]
        sampling = sampling_of(trainer, 1, min(PROBE_TOKENS, trainer.max_completion_length), "probe")
        return make_probe(prompts, sampling, trainer.pool, trainer.accelerator)

    def require_current(self) -> None:
        """Raises `RuntimeError` if the servers do not hold the policy of this optimizer step."""
        version = None if self.sync is None else self.sync.version
        step = self._trainer.state.global_step
        if version != str(step):
            raise RuntimeError(f"The server has weight version {version}, the trainer is at {step}.")

    def compare_responses(self, steps: list[OptimizerStep]) -> dict[str, float]:
        """Compare trainer and servers on a few responses of this rollout step: did the servers sample the policy to be trained?

        Returns:
            Metrics of the gap; empty where nothing was compared.

        Raises:
            ServerError: the gap is beyond `gap_limit`.
        """
        trainer = self._trainer
        args = trainer.args
        if self.sync is None or not args.gap_responses:
            return {}
        sequences, logps = scored_sequences(steps, args.gap_responses)
        gaps = self.sync.gap(sequences, logps)
        if not gaps:
            return {}
        say = trainer.pool.say if trainer.accelerator.is_main_process else lambda line: None
        return check_rollouts(gaps, len(sequences), warning=args.gap_warning, limit=args.gap_limit, say=say)
