"""What was added is there after any interruption, once; what is not whole is not there."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from justrl_trl.evaluation.store import SampleStore, StoreError

SETTINGS = {"model": "tiny", "temperature": 0.7, "stop_token_ids": [2]}


@dataclass
class Asked:
    key: tuple
    prompt_hash: str = "h"


def store_of(folder, count: int, **settings) -> SampleStore:
    with SampleStore(folder, {**SETTINGS, **settings}) as store:
        for sample in range(count):
            store.add(("aime24", 0, sample), "h", 5, completion=f"text {sample}")
    return store


def test_samples_are_read_back_in_order(tmp_path):
    store_of(tmp_path, 3)
    rows = list(SampleStore(tmp_path, SETTINGS).rows())
    assert [key for key, _ in rows] == [("aime24", 0, i) for i in range(3)]
    assert rows[1][1]["completion"] == "text 1" and rows[1][1]["tokens"] == 5


def test_only_what_is_missing_is_asked_for(tmp_path):
    store_of(tmp_path, 2)
    asked = [Asked(("aime24", problem, sample)) for problem in range(2) for sample in range(3)]
    missing = SampleStore(tmp_path, SETTINGS).missing(asked)
    assert [one.key[1:] for one in missing] == [(0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_sample_is_kept_once(tmp_path):
    with SampleStore(tmp_path, SETTINGS) as store:
        store.add(("aime24", 0, 0), "h", 5, completion="first")
        store.add(("aime24", 0, 0), "h", 5, completion="second")
    assert [row["completion"] for _, row in SampleStore(tmp_path, SETTINGS).rows()] == ["first"]


@pytest.mark.parametrize("torn", [b'{"benchmark": "aime24", "prob', b"\x00\x00\x00\x00\n", b"[1, 2]\n", b"\n"])
def test_a_torn_last_line_is_no_sample_and_is_cut_off(tmp_path, torn):
    store_of(tmp_path, 2)
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(SampleStore(tmp_path, SETTINGS).stored) == 2
    assert path.read_bytes() == whole + torn  # reading changes nothing
    with SampleStore(tmp_path, SETTINGS) as store:
        assert store.cut == len(torn)
        store.add(("aime24", 0, 2), "h", 5, completion="again")
    assert len(path.read_bytes().splitlines()) == 3 and len(SampleStore(tmp_path, SETTINGS).stored) == 3


@pytest.mark.parametrize("kept", range(0, 160, 7))
def test_wherever_a_file_is_cut_the_whole_lines_before_are_the_samples(tmp_path, kept):
    store_of(tmp_path, 3)
    path = tmp_path / "samples.jsonl"
    data = path.read_bytes()[:kept]
    path.write_bytes(data)
    with SampleStore(tmp_path, SETTINGS) as store:
        assert len(store.stored) == data.count(b"\n")
    assert path.read_bytes() == data[: data.rfind(b"\n") + 1]


def test_damage_in_the_middle_is_named_and_not_passed_over(tmp_path):
    store_of(tmp_path, 3)
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(StoreError, match=r"samples.jsonl, line 2: not a JSON object.*Remove that line"):
        SampleStore(tmp_path, SETTINGS)


def test_samples_of_other_settings_are_refused_by_name(tmp_path):
    store_of(tmp_path, 1)
    with pytest.raises(StoreError, match=r"temperature is 0.7 there and 1.0 here.*Give another --output_dir"):
        SampleStore(tmp_path, {**SETTINGS, "temperature": 1.0})
    with pytest.raises(StoreError, match=r"top_p is None there and 0.9 here"):
        SampleStore(tmp_path, {**SETTINGS, "top_p": 0.9})


def test_a_folder_without_samples_takes_other_settings(tmp_path):
    store_of(tmp_path, 0)
    store_of(tmp_path, 1, temperature=1.0)
    assert json.loads((tmp_path / "settings.json").read_text())["temperature"] == 1.0


def test_equal_settings_are_equal_whatever_json_makes_of_them(tmp_path):
    store_of(tmp_path, 1, stop_token_ids=(2, 5))
    assert SampleStore(tmp_path, {**SETTINGS, "stop_token_ids": (2, 5)}).stored


def test_answers_to_another_text_are_refused(tmp_path):
    store_of(tmp_path, 2)
    with pytest.raises(StoreError, match=r"another text of aime24 problem 0 \(2 such samples\).*chat template"):
        SampleStore(tmp_path, SETTINGS).missing([Asked(("aime24", 0, i), "other") for i in range(2)])


def test_samples_without_settings_are_refused(tmp_path):
    store_of(tmp_path, 1)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StoreError, match="has samples but no settings.json"):
        SampleStore(tmp_path, SETTINGS)


@pytest.mark.parametrize("row", [{"a": 1}, {"benchmark": "a", "problem": 0, "sample": 0}])
def test_a_file_of_something_else_is_refused(tmp_path, row):
    store_of(tmp_path, 0)
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(StoreError, match="it is not the file of an evaluation"):
        SampleStore(tmp_path, SETTINGS)


def test_any_text_survives(tmp_path):
    texts = ["a\nb\r\nc", "\x00\x1f", "\ud800 alone", "\u2028\u2029", "é 数 🦊", "\\boxed{1}" * 1000]
    with SampleStore(tmp_path, SETTINGS) as store:
        for i, text in enumerate(texts):
            store.add(("aime24", 0, i), "h", 1, completion=text)
    assert [row["completion"] for _, row in SampleStore(tmp_path, SETTINGS).rows()] == texts


WRITER = """
import sys
from pathlib import Path
from justrl_trl.evaluation.store import SampleStore
with SampleStore(Path(sys.argv[1]), {"model": "tiny", "temperature": 0.7, "stop_token_ids": [2]}) as store:
    for i in range(len(store.stored), 10**6):
        store.add(("aime24", 0, i), "h", 5, completion="x" * 20_000)
        print(i, flush=True)
