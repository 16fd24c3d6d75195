"""The table reads as text, holds our numbers beside the paper's, and says what would make the comparison unfair."""

import re
from dataclasses import replace

import pytest

from justrl_trl.data.benchmarks import BENCHMARKS
from justrl_trl.reports.paper import table_rows
from justrl_trl.reports.scores import BenchmarkScore
from justrl_trl.reports.tables import results_table

GRADER = {"grader": "the rule grader alone"}
MODEL = "runs/justrl_deepseek_1.5b"


def one(name: str, **changes) -> BenchmarkScore:
    """A score of `name` at the paper's size, with numbers that are easy to find again."""
    benchmark = BENCHMARKS[name]
    ks = [k for k in (1, 2, 4, 8, 16, 32) if k <= benchmark.samples]
    known = BenchmarkScore(
        problems=benchmark.problems,
        samples=benchmark.samples,
        avg=0.5,
        stderr=0.03,
        ci_low=0.4412,
        ci_high=0.5588,
        pass_at={k: 0.5 + k / 100 for k in ks},
        maj_at={k: 0.5 + k / 200 for k in ks},
        mean_tokens=12345.6,
        truncated=0.021,
        no_box=0.034,
        solve_none=0.1,
        solve_all=0.25,
    )
    return replace(known, **changes)


def nine(**changes) -> dict[str, BenchmarkScore]:
    return {name: one(name, **changes) for name in BENCHMARKS}


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table of a text as rows of stripped cells, without the rule; a cell may hold an escaped `|`."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    rows = [[[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in t.splitlines()] for t in found]
    return [[table[0], *table[2:]] for table in rows]


def test_our_row_stands_above_the_papers_table():
    text = results_table(nine() | {"aime24": one("aime24", avg=0.6226, stderr=0.0712)}, MODEL, GRADER)
    head, ours, *papers = tables(text)[0]
    folders = ["AIME24", "AIME25", "AMC23", "MATH-500", "Minerva", "Olympiad-Bench", "HMMT25", "BRUMO25", "CMIMC25"]
    assert head == ["model", *folders, "average"]
    assert ours[:3] == [f"{MODEL} (this run)", "62.26 ± 7.12", "50.00 ± 3.00"]
    # Average: (62.26 + 8 x 50) / 9 = 51.362; error: sqrt(7.12^2 + 8 x 3^2) / 9 = 11.0746 / 9 = 1.2305.
    assert ours[-1] == "51.36 ± 1.23"
    assert [row[0] for row in papers] == list(table_rows("deepseek"))
    assert papers[-1] == "JustRL-DeepSeek-1.5B 52.60 38.75 91.02 91.65 51.47 67.99 21.98 52.71 25.63 54.87".split()
    assert papers[1][-1] == "44.88"  # the average as printed, though its row gives 44.90
    assert papers[3][3] == papers[3][-1] == "-"  # BroRL gives neither AMC nor an average


def test_the_order_of_the_scores_does_not_matter():
    scores = nine()
    assert results_table(dict(reversed(scores.items())), MODEL, GRADER) == results_table(scores, MODEL, GRADER)


def test_the_other_family_gets_the_other_table():
    text = results_table(nine(), "nvidia/OpenMath-Nemotron-1.5B", GRADER)
    assert [row[0] for row in tables(text)[0][2:]] == list(table_rows("nemotron"))
    assert "Table 5 of arXiv 2512.16649" in text and "Table 3" not in text


def test_a_model_outside_the_paper_has_no_rows_beside_it():
    text = results_table(nine(), "Qwen/Qwen3-1.7B", GRADER)
    assert len(tables(text)[0]) == 2
    assert "This run was graded by the rule grader alone. The paper has no table for this model." in text


def test_both_graders_are_named():
    text = results_table(nine(), MODEL, {"grader": "math-verify"})
    assert "This run was graded by math-verify." in text
    assert "graded by the rule grader, then CompassVerifier-3B on what it rejects" in text
    with pytest.raises(ValueError, match="no 'grader'"):
        results_table(nine(), MODEL, {"temperature": 0.7})


