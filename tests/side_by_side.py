"""Stock TRL and this package on the same responses: gradients, losses and metrics of every optimizer step.

Both trainers run as a user runs them, except for where responses come from: both get the same random ones, and no server is
pushed to. As a program, `python side_by_side.py OUT CASES` (JSON, a name for each case) runs them one after
another under a launcher, and rank 0 saves what it saw.
"""

import json
import os
import random
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from justrl_trl.config import JustRLConfig
from justrl_trl.data import tiny
from justrl_trl.distributed import gather_ragged, leave_together
from justrl_trl.policy.packing import Sequence
from justrl_trl.training.trainer import JustRLTrainer

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list")
PROMPTS = [f"{'count ' * (i % 5)}what is {i} + {2 * i}?" for i in range(64)]


def small_model(tied: bool, vocabulary: int, device: str = "cpu", **changes) -> Qwen2ForCausalLM:
    """A fresh Qwen2 of four layers; peaked enough that a few updates carry ratios beyond the clip.

    Args:
        device: where the random weights are drawn. The same seed gives other weights on a GPU than on a CPU.
        changes: other sizes.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": vocabulary}
    sizes |= {"initializer_range": 0.1, "dtype": "float32"}
    torch.manual_seed(7)
    with torch.device(device):
        return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=tied, **sizes | changes))


def response(prompt_ids: list[int], copy: int, longest: int, vocabulary: int, eos: int) -> list[int]:
    """The same for both trainers: random tokens, ended by EOS unless cut; lengths as in the paper's run, where the limit is
    15,360, the mean a third of it, and every twentieth response is cut."""
    rng = random.Random(f"{prompt_ids}{copy}")
    length = min(longest, int(rng.lognormvariate(-1.54, 0.95) * longest) + 1)
    tokens = [rng.randrange(vocabulary) for _ in range(length)]
    return tokens if length == longest else [*tokens[:-1], eos]


def reward(completion_ids, **kwargs) -> list[float]:
    """+1 or -1, from the tokens."""
    return [1.0 if random.Random(str(ids)).random() < 0.4 else -1.0 for ids in completion_ids]


@contextmanager
def counted_collectives():
    """A list whose only entry counts calls of torch's collectives except DeepSpeed's (DDP's are not made in Python)."""
    count, originals = [0], {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def counting(original):
        def call(*args, **kwargs):
            frame, own = sys._getframe(1), True
            while frame is not None and own:
                own = "/deepspeed/" not in frame.f_code.co_filename
                frame = frame.f_back
            count[0] += own
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(torch.distributed, name, counting(original))
        yield count
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


class SameResponses:
    """Mixed into both trainers: recorded responses instead of sampled ones, and every gradient kept (`Case.recorded`)."""

    seen: dict | None = None  # what was kept
    warmup_share: int = 1  # see `Case`
    plant_nan_at: dict[int, int] = {}  # optimizer step -> rank whose loss is NaN there

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        longest, vocabulary = self.max_completion_length, self.model.config.vocab_size
        if self.state.global_step == 0:
            longest //= self.warmup_share
        rows = [
            response(ids, i % num_generations, longest, vocabulary, self.processing_class.eos_token_id)
            for i, ids in enumerate(prompt_ids)
        ]
        torch.manual_seed(1234 + self.accelerator.process_index)  # the shuffle into optimizer steps comes next
        return rows, None

    def keep_records(self) -> None:
        self.seen = {"gradients": [], "losses": [], "weights": [], "lr": [], "metrics": [], "collectives": [], "sharded": True}
        self.add_callback(_KeepRecords(self))

    def gradient(self) -> torch.Tensor:
        return self._whole(safe_get_full_grad if self.is_deepspeed_enabled else lambda p: p.grad)

    def weights(self) -> torch.Tensor:
        return self._whole(safe_get_full_fp32_param if self.is_deepspeed_enabled else lambda p: p)

    def _whole(self, read) -> torch.Tensor:
        """`(P,)` over all trained parameters; a collective under ZeRO-3."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.cat([read(p).detach().flatten().cpu().clone() for p in trained])

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.seen is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.is_deepspeed_enabled and not hasattr(self, "_tapped"):
            self._tapped = engine = self.accelerator.deepspeed_engine_wrapped.engine
            original = engine.step

            def step(*args, **kwargs):
                self.seen["gradients"].append(self.gradient())
                return original(*args, **kwargs)

            engine.step = step
        with counted_collectives() as count:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen["collectives"].append(count[0])
        self.seen["losses"].append(float(loss))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        if self.seen is not None and not self.is_deepspeed_enabled:  # whose engine has already stepped
            self.seen["gradients"].append(self.gradient())
        return super()._get_grad_norm(model, grad_norm=grad_norm)


class Served(SameResponses, JustRLTrainer):
    """This package's trainer with its own sampling, from `pool`, whose servers give the recorded responses."""

    def _generate_single_turn(self, *args, **kwargs):
        rows = JustRLTrainer._generate_single_turn(self, *args, **kwargs)
        torch.manual_seed(1234 + self.accelerator.process_index)  # as `SameResponses`
        return rows

    def push_weights(self) -> None:
        for name in ("max", "mean"):
            self._metrics["train"][f"sync/logprob_gap_{name}"].append(0.0)


class _KeepRecords(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.seen["weights_before"] = self.trainer.weights()

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if self.trainer.is_deepspeed_enabled:
            whole = [p for p in self.trainer.model.parameters() if p.ds_status is ZeroParamStatus.AVAILABLE]
            self.trainer.seen["sharded"] &= not whole
        self.trainer.seen["lr"].append(lr_scheduler.get_last_lr()[0])
        self.trainer.seen["weights"].append(self.trainer.weights())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.trainer.seen["metrics"].append(dict(logs))


class Stock(SameResponses, GRPOTrainer):
    """TRL as it is, but for its `dapo` denominator: the optimizer step's own tokens instead of the average optimizer step's."""

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        own = self.accelerator.gather(inputs["completion_mask"].sum()).sum()
        return {**inputs, "num_items_in_batch": own * self.args.steps_per_generation}


class Untouched(SameResponses, GRPOTrainer):
    """TRL as it is."""


class Ours(SameResponses, JustRLTrainer):
    """This package's trainer without a server."""

    waves: list[int] = []  # responses that come early, and are scored before the others are there: how many at a time

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        rows, nothing = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.waves:
            self._score_some(prompt_ids, rows)
        return rows, nothing

    def _score_some(self, prompt_ids, rows) -> None:
        prompts, responses = (
            gather_ragged([torch.tensor(ids) for ids in part], self.accelerator) for part in (prompt_ids, rows)
        )
        everyone = [
            Sequence(torch.cat([prompt, ids]), len(prompt), row=i)
            for i, (prompt, ids) in enumerate(zip(prompts, responses, strict=True))
        ]
        random.Random(5).shuffle(everyone)
        for size in self.waves:
            self._scores.score(everyone[:size])
            everyone = everyone[size:]

    def push_weights(self) -> None:
        for name in ("max", "mean"):
            self._metrics["train"][f"sync/logprob_gap_{name}"].append(0.0)

    def keep_records(self) -> None:
        super().keep_records()
        original = self.policy.loss

        def loss(*args):
            value, logps = original(*args)
            planted = self.plant_nan_at.get(self._step) == self.accelerator.process_index
            return (value * float("nan") if planted else value), logps

        self.policy.loss = loss


@dataclass
class Case:
    """One run. `trainer`: stock (TRL with our denominator), trl (TRL untouched), ours, or served (ours, from a pool); `changes`
    go to its configuration."""

    trainer: str
    tied: bool = False
    lora: bool = False
    lora_dropout: float = 0.0
    model: dict = field(default_factory=dict)  # sizes of the model
    longest: int = 40  # response tokens
    responses: int = 64  # per rollout step
    rollout_steps: int = 1
    optimizer_steps: int = 4  # per rollout step
    accumulation: int = 1  # stock: micro-batches per optimizer step
    num_iterations: int = 1
    learning_rate: float = 1e-3
    gradient_checkpointing: bool = False
    bf16: bool = False
    budget: int = 400  # ours: tokens per micro-batch
    waves: list = field(default_factory=list)  # ours: see `Ours.waves`
    plant_nan_at: dict = field(default_factory=dict)
    attention: str | None = None  # attn_implementation of the model; None: what the trainer chooses
    device: str = "cpu"  # where the random weights are drawn
    recorded: bool = True  # keep every gradient and all weights in `seen`, on the CPU; a large model has no room for them
    warmup_share: int = 1  # responses of the first rollout step are this many times shorter
    whole_parameters: bool = False  # ZeRO-3 keeps small parameters whole on every rank, as it does by default
    changes: dict = field(default_factory=dict)

    def arguments(self, folder: str) -> GRPOConfig | JustRLConfig:
        """The configuration of the trainer, the same but for names and geometry."""
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        common = {
            "output_dir": folder,
            "num_iterations": self.num_iterations,
            "num_generations": 8,
            "max_completion_length": self.longest,
            "learning_rate": self.learning_rate,
            "max_grad_norm": 1e9,
            "beta": 0.0,
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "delta": 10.0,
            "weight_decay": 0.0,
            "gradient_checkpointing": self.gradient_checkpointing,
            "bf16": self.bf16,
            "seed": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        if self.trainer in ("ours", "served"):
            ours = {
                "generation_batch_size": self.responses,
                "steps_per_generation": self.optimizer_steps,
                "num_rollout_steps": self.rollout_steps,
                "save_rollout_steps": 0,
                "warmup_rollout_steps": 0,
                "max_prompt_length": 64,
                "max_tokens_per_micro_batch": self.budget,
                "advantage_epsilon": 1e-4,  # TRL's
                "loss_normalization": "token_mean",
            }
            return self._partitioned(JustRLConfig(**common | ours | self.changes))
        micro_batches = self.optimizer_steps * self.accumulation
        stock = {
            "per_device_train_batch_size": self.responses // micro_batches // ranks,
            "gradient_accumulation_steps": self.accumulation,
            "steps_per_generation": micro_batches,
            "max_steps": self.rollout_steps * self.optimizer_steps * self.num_iterations,
            "logging_steps": self.optimizer_steps * self.num_iterations,
            "lr_scheduler_type": "constant",
            "loss_type": "dapo",
            "use_vllm": False,
            "save_strategy": "no",
            "ddp_backend": "gloo" if ranks > 1 and not torch.cuda.is_available() else None,
            "use_cpu": ranks > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        }
        return self._partitioned(GRPOConfig(**common | stock | self.changes))

    def _partitioned(self, args):
        """Under ZeRO-3, parameters below 100,000 elements are kept whole on every rank: all of a small model's, which would
        then never be gathered."""
        if args.deepspeed_plugin is not None and not self.whole_parameters:
            args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return args


def build(case: Case, folder: str):
    """The trainer of a case."""
    kind = {"ours": Ours, "served": Served, "stock": Stock, "trl": Untouched}[case.trainer]
    tokenizer = tiny._tokenizer()
    model = small_model(case.tied, len(tokenizer), case.device, **case.model)
    if case.attention:
        model.set_attn_implementation(case.attention)
    trainer = kind(
        model=model,
        args=case.arguments(folder),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]),
        reward_funcs=reward,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=4, lora_dropout=case.lora_dropout)
        if case.lora
        else None,
        **({"pool": None} if case.trainer in ("ours", "served") else {}),
    )
    if case.lora:  # B starts at zero, and with it the gradient of A
        torch.manual_seed(3)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if case.trainer == "served":
        trainer.weight_push.require_current = lambda: None  # the servers have no weights that could be old
    trainer.waves = case.waves
    trainer.warmup_share = case.warmup_share
    trainer.plant_nan_at = {int(step): rank for step, rank in case.plant_nan_at.items()}
    if case.recorded:
        trainer.keep_records()
    return trainer


def run(trainer: str, **settings) -> dict:
    """Train a `Case`.

    Returns:
        `gradients`: `(P,)` of each optimizer step, over all ranks; `losses`; `lr` after each; `metrics` of each rollout step.
    """
    with tempfile.TemporaryDirectory() as folder:
        built = build(Case(trainer, **settings), folder)
        built.train()
        return built.seen


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((one.double() - other.double()).norm() / other.double().norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for name, case in json.loads(sys.argv[2]).items():
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            AcceleratorState._reset_state()  # it holds the engine's configuration of the case before
        results[name] = run(**case)
    if torch.distributed.get_rank() == 0:
        torch.save(results, sys.argv[1])
    leave_together()
