"""JustRL (arXiv 2512.16649) on the Hugging Face stack. Public names; each is imported when first used, so that the small
helper processes of this package (server guard, vLLM plugin) do not pay for torch and TRL."""

import logging
from importlib import import_module

# TRL imports vLLM, which warns on every machine without a GPU that it will do without Triton
logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)

_PUBLIC = {
    "JustRLConfig": "justrl_trl.config",
    "JustRLTrainer": "justrl_trl.training.trainer",
    "dapo_reward": "justrl_trl.grading.strict",
    "dapo_score": "justrl_trl.grading.strict",
    "group_advantages": "justrl_trl.training.advantage",
    "load_problems": "justrl_trl.data.problems",
    "overlong_penalty": "justrl_trl.grading.strict",
    "policy_loss": "justrl_trl.policy.loss",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'justrl_trl' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)