"""


def test_added_samples_survive_kill_9(tmp_path):
    told = -1
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(20):
            told = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        rest, _ = writer.communicate()
        told = int(rest.split("\n")[-2]) if rest.count("\n") else told
        stored = SampleStore(tmp_path, SETTINGS).stored
        assert set(stored) >= {("aime24", 0, i) for i in range(told + 1)}
        assert len(stored) <= told + 2  # the one that was being written
    keys = [key for key, _ in SampleStore(tmp_path, SETTINGS).rows()]
    assert keys == [("aime24", 0, i) for i in range(len(keys))]


def test_two_writers_do_not_meet(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        writer.stdout.readline()
        with pytest.raises(StoreError, match="Another process is writing samples"):
            with SampleStore(tmp_path, SETTINGS):
                pass
    finally:
        writer.kill()
        writer.communicate()
    with SampleStore(tmp_path, SETTINGS) as store:  # the lock went with its holder
        assert store.stored


def test_samples_that_came_while_one_waited_to_write_are_seen(tmp_path):
    late = SampleStore(tmp_path, SETTINGS)
    store_of(tmp_path, 2)
    with late as store:
        assert len(store.stored) == 2


def test_reading_takes_time_in_proportion(tmp_path):
    """20k samples take little more than ten times as long as 2k."""
    seconds = []
    for count in (2_000, 20_000):
        folder = tmp_path / str(count)
        store_of(folder, 0)
        lines = (
            json.dumps(
                {
                    "benchmark": "b",
                    "problem": i // 32,
                    "sample": i % 32,
                    "prompt_hash": "h",
                    "tokens": 9,
                    "completion": "x" * 2000,
                }
            )
            for i in range(count)
        )
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
        started = time.monotonic()
        store = SampleStore(folder, SETTINGS)
        assert sum(1 for _ in store.rows()) == count == len(store.stored)
        seconds.append(time.monotonic() - started)
    assert seconds[1] < 30 * max(seconds[0], 0.02)
