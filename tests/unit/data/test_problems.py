"""Every layout gives the same three columns, and every bad row is named with its number before training starts.

Files are written by hand in a temporary folder; the recipe's real benchmark and GSM8K files run when they lie beside
the checkout. The tokenizer is built here, so nothing needs the network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from justrl_trl.data import problems as data
from justrl_trl.data.problems import (
    BOXED_SUFFIX,
    DAPO_POSTFIX,
    DAPO_PREFIX,
    EVAL_BOXED_SUFFIX,
    DataError,
    DataReport,
    format_prompt,
    load_problems,
    prepare_problems,
    split_heldout,
    strip_dapo_wrapper,
    to_training_dataset,
)

REAL_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def dapo_row(problem: str, answer: object) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_PREFIX + problem + DAPO_POSTFIX, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "0"},
    }


LAYOUTS = {
    "DAPO raw": [dapo_row("What is 2+3?", "5"), dapo_row(" What is 3+4? ", " 7 ")],
    "DAPO processed": [
        {"prompt": "What is 2+3?", "solution": "5", "reward_model": {"ground_truth": "5"}},
        {
            "prompt": DAPO_PREFIX + "What is 3+4?" + DAPO_POSTFIX,
            "solution": "7",
            "reward_model": {"ground_truth": "7"},
        },
    ],
    "benchmark A": [
        {"prompt": [{"content": "What is 2+3?", "role": "user"}], "reward_model": {"ground_truth": "\\boxed{5}"}},
        {"prompt": [{"content": "What is 3+4?", "role": "user"}], "reward_model": {"ground_truth": "7"}},
    ],
    "benchmark B": [
        {"problem_idx": 1, "problem": "What is 2+3?\n", "answer": "5", "problem_type": ["Algebra"]},
        {"problem_idx": 2, "problem": "What is 3+4?", "answer": "7", "problem_type": ["Algebra"]},
    ],
    "GSM8K": [
        {"question": "What is 2+3?", "answer": "It is <<2+3=5>>5.\n#### 5"},
        {"question": "What is 3+4?", "answer": "Count.\n#### 7 "},
    ],
    "question/answer": [{"question": "What is 2+3?", "answer": "5"}, {"question": "What is 3+4?", "answer": "7"}],
    "problem/solution": [{"problem": "What is 2+3?", "solution": "5"}, {"problem": "What is 3+4?", "solution": "7"}],
    "prompt/answer": [{"prompt": "What is 2+3?", "answer": "5"}, {"prompt": "What is 3+4?", "answer": "7"}],
    "worked solution beside the answer": [
        {"problem": "What is 2+3?", "solution": "We add.", "answer": "5"},
        {"problem": "What is 3+4?", "solution": "We add.", "answer": "7"},
    ],
}


@pytest.mark.parametrize("file_type", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_same_three_columns(tmp_path, rows, file_type):
    path = tmp_path / f"train.{file_type}"
    if file_type == "parquet":
        write_parquet(path, rows)
    elif file_type == "jsonl":
        write_jsonl(path, rows)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    for name in (str(path), str(tmp_path)):  # the file itself, and its folder
        assert load_problems(name).to_dict() == {
            "problem": ["What is 2+3?", "What is 3+4?"],
            "solution": ["5", "7"],
            "row": [0, 1],
        }


def test_gsm8k_answer_loses_commas_and_keeps_its_sign(tmp_path):
    rows = [{"question": "q", "answer": "Sum.\n#### -1,234,567"}]
    assert load_problems(write_jsonl(tmp_path / "g.jsonl", rows))["solution"][:] == ["-1234567"]


@pytest.mark.parametrize(
    ("gold", "bare"),
    [
        ("\\boxed{204}", "204"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1}+\\boxed{2}", "\\boxed{1}+\\boxed{2}"),  # not one whole box: left alone
        ("x=\\boxed{1}", "x=\\boxed{1}"),
    ],
)
def test_gold_that_is_one_whole_box_is_unwrapped(tmp_path, gold, bare):
    name = write_jsonl(tmp_path / "a.jsonl", [{"problem": "p", "answer": gold}])
    assert load_problems(name)["solution"][:] == [bare]


def test_wrapper_texts_are_the_published_ones():
    assert DAPO_PREFIX.endswith("Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n")
    assert DAPO_POSTFIX == '\n\nRemember to put your answer on its own line after "Answer:".'
    assert strip_dapo_wrapper(f"\n{DAPO_PREFIX}  p  {DAPO_POSTFIX} ") == "p"
    assert strip_dapo_wrapper(DAPO_PREFIX + "p") == strip_dapo_wrapper("p" + DAPO_POSTFIX) == "p"


def test_training_joins_the_instruction_with_a_blank_line_and_evaluation_with_a_space():
    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    assert format_prompt("p") == [{"role": "user", "content": "p\n\n" + instruction}]
    assert format_prompt("p", EVAL_BOXED_SUFFIX) == [{"role": "user", "content": "p " + instruction}]


# Each case: the rows, and what the message must hold. Rows count from 0.
BAD_ROWS = {
    "empty prompt": ([{"problem": " \n", "answer": "1"}], r"empty prompt in 1 row \(1\)"),
    "null prompt": ([{"problem": None, "answer": "1"}], r"empty prompt in 1 row \(1\)"),
    "only the wrapper": ([{"problem": DAPO_PREFIX + DAPO_POSTFIX, "answer": "1"}], r"empty prompt in 1 row \(1\)"),
    "prompt is a number": ([{"problem": 7, "answer": "1"}], r"prompt is int and not text in 1 row \(1\)"),
    "no messages": ([{"problem": [], "answer": "1"}], r"empty prompt in 1 row \(1\)"),
    "null answer": ([{"problem": "p", "answer": None}], r"no answer in 1 row \(1\)"),
    "absent answer": ([{"problem": "p"}], r"no answer in 1 row \(1\)"),
    "blank answer": ([{"problem": "p", "answer": "  "}], r"no answer in 1 row \(1\)"),
    "empty box": ([{"problem": "p", "answer": "\\boxed{ }"}], r"no answer in 1 row \(1\)"),
    "integer": ([{"problem": "p", "answer": 5}], r"answer is int and not text in 1 row \(1\)"),
    "float": ([{"problem": "p", "answer": 0.5}], r"answer is float and not text in 1 row \(1\)"),
    "bool": ([{"problem": "p", "answer": True}], r"answer is bool and not text in 1 row \(1\)"),
    "two kinds": (
        [{"problem": "p", "answer": 5}, {"problem": "", "answer": "5"}],
        r"answer is int and not text in 1 row \(1\); empty prompt in 1 row \(2\); of 3 rows",
    ),
    "many": (
        [{"problem": "p", "answer": None}] * 12,
        r"no answer in 12 rows \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\)",
    ),
}


@pytest.mark.parametrize(("rows", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_named_with_their_file_and_number(tmp_path, rows, reason):
    name = write_jsonl(tmp_path / "mine.jsonl", [{"problem": "fine", "answer": "1"}, *rows])
    with pytest.raises(DataError, match=r"mine\.jsonl.*" + reason + r".*fix or remove these rows.*'5', not 5"):
        load_problems(name)


def test_rows_are_counted_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_BATCH_ROWS", 2)
    rows = [dapo_row("p", "1")] * 5 + [dapo_row("", "1")] + [dapo_row("p", None)] * 2
    with pytest.raises(DataError, match=r"empty prompt in 1 row \(5\); no answer in 2 rows \(6, 7\); of 8 rows"):
        load_problems(write_parquet(tmp_path / "train.parquet", rows))
    assert load_problems(write_parquet(tmp_path / "train.parquet", rows[:5]))["row"][:] == [0, 1, 2, 3, 4]


def test_integer_answers_in_a_parquet_file_are_refused_too(tmp_path):
    name = write_parquet(tmp_path / "ints.parquet", [{"problem": "p", "answer": 5}, {"problem": "q", "answer": 6}])
    with pytest.raises(DataError, match=r"answer is int and not text in 2 rows \(0, 1\)"):
        load_problems(name)


def test_gsm8k_row_without_its_mark_is_named(tmp_path):
    rows = [{"question": "q", "answer": "one\n#### 1"}, {"question": "q", "answer": "2"}]
    with pytest.raises(DataError, match=r"no '####' before the final answer in 1 row \(1\)"):
        load_problems(write_jsonl(tmp_path / "g.jsonl", rows))
    with pytest.raises(DataError, match=r"no '####'.*in 1 row \(0\)"):  # a worked solution is never taken as the answer
        load_problems(write_jsonl(tmp_path / "g.jsonl", [{"question": "q", "answer": "We add.\nIt is 5."}]))


def test_unusable_files_are_errors_that_say_what_to_do(tmp_path):
    missing = write_jsonl(tmp_path / "columns.jsonl", [{"text": "p", "label": "1"}])
    with pytest.raises(DataError, match=r"columns\.jsonl.*has columns label, text.*problem/answer, question/answer"):
        load_problems(missing)
    with pytest.raises(DataError, match=r"absent\.jsonl' does not exist.*Hub dataset"):
        load_problems(str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl.*\(none\)"):
        load_problems(str(tmp_path / "empty.jsonl"))
    pq.write_table(
        pa.table({"problem": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), tmp_path / "e.parquet"
    )
    with pytest.raises(DataError, match="has no rows"):
        load_problems(str(tmp_path / "e.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(DataError, match=r"broken\.parquet.*cannot be read"):
        load_problems(str(tmp_path / "broken.parquet"))
    (tmp_path / "notes.txt").write_text("p")
    with pytest.raises(DataError, match=r"unknown file type: convert"):
        load_problems(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match=r"revision='main' have no meaning: remove"):
        load_problems(missing, revision="main")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"problem": "p", "answer": "1"}\n{"problem": ', r"line 2: not valid JSON"),
        (b'{"problem": "p", "answer": "1"}\n["p", "1"]\n', r"row 1: list instead of an object"),
        (b'{"problem": "\\ud800", "answer": "1"}\n', r"line 1: not valid JSON.*surrogates"),
        (b'{"problem": "\xff", "answer": "1"}\n', r"cannot be read: 'utf-8'"),
        (b'[{"problem": "p"', r"x\.json': not valid JSON"),
    ],
)
def test_broken_json_is_an_error_that_names_the_line(tmp_path, content, reason):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_problems(str(tmp_path / "x.json"))


def test_folder_gives_only_the_split_that_was_asked_for(tmp_path):
    write_parquet(tmp_path / "test.parquet", [{"problem": "held out", "answer": "1"}])
    with pytest.raises(DataError, match=r"no 'train' split.*found test\.parquet"):
        load_problems(str(tmp_path))
    for part in (0, 1):  # the layout of a downloaded Hub repository
        write_parquet(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", [{"problem": f"p{part}", "answer": "1"}])
    assert load_problems(str(tmp_path))["problem"][:] == ["p0", "p1"]
    assert load_problems(str(tmp_path), split="test")["problem"][:] == ["held out"]
    with pytest.raises(DataError, match=r"no 'dev' split"):
        load_problems(str(tmp_path), split="dev")


class FakeHub:
    """Stands for `datasets.load_dataset`: records the call, then answers or raises what the library raises."""

    def __init__(self, answer: object) -> None:
        self.answer, self.calls = answer, []

    def __call__(self, *args: object, **kwargs: object) -> datasets.Dataset:
        self.calls.append((args, kwargs))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_hub_dataset_is_read_with_its_config_split_and_revision(monkeypatch):
    hub = FakeHub(datasets.Dataset.from_list(LAYOUTS["DAPO raw"]))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_problems("org/set", "all", "train", "abc123")["problem"][:] == ["What is 2+3?", "What is 3+4?"]
    assert hub.calls == [(("org/set", "all"), {"split": "train", "revision": "abc123"})]


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'org/set' doesn't exist on the Hub or cannot be accessed."),
        ConnectionError("Couldn't reach 'org/set' on the Hub (OfflineModeIsEnabled)"),
        ValueError("BuilderConfig 'fr' not found. Available: ['all', 'cn', 'en']"),
        ValueError("Unknown split \"train\". Should be one of ['test']."),
    ],
    ids=["not found", "unreachable", "unknown config", "unknown split"],
)
def test_hub_failure_is_one_paragraph_with_what_was_tried_and_the_remedy(monkeypatch, error):
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(error))
    with pytest.raises(DataError) as raised:
        load_problems("org/set", config="fr")
    message = str(raised.value)
    assert "\n" not in message and "'org/set' (config 'fr', split 'train')" in message
    assert str(error) in message and "Check the name, config and split" in message
    assert raised.value.__cause__ is error


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(KeyError("bug")))
    with pytest.raises(KeyError):
        load_problems("org/set")


def test_offline_process_gets_the_same_error_and_imports_no_heavy_library():
    program = (
        "import sys; from justrl_trl.data import problems as data; from justrl_trl.grading import strict\n"
        "print(sorted({'torch', 'trl', 'vllm', 'deepspeed'} & set(sys.modules)))\n"
        "try: data.load_problems('nobody/nothing')\n"
        "except data.DataError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(data.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    heavy, message = done.stdout.strip().split("\n")
    assert heavy == "[]"
    assert "'nobody/nothing'" in message and "ConnectionError" in message


def problems(*rows: tuple[str, str]) -> datasets.Dataset:
    texts, answers = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"problem": texts, "solution": answers, "row": list(range(len(rows)))})


def test_repeats_are_dropped_and_disagreements_are_reported_with_both_rows():
    repeated = problems(("a", "1"), ("b", "2"), ("a", "1"), ("b", "3"), (" b ", "4"), ("c", "5"), ("b", "2"))
    kept, report = prepare_problems(repeated)
    assert kept.to_dict() == {"problem": ["a", "b", "c"], "solution": ["1", "2", "5"], "row": [0, 1, 5]}
    assert report == DataReport(rows=7, kept=3, duplicates=4, conflicts=((1, 3),))
    assert report.lines() == [
        "3 problems kept of 7 rows (4 duplicates, 1 with conflicting answers)",
        "conflicting answers: the first occurrence was kept, row 1 over 3",
    ]


def test_preparing_twice_changes_nothing():
    once, _ = prepare_problems(problems(("a", "1"), ("a", "1"), ("b", "2")))
    twice, report = prepare_problems(once)
    assert twice.to_dict() == once.to_dict()
    assert report == DataReport(rows=2, kept=2)


def test_repeats_are_found_in_a_shuffled_dataset_and_name_source_rows():
    _, report = prepare_problems(problems(("a", "1"), ("b", "2"), ("a", "3")).select([2, 1, 0]))
    assert report.conflicts == ((2, 0),)


def test_report_prints_the_plan():
    conflicts = tuple((row, row + 100) for row in range(12))
    report = DataReport(1_791_700, 17_386, 1_774_302, conflicts, overlong=12, max_prompt_length=1024)
    plan, detail = report.lines()
    assert plan == (
        "17,386 problems kept of 1,791,700 rows (1,774,302 duplicates, 12 with conflicting answers, 12 over 1,024 tokens)"
    )
    assert detail.endswith("8 over 108, 9 over 109 and 2 more")


def test_a_dataset_without_the_columns_is_refused():
    other = datasets.Dataset.from_dict({"text": ["p"]})
    for use in (prepare_problems, lambda d: split_heldout(d, 0, 0)):
        with pytest.raises(DataError, match=r"no column problem.*it has text.*load_problems"):
            use(other)


def test_heldout_is_disjoint_deterministic_and_complete():
    dataset = problems(*((f"p{i}", str(i)) for i in range(20)))
    train, heldout = split_heldout(dataset, 5, seed=1)
    assert (len(train), len(heldout)) == (15, 5)
    assert sorted(train["row"][:] + heldout["row"][:]) == list(range(20))
    assert heldout["row"][:] == sorted(heldout["row"][:])
    again = split_heldout(dataset, 5, seed=1)
    assert again[1]["row"][:] == heldout["row"][:] and again[0]["row"][:] == train["row"][:]
    assert split_heldout(dataset, 5, seed=2)[1]["row"][:] != heldout["row"][:]


def test_no_copy_of_a_heldout_problem_stays_in_training():
    dataset = problems(*((f"p{i % 4}", str(i % 4)) for i in range(40)))
    train, heldout = split_heldout(dataset, 2, seed=0)
    assert len(heldout) == 2 and len(train) == 20
    assert not set(train["problem"][:]) & set(heldout["problem"][:])


@pytest.mark.parametrize("size", [-1, 2, 3])
def test_heldout_that_leaves_nothing_to_train_on_is_refused(size):
    with pytest.raises(DataError, match=rf"cannot hold out {size} of 2 distinct problems.*Lower"):
        split_heldout(problems(("a", "1"), ("b", "2"), ("b", "2")), size, seed=0)
    assert len(split_heldout(problems(("a", "1"), ("b", "2")), 0, seed=0)[0]) == 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a template that adds two tokens before and one after: lengths can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<s>", "<user>", "<assistant>"])}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens(["<s>", "<user>", "<assistant>"])
    template = (
        "{% if shout is defined and shout %}!{% endif %}<s>{% for message in messages %}<user>{{ message.content }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>", chat_template=template)


def templated_tokens(problem: str) -> int:
    return len((problem + BOXED_SUFFIX).encode()) + 3  # <s>, <user> and <assistant>


def test_prompts_at_the_limit_stay_and_one_token_more_is_dropped(tokenizer):
    dataset = problems(("ab", "1"), ("abc", "2"), ("abcd", "3"), ("abcd", "3"))
    limit = templated_tokens("abc")
    training, report = to_training_dataset(dataset, tokenizer, limit, report=DataReport(rows=9, kept=4, duplicates=5))
    assert training.to_dict() == {
        "prompt": [format_prompt("ab"), format_prompt("abc")],
        "solution": ["1", "2"],
        "row": [0, 1],
    }
    assert report == DataReport(rows=9, kept=2, duplicates=5, overlong=2, max_prompt_length=limit)
    assert report.lines()[0].endswith(f"2 over {limit} tokens)")


def test_report_starts_from_the_dataset_when_none_is_given(tokenizer):
    _, report = to_training_dataset(problems(("ab", "1")), tokenizer, 1024)
    assert report == DataReport(rows=1, kept=1, overlong=0, max_prompt_length=1024)


def test_template_options_reach_the_template(tokenizer):
    dataset, limit = problems(("ab", "1"), ("a", "1")), templated_tokens("ab")
    shouting, _ = to_training_dataset(dataset, tokenizer, limit, chat_template_kwargs={"shout": True})
    assert shouting["row"][:] == [1]  # "!" makes the first prompt one token too long


class ListTokenizer:
    """Returns token ids as a list, as transformers 4 does; counts how often it is asked."""

    chat_template = "any"

    def __init__(self) -> None:
        self.asked = 0

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool, tokenize: bool) -> list[int]:
        assert add_generation_prompt and tokenize
        self.asked += 1
        return list(messages[0]["content"].encode())


def test_plain_lists_of_tokens_are_counted_too_and_repeats_are_measured_once():
    fake = ListTokenizer()
    limit = len(format_prompt("abc")[0]["content"])
    training, _ = to_training_dataset(problems(("abc", "1"), ("abcd", "2"), ("abc", "1")), fake, limit)
    assert training["row"][:] == [0, 2] and fake.asked == 2


def test_a_limit_that_drops_every_prompt_says_how_long_they_are(tokenizer):
    with pytest.raises(DataError) as raised:
        to_training_dataset(problems(("a", "1"), ("abc", "2")), tokenizer, 10)
    for part in ("all 2 prompts", "max_prompt_length=10", f"shortest {templated_tokens('a')}", "Raise the limit"):
        assert part in str(raised.value)
    assert f"longest {templated_tokens('abc')}" in str(raised.value)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no chat template.*instruction-tuned"):
        to_training_dataset(problems(("a", "1")), bare, 1024)


def test_surviving_rows_do_not_depend_on_the_batch_size(tokenizer, monkeypatch):
    dataset = problems(*(("p" * (i % 7 + 1), str(i % 7)) for i in range(50)))
    limit = templated_tokens("ppppp")

    def run() -> tuple:
        kept, report = prepare_problems(dataset)
        training, report = to_training_dataset(kept, tokenizer, limit, report=report)
        return training.to_dict(), report

    whole = run()
    monkeypatch.setattr(data, "_BATCH_ROWS", 3)
    assert run() == whole


BENCHMARKS = {
    "AIME24": 30,
    "AIME25": 30,
    "AMC23": 40,
    "MATH-500": 500,
    "Minerva": 272,
    "Olympiad-Bench": 674,
    "BRUMO25": 30,
    "CMIMC25": 40,
    "HMMT25": 30,
}


def real(folder: str) -> str:
    if not (REAL_DATA / folder).is_dir():
        pytest.skip(f"{folder} does not lie beside this checkout")
    return str(REAL_DATA / folder)


@pytest.mark.parametrize(("name", "rows"), BENCHMARKS.items(), ids=BENCHMARKS.keys())
def test_real_benchmark_files_load_whole(name, rows):
    loaded = load_problems(real(f"benchmarks/{name}"), split="test")
    assert len(loaded) == rows == len(prepare_problems(loaded)[0])
    assert not any("\\boxed" in answer for answer in loaded["solution"])
    if name == "AIME24":
        assert loaded["solution"][0] == "204"


@pytest.mark.parametrize(("split", "rows", "first"), [("train", 7473, "72"), ("test", 1319, "18")])
def test_real_gsm8k_answers_are_integers(split, rows, first, tokenizer):
    loaded = load_problems(real("gsm8k"), split=split)
    assert len(loaded) == rows and loaded["solution"][0] == first
    assert all(answer.lstrip("-").isdigit() for answer in loaded["solution"])
    training, report = to_training_dataset(loaded.select(range(200)), tokenizer, 512)
    assert len(training) + report.overlong == 200 and report.overlong > 0
