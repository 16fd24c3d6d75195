"""Every sample is asked for with its own seed and handed over once, whatever servers do; what cannot fit is said before."""

import threading
import time

import pytest

from justrl_trl.data.benchmarks import Problem
from justrl_trl.data.problems import BOXED_SUFFIX
from justrl_trl.data.tiny import _tokenizer
from justrl_trl.errors import DataError, ServerError
from justrl_trl.evaluation.sampling import (
    Progress,
    Task,
    check_fits,
    eval_sampling,
    prompt_ids,
    requests_of,
    sample_all,
)
from justrl_trl.rollouts.client import RequestRefused, RolloutClient
from justrl_trl.rollouts.pool import AllServersDown, RolloutPool
from justrl_trl.rollouts.seeds import seed_for
from tests.unit.fake_server import FakeServer
from tests.unit.rollouts.test_client import COMPLETIONS, MODELS
from tests.unit.rollouts.test_pool import wait

EOS = 2
SAMPLING = eval_sampling((EOS,), max_new_tokens=4)
TASK = Task("aime24", "AIME 2024", [Problem(i, f"problem {i}", "1") for i in range(3)], 4)
PROMPTS = [[10, 11], [20], [30]]


def respond(body: dict) -> tuple[int, object]:
    """The response to a seed: odd ones end, even ones are cut."""
    ids = [body["prompt"][0], 7, EOS] if body["seed"] % 2 else [body["prompt"][0], 7, 7, 7]
    return 200, {"choices": [{"index": 0, "token_ids": ids}]}


class Server:
    """A rollout server on weights from disk; a test may replace `respond`."""

    def __init__(self):
        self.version, self.respond, self.lock = "default", respond, threading.Lock()
        self.fake = FakeServer(self.answer)

    def answer(self, method, path, body):
        if path == "/v1/models":
            return 200, MODELS
        if path == COMPLETIONS:
            return self.respond(body)
        return 200, {"weight_version": self.version}

    @property
    def asked(self) -> list[dict]:
        return self.fake.bodies(COMPLETIONS)


@pytest.fixture
def make():
    """`make(2)`: a pool of two servers that hold weights from disk."""
    servers, pools = [], []

    def start(count: int = 1, **options):
        own = [Server() for _ in range(count)]
        servers.extend(own)
        options = {"heartbeat_seconds": 0.05, "heartbeat_timeout": 0.5, "wait_seconds": 5.0, "say": lambda line: None} | options
        pools.append(RolloutPool([RolloutClient(s.fake.url, "k3y", request_seconds=5) for s in own], **options))
        pools[-1].current(pools[-1].members, "default")
        return pools[-1], own

    yield start
    for pool in pools:
        pool.close()
    for server in servers:
        server.fake.close()


def collect(pool, requests, sampling=SAMPLING) -> dict:
    got = {}

    def keep(response):
        assert response.request.key not in got
        got[response.request.key] = response

    sample_all(pool, requests, sampling, keep)
    return got


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_the_sampling_is_the_references_with_all_else_off():
    sampling = eval_sampling((2, 5))
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.7, 0.9, 31_744)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.n) == (0, 0.0, 1.0, 1)
    assert sampling.stop_token_ids == (2, 5)


def test_a_prompt_is_the_problem_one_space_and_the_boxed_instruction_in_the_models_template():
    tokenizer = _tokenizer()
    (ids,) = prompt_ids(tokenizer, [Problem(0, "What is 1 + 1?", "2")])
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nWhat is 1 + 1? Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_training_can_ask_with_its_own_suffix():
    tokenizer = _tokenizer()
    (ids,) = prompt_ids(tokenizer, [Problem(0, "What is 1 + 1?", "2")], BOXED_SUFFIX)
    assert "1 + 1?\n\nPlease reason" in tokenizer.decode(ids)


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = _tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template to ask questions with"):
        prompt_ids(tokenizer, TASK.problems)


def test_every_sample_of_every_problem_is_requested_once():
    requests = requests_of(TASK, PROMPTS, seed=0)
    assert [one.key for one in requests] == [("aime24", problem, sample) for problem in range(3) for sample in range(4)]
    assert [one.prompt for one in requests[::4]] == PROMPTS
    assert len({one.prompt_hash for one in requests}) == 3


def test_a_seed_depends_on_the_sample_alone():
    """More samples, fewer problems or other benchmarks beside it: sample 2 of problem 1 keeps its seed."""
    alone = requests_of(Task("aime24", "", TASK.problems[:2], 8), PROMPTS[:2], seed=5)
    seeds = {one.key: one.seed for one in alone}
    for one in requests_of(TASK, PROMPTS, seed=5):
        assert seeds.get(one.key, one.seed) == one.seed == seed_for(5, *one.key)


def test_evaluations_with_neighbouring_seeds_share_no_sample():
    seeds = [one.seed for seed in (1, 2, 3) for one in requests_of(Task("aime24", "", TASK.problems, 32), PROMPTS, seed=seed)]
    assert len(set(seeds)) == len(seeds) == 3 * 3 * 32 and all(0 <= one < 2**31 for one in seeds)


# -- what fits --------------------------------------------------------------------------------------------------------


def test_prompts_that_leave_no_room_are_named_with_what_would_fit():
    requests = requests_of(TASK, [[1] * 10, [1] * 25, [1] * 30], seed=0)
    check_fits(requests, 70, 100, "The server")
    with pytest.raises(
        DataError,
        match=r"The server takes 100 tokens.*--max_new_tokens 80 leaves 20 for a prompt. 2 of 3 prompts have more: "
        r"aime24 problem 1 \(25\), aime24 problem 2 \(30\)\. Use --max_new_tokens 70 or less",
    ):
        check_fits(requests, 80, 100, "The server")