def test_fewer_benchmarks_average_over_themselves_in_every_row():
    text = results_table({"hmmt25": one("hmmt25", avg=0.2), "amc23": one("amc23", avg=0.9)}, MODEL, GRADER)
    head, ours, *papers = tables(text)[0]
    assert head == ["model", "AMC23", "HMMT25", "average of 2"]
    assert ours[-1] == "55.00 ± 2.12"  # sqrt(2 x 3^2) / 2
    assert papers[-1] == ["JustRL-DeepSeek-1.5B", "91.02", "21.98", "56.50"]  # (91.02 + 21.98) / 2
    assert papers[3] == ["BroRL", "-", "-", "-"]
    assert "over the 2 of 9 benchmarks shown" in text
    assert "benchmarks shown" not in results_table(nine(), MODEL, GRADER)


def test_another_n_and_part_of_the_problems_are_said():
    scores = nine() | {
        "aime24": one("aime24", samples=8, pass_at={1: 0.5, 8: 0.7}, maj_at={1: 0.5, 8: 0.6}),
        "math500": one("math500", problems=50),
    }
    text = results_table(scores, MODEL, GRADER)
    assert "(N) differ from the paper's: AIME24 8, not 32." in text
    assert "no published number: MATH-500 50 of 500." in text
    plain = results_table(nine(), MODEL, GRADER)
    assert "differ from" not in plain and "Only part" not in plain


def test_details_by_hand():
    head, first, *_ = tables(results_table(nine(), MODEL, GRADER))[1]
    assert dict(zip(head, first, strict=True)) == {
        "benchmark": "AIME 2024",
        "problems": "30",
        "N": "32",
        "avg@N": "50.00",
        "95 % interval": "44.12 to 55.88",
        "pass@N": "82.00",
        "maj@N": "66.00",
        "mean tokens": "12,346",
        "truncated": "2.1",
        "no box": "3.4",
        "none right": "10.0",
        "all right": "25.0",
    }


def test_pass_and_majority_by_k_end_at_each_n():
    head, *rows = tables(results_table(nine(), MODEL, GRADER))[2]
    assert head[2:] == ["k = 1", "k = 2", "k = 4", "k = 8", "k = 16", "k = 32"]
    assert rows[0] == ["AIME 2024", "pass@k", "51.00", "52.00", "54.00", "58.00", "66.00", "82.00"]
    assert rows[1] == ["", "maj@k", "50.50", "51.00", "52.00", "54.00", "58.00", "66.00"]
    assert rows[6] == ["MATH-500", "pass@k", "51.00", "52.00", "54.00", "", "", ""]
    assert len(rows) == 18


def test_one_problem_and_one_sample():
    single = {"problems": 1, "samples": 1, "stderr": None, "ci_low": None, "ci_high": None}
    text = results_table({"aime24": one("aime24", **single, pass_at={1: 0.5}, maj_at={1: 0.5})}, MODEL, GRADER)
    comparison, details = tables(text)  # pass@1 and maj@1 are avg@1: no third table
    assert comparison[1][1:] == ["50.00", "50.00"]
    assert details[1][4] == "-"


def test_settings_are_listed_as_given():
    text = results_table(nine(), MODEL, GRADER | {"temperature": 0.7, "top_p": 0.9, "max_tokens": 31744})
    assert "- Settings: temperature 0.7, top_p 0.9, max_tokens 31744.\n" in text
    assert "Settings" not in results_table(nine(), MODEL, GRADER)


def test_results_read_as_plain_text_and_as_github_markdown():
    text = results_table(nine(), "a|b\nc", GRADER)
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        lines = table.splitlines()
        assert len({len(line) for line in lines}) == 1  # padded
        bars = [[m.start() for m in re.finditer(r"(?<!\\)\|", line)] for line in lines]
        assert all(bar == bars[0] for bar in bars)  # aligned, and as many cells in every row
        assert re.fullmatch(r"\| :-+ (\| -+: )+\|", lines[1])
    assert "a\\|b c (this run)" in text
    for before, after in zip(lines := text.split("\n"), lines[1:], strict=False):
        assert not (after.startswith("|") and before and not before.startswith("|"))  # GitHub needs the blank line
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_nothing_or_something_unknown_is_refused():
    with pytest.raises(ValueError, match=r"no table from benchmarks \(none\): score one or more of aime24"):
        results_table({}, MODEL, GRADER)
    with pytest.raises(ValueError, match=r"no table from benchmarks \['gsm8k'\]"):
        results_table({"gsm8k": one("aime24")}, MODEL, GRADER)
