"""The ablations of Figure 3 pay what they say: the same scale, equivalent answers, and a ramp over the last tokens."""

import pytest

from justrl_trl.config import JustRLConfig
from justrl_trl.grading.strict import dapo_reward
from justrl_trl.training.rewards import overlong_reward, reward_functions, robust_reward


def config(**changes) -> JustRLConfig:
    return JustRLConfig(max_prompt_length=1024, max_completion_length=15360, **changes)


def test_the_recipe_is_the_strict_verifier_alone():
    assert reward_functions(config()) == [dapo_reward]


def test_the_ablations_add_the_penalty_and_change_the_verifier():
    verifier, penalty = reward_functions(config(verifier="robust", overlong_buffer_length=4096))
    assert verifier is robust_reward
    # 0 up to 15360 - 4096 = 11264 tokens, then a line down to -1 at 15360
    assert penalty(completion_ids=[[0] * n for n in (10, 11264, 13312, 15360)]) == [0.0, 0.0, -0.5, -1.0]


def test_the_factor_scales_the_penalty():
    assert overlong_reward(100, 50, 0.5)(completion_ids=[[0] * 75]) == [-0.25]


@pytest.mark.parametrize(
    ("answer", "truth", "strict", "robust"),
    [
        (r"\boxed{5}", "5", 1.0, 1.0),
        (r"\boxed{x=5}", "5", -1.0, 1.0),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", -1.0, 1.0),
        (r"\boxed{1,234}", "1234", -1.0, 1.0),
        (r"\boxed{\sqrt{2}\cdot 3}", r"3\sqrt{2}", -1.0, 1.0),  # by algebra, in a process of its own
        (r"\boxed{6}", "5", -1.0, -1.0),
        ("the answer is 5", "5", -1.0, -1.0),
        (r"\boxed{9^{9^{9^9}}}", "5", -1.0, -1.0),
    ],
)
def test_the_robust_verifier_pays_the_same_for_equivalent_answers(answer, truth, strict, robust):
    completion = [[{"role": "assistant", "content": f"so {answer}."}]]
    assert dapo_reward(completion, [truth]) == [strict]
    assert robust_reward(completion, [truth]) == [robust]


def test_the_robust_verifier_logs_what_it_could_not_grade():
    told = {}
    robust_reward([r"\boxed{5}", "no box"], ["5", "5"], log_metric=lambda name, value: told.__setitem__(name, value))
    assert told["accuracy"] == 0.5 and told["grading/timeouts"] == 0


def test_a_buffer_longer_than_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"overlong_buffer_length=20000 .* max_completion_length=15360"):
        config(overlong_buffer_length=20000)
