"""The packaged facts are the paper's: averages add up, spot values as printed, equal to the reference copy if present."""

import math
from pathlib import Path

import pytest
import yaml

from justrl_trl.data.benchmarks import BENCHMARKS
from justrl_trl.reports.paper import family_of, figure1, table_number, table_rows

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "paper_facts.yaml"
FAMILIES = ("deepseek", "nemotron")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_have_the_nine_benchmarks_and_the_average(family):
    for row in table_rows(family).values():
        assert list(row) == [*BENCHMARKS, "avg"]
        assert all(value is None or 0 < value < 100 for value in row.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_printed_averages_are_plain_means_over_the_nine(family):
    for model, row in table_rows(family).items():
        values = [value for name, value in row.items() if name != "avg"]
        if None in values:
            assert model == "BroRL" and row["avg"] is None
        else:
            # Rounding moves it by up to 0.005 + 0.005. DeepScaleR's is misprinted: 44.88, and its row gives 44.898.
            assert row["avg"] == pytest.approx(sum(values) / 9, abs=0.02 if model == "DeepScaleR" else 0.01)


def test_numbers_the_paper_is_known_for():
    assert table_rows("deepseek")["JustRL-DeepSeek-1.5B"]["avg"] == 54.87
    assert table_rows("nemotron")["JustRL-Nemotron-1.5B"]["avg"] == 64.32
    assert table_rows("deepseek")["JustRL-DeepSeek-1.5B"]["aime24"] == 52.60  # evals/, step 4,380
    assert figure1("deepseek")[4860] == 58.59  # validation, another measurement
    assert figure1("nemotron")[3440] == 73.33
    assert (table_number("deepseek"), table_number("nemotron")) == (3, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_figure_1_starts_before_training_and_rises(family):
    curve = figure1(family)
    assert list(curve) == sorted(curve) and next(iter(curve)) == 0
    assert max(curve.values()) == list(curve.values())[-1] > curve[0]


def test_callers_cannot_change_the_facts():
    table_rows("deepseek")["BroRL"]["aime24"] = 0
    figure1("deepseek").clear()
    assert table_rows("deepseek")["BroRL"]["aime24"] == 57.50 and figure1("deepseek")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepseek"),
        ("hbx/JustRL-DeepSeek-1.5B", "deepseek"),
        ("runs/justrl_deepseek_1.5b/checkpoint-17520", "deepseek"),
        ("nvidia/OpenMath-Nemotron-1.5B", "nemotron"),
        ("/models/JustRL-Nemotron-1.5B/", "nemotron"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", None),
        ("nvidia/OpenMath-Nemotron-7B", None),
        ("runs/tiny", None),
    ],
)
def test_family_by_name(name, family):
    assert family_of(name) == family


def test_unknown_family_is_refused():
    for ask in (table_rows, figure1, table_number):
        with pytest.raises(ValueError, match="no model family 'qwen': choose from deepseek, nemotron"):
            ask("qwen")


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"the reference copy of the facts is not at {REFERENCE}")
def test_facts_equal_the_reference_copy():
    facts = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    for family, table in (("deepseek", "table3_r1_distill_1_5b"), ("nemotron", "table5_openmath_nemotron_1_5b")):
        assert [list(row.values()) for row in table_rows(family).values()] == list(facts[table].values())
        curve = dict(facts["figure1_aime24_avg32"][family])
        step, value = curve.pop("peak")
        assert figure1(family) == curve | {step: value}
        assert not any(math.isnan(value) for value in figure1(family).values())
