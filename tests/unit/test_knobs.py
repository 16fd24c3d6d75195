"""Bounds stand with the field, are checked in one place, and trouble no parser that does not know them."""

import math
from dataclasses import dataclass

import pytest
from trl import TrlParser

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError
from justrl_trl.knobs import check_bounds, knob


@dataclass
class Some:
    count: int = knob(3, "How many.", min=1)
    share: float | None = knob(None, "How much.", above=0, max=1)
    kind: str = knob("a", "Which.", choices=["a", "b"])
    names: list[str] = knob(["x"], "Names.")
    free: float = knob(-5.0, "Anything.")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("count", 0, "count must be an integer of at least 1, got 0."),
        ("count", 1.5, "count must be an integer of at least 1, got 1.5."),
        ("count", True, "count must be an integer of at least 1, got True."),
        ("share", 0.0, "share must be a number above 0 and at most 1, got 0.0."),
        ("share", 1.01, "share must be a number above 0 and at most 1, got 1.01."),
        ("share", math.nan, "share must be a number above 0 and at most 1, got nan."),
        ("share", "half", "share must be a number above 0 and at most 1, got 'half'."),
        ("kind", "c", "kind must be one of 'a', 'b', got 'c'."),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_what_it_must_be(name, value, words):
    with pytest.raises(ConfigError) as raised:
        check_bounds(Some(**{name: value}))
    assert str(raised.value) == words


def test_values_within_bounds_pass_and_none_is_no_value():
    check_bounds(Some())
    check_bounds(Some(count=1, share=1.0, kind="b", free=1e9))
    check_bounds(Some(share=None))


def test_lists_are_not_shared_between_instances():
    one = Some()
    one.names.append("y")
    assert Some().names == ["x"]


def test_help_states_the_bounds():
    metadata = {name: field.metadata for name, field in Some.__dataclass_fields__.items()}
    assert metadata["count"]["help"] == "How many. At least 1."
    assert metadata["share"]["help"] == "How much. Above 0 and at most 1."


def test_trls_own_parser_takes_the_configuration_of_this_package():
    (training,) = TrlParser(JustRLConfig).parse_args_and_config(["--num_rollout_steps", "7", "--use_cpu", "True"])
    assert training.num_rollout_steps == 7