def test_a_prompt_longer_than_the_context_fits_with_no_number_of_new_tokens():
    with pytest.raises(DataError, match="Leave these benchmarks out, or something with a longer context"):
        check_fits(requests_of(TASK, [[1] * 200] * 3, seed=0), 10, 100, "The model")


# -- what comes back --------------------------------------------------------------------------------------------------


def test_every_response_is_handed_over_once_with_its_request(make):
    pool, servers = make(2)
    requests = requests_of(TASK, PROMPTS, seed=0)
    got = collect(pool, requests)
    assert set(got) == {one.key for one in requests}
    for key, response in got.items():
        assert response.ids[0] == PROMPTS[key[1]][0]
    assert sorted(body["seed"] for server in servers for body in server.asked) == sorted(one.seed for one in requests)
    assert all(body["n"] == 1 and body["temperature"] == 0.7 for server in servers for body in server.asked)


def test_truncated_is_what_the_limit_stopped_and_not_what_ended_on_it(make):
    pool, (server,) = make()
    ends = {10: [1, 1, 1, 1], 20: [1, 1, 1, EOS], 30: [1, EOS]}
    server.respond = lambda body: (200, {"choices": [{"index": 0, "token_ids": ends[body["prompt"][0]]}]})
    got = collect(pool, requests_of(TASK, PROMPTS, seed=0))
    assert [got["aime24", problem, 0].truncated for problem in range(3)] == [True, False, False]


def test_a_part_is_asked_for_with_the_seeds_of_the_whole(make):
    pool, (server,) = make()
    part = requests_of(TASK, PROMPTS, seed=0)[5:8]
    collect(pool, part)
    assert sorted(body["seed"] for body in server.asked) == sorted(one.seed for one in part)


def test_a_response_is_handed_over_before_the_others_are_there(make):
    pool, (server,) = make()
    slow = threading.Event()
    requests = requests_of(TASK, PROMPTS, seed=0)
    server.respond = lambda body: respond(body) if body["seed"] == requests[0].seed else (slow.wait(5), respond(body))[1]
    early = []

    def keep(response):
        early.append(response.request.key)
        slow.set()

    sample_all(pool, requests, SAMPLING, keep)
    assert early[0] == requests[0].key and len(early) == 12


def test_a_storage_error_ends_sampling(make):
    pool, _ = make()

    def full(response):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sample_all(pool, requests_of(TASK, PROMPTS, seed=0), SAMPLING, full)


def test_prompts_with_the_longest_earlier_responses_go_first(make):
    pool, (server,) = make(max_num_seqs=1)
    server.respond = lambda body: (time.sleep(0.05), respond(body))[1]
    for prompt, tokens in zip(PROMPTS, (5, 500, 50), strict=True):
        pool.learn_length(prompt, tokens)
    collect(pool, requests_of(TASK, PROMPTS, seed=0))
    assert [body["prompt"] for body in server.asked][-2:] == [PROMPTS[0], PROMPTS[0]]
    assert server.asked[0]["prompt"] == PROMPTS[1]


def test_a_dead_server_costs_no_sample_and_no_seed(make):
    pool, (bad, good) = make(2)
    bad.respond = lambda body: (500, {"error": "EngineCore encountered an issue"})
    requests = requests_of(TASK, PROMPTS, seed=0)
    got = collect(pool, requests)
    assert len(got) == 12 and sorted(body["seed"] for body in good.asked) == sorted(one.seed for one in requests)


def test_a_server_that_was_started_again_is_current_at_once(make):
    """Its weights come from disk; in training it would have to wait for a push."""
    pool, (server,) = make()
    broken = [True]
    server.respond = lambda body: (500, {}) if broken.pop() else respond(body) if broken else (500, {})

    def heal():
        server.respond = respond

    threading.Timer(0.3, heal).start()
    assert len(collect(pool, requests_of(TASK, PROMPTS, seed=0))) == 12
    wait(lambda: len(pool.live()) == 1)


def test_servers_that_get_pushed_weights_meanwhile_end_it(make):
    pool, (server,) = make()

    def pushed(body):
        server.version = "17"
        return 500, {}

    server.respond = pushed
    with pytest.raises(ServerError, match=r"hold other weights than 'default': a trainer pushes to them"):
        collect(pool, requests_of(TASK, PROMPTS, seed=0))


def test_no_server_and_a_refused_request_end_it_in_their_own_words(make):
    pool, (server,) = make(wait_seconds=0.5)
    server.respond = lambda body: (400, {"error": "too long"})
    with pytest.raises(RequestRefused, match="too long"):
        collect(pool, requests_of(TASK, PROMPTS, seed=0))
    server.fake.close()
    with pytest.raises(AllServersDown):
        collect(pool, requests_of(TASK, PROMPTS, seed=0))


def test_in_a_log_file_progress_is_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr("justrl_trl.evaluation.sampling._LOG_SECONDS", 0.0)
    with Progress("sampling", 3, "samples", lambda rate: "2 running") as progress:
        progress.update(1, 100)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("sampling: 1/3 samples, 2 running, left 0:00:0")
    assert out[1].startswith("sampling: 1/3 samples in 0:00:00, ") and out[1].endswith(" tok/s")
