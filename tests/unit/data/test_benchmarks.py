"""Every layout of the nine gives the same problems, and a file that is not the benchmark is refused by name.

Files are written by hand. There is no network here: the Hub is a function in the place of `datasets.load_dataset`, which
checks what is asked for and hands out rows in the columns and types the pinned Hub files have. JustRL's real files run when
they lie beside the checkout.
"""

from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from justrl_trl.data.benchmarks import BENCHMARKS, Problem, load, select
from justrl_trl.errors import DataError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "benchmarks"
TWO = replace(BENCHMARKS["amc23"], problems=2)  # amc23's folder and Hub id, with two problems


def write(folder: Path, rows: list[dict]) -> Path:
    """`<folder>/AMC23/test.parquet`; returns `folder` as the data_dir."""
    path = folder / TWO.folder / "test.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


def layout_a(problem: str, answer: str) -> dict:
    return {
        "prompt": [{"content": problem, "role": "user"}],
        "data_source": "AMC23",
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": "AMC23-0", "split": "test"},
    }


def layout_b(problem: str, answer: object) -> dict:
    return {"problem_idx": 1, "problem": problem, "answer": answer, "problem_type": ["Algebra"]}


# What 'two problems, stripped' must come out as, whatever the layout.
EXPECTED = [Problem(0, "What is 2+3?", "5"), Problem(1, "What is 3+4?", "7")]
LAYOUTS = {
    "A": [layout_a("What is 2+3?\n", " 5"), layout_a(" What is 3+4?", "7 ")],
    "B": [layout_b("What is 2+3?\n", " 5"), layout_b(" What is 3+4?", "7 ")],
    "question/answer": [{"question": "What is 2+3?\n", "answer": " 5"}, {"question": " What is 3+4?", "answer": "7 "}],
    "answer as float (amc23)": [
        {"id": 0, "answer": 5.0, "url": "u", "question": "What is 2+3?"},
        {"id": 1, "answer": 7.0, "url": "u", "question": "What is 3+4?"},
    ],
    "answer as int64 (aime_2025)": [layout_b("What is 2+3?", 5), layout_b("What is 3+4?", 7)],
    "worked solution beside the answer (aime_2024, MATH-500)": [
        {"problem": "What is 2+3?", "solution": "Add: \\boxed{5}", "answer": "5"},
        {"problem": "What is 3+4?", "solution": "Add: \\boxed{7}", "answer": "7"},
    ],
    "answer list (OlympiadBench)": [
        {"question": "What is 2+3?\n", "final_answer": ["5"], "solution": ["Add."], "context": None},
        {"question": " What is 3+4?", "final_answer": ["7 "], "solution": ["Add."], "context": ""},
    ],
}


class Hub:
    """Stands where `datasets.load_dataset` stands: hands out `rows` and remembers what was asked."""

    def __init__(self, rows: list[dict]):
        self.rows, self.asked = rows, []

    def __call__(self, name, config, *, split, revision):
        self.asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(self.rows)


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_same_problems_from_a_file_and_from_the_stand_in_hub(tmp_path, monkeypatch, rows):
    assert load(TWO, write(tmp_path, rows)) == EXPECTED
    hub = Hub(rows)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load(TWO, None) == EXPECTED
    assert hub.asked == [("math-ai/amc23", None, "test", "80815d37005feb82cd7f8fbc6901d5d3eff43057")]


def test_a_benchmark_is_asked_of_the_hub_with_its_config_split_and_commit(monkeypatch):
    hub = Hub([{"question": f"q{i}", "final_answer": ["1"], "context": None} for i in range(674)])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert len(load(BENCHMARKS["olympiad"])) == 674
    commit = "91184b52131e7fc9455fef848035173aea8cc01a"
    assert hub.asked == [("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", commit)]


def test_answers_stay_raw(tmp_path):
    rows = [layout_a("p", "\\boxed{204}"), layout_a("q", "\\frac{27.0}{1}")]
    assert [p.answer for p in load(TWO, write(tmp_path, rows))] == ["\\boxed{204}", "\\frac{27.0}{1}"]


def test_context_goes_before_the_question_with_one_line_break(tmp_path):
    rows = [
        {"question": "\nCompute $n$.", "final_answer": ["1"], "context": "Let $n=1$.\n"},
        {"question": "Compute $m$.", "final_answer": ["2"], "context": " "},
    ]
    assert [p.problem for p in load(TWO, write(tmp_path, rows))] == ["Let $n=1$.\nCompute $n$.", "Compute $m$."]


def test_several_answers_in_a_list_are_joined(tmp_path):
    rows = [{"question": "q", "final_answer": ["$(1,8)$", " 2"]}, {"question": "r", "final_answer": ["$69$,$84$"]}]
    assert [p.answer for p in load(TWO, write(tmp_path, rows))] == ["$(1,8)$, 2", "$69$,$84$"]


# Bad second rows, and what the message must hold.
BAD = {
    "empty problem": (layout_b(" \n", "1"), r"empty problem in row 1"),
    "no problem": (layout_b(None, "1"), r"empty problem in row 1"),
    "no answer": (layout_b("p", None), r"no answer in row 1"),
    "blank answer": (layout_b("p", " "), r"no answer in row 1"),
    "no messages": ({"prompt": [], "reward_model": {"ground_truth": "1"}}, r"empty problem in row 1"),
    "no ground truth": ({"prompt": [{"content": "p"}], "reward_model": {"ground_truth": None}}, r"no answer in row 1"),
    "empty list": ({"question": "q", "final_answer": []}, r"no answer in row 1"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_a_row_without_text_is_named(tmp_path, row, message):
    good = {"A": layout_a("p", "1"), "B": layout_b("p", "1"), "C": {"question": "p", "final_answer": ["1"]}}
    kind = "A" if "prompt" in row else "B" if "problem" in row else "C"
    with pytest.raises(DataError, match=message):
        load(TWO, write(tmp_path, [good[kind], row]))


@pytest.mark.parametrize("number", [0.5, float("nan"), float("inf")])
def test_a_number_that_is_not_whole_is_refused(tmp_path, number):
    with pytest.raises(DataError, match=r"neither text nor a whole number in row 1"):
        load(TWO, write(tmp_path, [layout_b("p", 1.0), layout_b("q", number)]))


def test_another_number_of_rows_is_refused(tmp_path):
    for count in (1, 3):
        with pytest.raises(DataError, match=rf"has {count} rows, AMC 2023 has 2.*math-ai/amc23 at revision 80815d3"):
            load(TWO, write(tmp_path, [layout_b("p", "1")] * count))


def test_a_missing_file_is_named_with_the_remedy_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    write(tmp_path, LAYOUTS["B"])  # amc23 only
    with pytest.raises(DataError) as caught:
        load(BENCHMARKS["aime24"], tmp_path)
    message = str(caught.value)
    assert f"AIME 2024: no file '{tmp_path / 'AIME24' / 'test.parquet'}'" in message
    assert "the folder has amc23" in message
    assert "Copy data/AIME24/test.parquet of thunlp/JustRL there" in message and "HuggingFaceH4/aime_2024" in message


def test_unknown_columns_and_broken_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="columns text: no problem and answer there"):
        load(TWO, write(tmp_path, [{"text": "p"}] * 2))
    path = write(tmp_path, LAYOUTS["B"]) / TWO.folder / "test.parquet"
    whole = path.read_bytes()
    # Cut off at the end; and with a whole footer, but the first page overwritten.
    for broken in (whole[:-20], whole[:4] + bytes(200) + whole[204:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="cannot be read.*copy it again"):
            load(TWO, tmp_path)


def test_selection_by_name():
    nine = ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad", "hmmt25", "brumo25", "cmimc25"]
    assert [b.name for b in select("all")] == [b.name for b in select("paper")] == list(BENCHMARKS) == nine
    assert [b.name for b in select("math500, AIME24,math500")] == ["math500", "aime24"]
    assert [b.name for b in select(["cmimc25", "all"])] == ["cmimc25", *nine[:-1]]
    with pytest.raises(DataError, match=r"unknown benchmarks 'aime26', 'gsm8k': choose from aime24, .*cmimc25"):
        select("aime26,aime24,gsm8k")
    with pytest.raises(DataError, match="no benchmark named"):
        select(" , ")


def test_sizes_samples_and_pins_are_the_papers():
    assert [b.problems for b in BENCHMARKS.values()] == [30, 30, 40, 500, 272, 674, 30, 30, 40]
    assert {b.name for b in BENCHMARKS.values() if b.samples == 4} == {"math500", "minerva", "olympiad"}
    assert {b.samples for b in BENCHMARKS.values()} == {4, 32}
    assert all(len(b.revision) == 40 and set(b.revision) <= set("0123456789abcdef") for b in BENCHMARKS.values())


@pytest.mark.skipif(not REAL.is_dir(), reason=f"JustRL's benchmark files are not at {REAL}")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_real_files_load(name):
    problems = load(BENCHMARKS[name], REAL)
    assert [p.index for p in problems] == list(range(BENCHMARKS[name].problems))
    assert all(p.problem == p.problem.strip() and p.answer == p.answer.strip() != "" for p in problems)
    if name == "aime24":
        assert problems[0].answer == "\\boxed{204}"  # as upstream keeps it
    if name == "olympiad":
        # What the Hub path assumes and JustRL's file shows: the context stands before the question with one line break
        # between, and several answers are one raw string.
        assert "\nCompute $" in problems[332].problem and "\n\nCompute $" not in problems[332].problem
        assert problems[5].answer.startswith("$(1,8,19), (2,")
