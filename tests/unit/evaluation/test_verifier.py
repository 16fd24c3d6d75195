"""The verifier is asked as the reference asks it, and whatever its server does ends as a verdict or as one clear error."""

import hashlib
import threading
import time

import pytest

from justrl_trl.evaluation import verifier as module
from justrl_trl.evaluation.verifier import VERIFIER_KEY, Case, Judgement, Verifier, VerifierError
from justrl_trl.evaluation.verifier_prompt import COMPASS_VERIFIER_PROMPT
from tests.unit.fake_server import FakeServer

CHAT = "/v1/chat/completions"
CASE = Case("What is 200 + 4?", r"\boxed{204}", r"It is \boxed{204} {curly} %s.")


def says(text):
    return 200, {"choices": [{"message": {"content": text}}]}


def models(*names, length=32768):
    return 200, {"data": [{"id": name, "max_model_len": length} for name in names]}


@pytest.fixture
def serve():
    """`serve(answer)`: a server whose chat answers are `answer(body)`, and a verifier connected to it."""
    servers = []

    def start(answer=lambda body: says("A"), served=("compass",), length=32768, **options):
        def reply(method, path, body):
            return models(*served, length=length) if path == "/v1/models" else answer(body)

        servers.append(FakeServer(reply))
        options = {"retry_seconds": 3.0, "request_seconds": 5.0, "concurrency": 4} | options
        verifier = Verifier(servers[-1].url, **options)
        verifier.check()
        return servers[-1], verifier

    yield start
    for server in servers:
        server.close()


def test_the_prompt_is_the_published_one():
    """Editors strip blanks at line ends; the model was trained with them."""
    digest = hashlib.sha256(COMPASS_VERIFIER_PROMPT.encode()).hexdigest()
    assert digest == "aee9c27520639ca543f0b5077164dc32c1976be0f16c87bee7055f3b7ba45e72"
    assert COMPASS_VERIFIER_PROMPT.startswith("\nPlease as a grading expert") and "correctly. \nHere" in COMPASS_VERIFIER_PROMPT
    assert "with \\boxed{}, please ignore" in COMPASS_VERIFIER_PROMPT.format(question="", gold_answer="", llm_response="")


def test_exact_repeats_the_reference_no_question_raw_gold_whole_response(serve):
    server, verifier = serve()
    verifier.ask(CASE)
    (body,) = server.bodies(CHAT)
    (message,) = body["messages"]
    assert body["temperature"] == 0 and body["max_tokens"] == 2048 and body["model"] == "compass"
    assert message["role"] == "user"
    assert "<Original Question Begin>:\n\n<Original Question End>" in message["content"]
    assert "<Standard Answer Begin>:\n\\boxed{204}\n<Standard Answer End>" in message["content"]
    assert f"<Candidate's Answer Begin>: \n{CASE.response}\n<Candidate's Answer End>" in message["content"]


def test_with_question_fills_the_question_in(serve):
    server, verifier = serve(protocol="with_question")
    verifier.ask(CASE)
    text = server.bodies(CHAT)[0]["messages"][0]["content"]
    assert "<Original Question Begin>:\nWhat is 200 + 4?\n<Original Question End>" in text


@pytest.mark.parametrize(
    ("output", "correct"),
    [("A", True), (" A\n", True), ("B", False), ("C", False), ("A.", False), ("CORRECT", False), ("a", False), ("", False)],
)
def test_only_a_bare_a_is_correct(serve, output, correct):
    _, verifier = serve(lambda body: says(output))
    assert verifier.ask(CASE).correct is correct


def test_an_empty_message_is_no_a(serve):
    _, verifier = serve(lambda body: says(None))
    assert verifier.ask(CASE) == Judgement("", 0)


def test_a_long_response_keeps_its_tail(serve):
    server, verifier = serve(length=4096)
    response = "x" * 10_000 + "the end"
    verdict = verifier.ask(Case("", "1", response))
    text = server.bodies(CHAT)[0]["messages"][0]["content"]
    kept = 2 * (4096 - 2048) - len(COMPASS_VERIFIER_PROMPT) - 1  # two characters per token of room
    assert verdict.clipped == len(response) - kept
    assert text == COMPASS_VERIFIER_PROMPT.format(question="", gold_answer="1", llm_response=response[-kept:])


def test_a_response_that_is_still_too_long_is_halved(serve):
    lengths = []

    def short_sighted(body):
        lengths.append(body["messages"][0]["content"].count("§"))
        return says("A") if lengths[-1] < 10_000 else (400, {"message": "maximum context length"})

    _, verifier = serve(short_sighted)
    verdict = verifier.ask(Case("", "1", "§" * 30_000))
    assert lengths == [30_000, 15_000, 7_500] and verdict == Judgement("A", 22_500)


def test_a_server_that_refuses_whatever_is_sent_is_an_error_with_its_words(serve):
    _, verifier = serve(lambda body: (400, {"message": "no chat template"}))
    with pytest.raises(VerifierError, match=r"refuses a request of [\d,]+ characters: .*no chat template"):
        verifier.ask(CASE)


def test_the_key_comes_from_the_environment_and_is_in_no_message(serve, monkeypatch):
    monkeypatch.setenv(VERIFIER_KEY, "s3cret")
    server, verifier = serve()
    verifier.ask(CASE)
    assert {headers["Authorization"] for *_, headers in server.requests} == {"Bearer s3cret"}
    refusing, verifier = serve(lambda body: (401, {"error": "Unauthorized"}))
    with pytest.raises(VerifierError, match=f"Set {VERIFIER_KEY} to its key") as caught:
        verifier.ask(CASE)
    assert "s3cret" not in str(caught.value) and len(refusing.bodies(CHAT)) == 1  # trying again changes nothing


def test_a_passing_fault_is_tried_again(serve):
    faults = [(500, {}), (503, {}), (429, {})]
    server, verifier = serve(lambda body: faults.pop() if faults else says("A"), retry_seconds=30)
    assert verifier.ask(CASE).correct and len(server.bodies(CHAT)) == 4


def test_a_server_that_stays_away_is_an_error_that_says_what_is_kept(serve):
    server, verifier = serve(retry_seconds=1.0)
    server.close()
    started = time.monotonic()
    with pytest.raises(VerifierError, match=r"does not answer \(ConnectionError\).*Verdicts so far are kept"):
        verifier.ask(CASE)
    assert time.monotonic() - started < 5


def test_a_hanging_server_meets_a_deadline(serve):
    _, verifier = serve(lambda body: time.sleep(3) or says("A"), request_seconds=0.2, retry_seconds=0.5)
    with pytest.raises(VerifierError, match=r"does not answer \(ReadTimeout\)"):
        verifier.ask(CASE)


@pytest.mark.parametrize("nonsense", [b"<html>", {"choices": []}, [], {"choices": [{"message": "A"}]}])
def test_nonsense_is_an_error(serve, nonsense):
    _, verifier = serve(lambda body: (200, nonsense))
    with pytest.raises(VerifierError, match="not OpenAI's format"):
        verifier.ask(CASE)


def test_a_wrong_address_is_found_at_once(monkeypatch):
    monkeypatch.setattr(module, "_CHECK_SECONDS", 0.2)
    with pytest.raises(VerifierError, match=r"http://127.0.0.1:9 does not answer"):
        Verifier("http://127.0.0.1:9").check()
    with pytest.raises(ValueError, match=r"verifier_server='127.0.0.1:9' is not an address. Write it as http://HOST:PORT"):
        Verifier("127.0.0.1:9")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="verifier_protocol='loose' is unknown. Use 'exact' or 'with_question'"):
        Verifier("http://127.0.0.1:9", protocol="loose")


def test_the_only_model_served_is_taken_and_a_choice_must_be_made(serve):
    assert serve()[1].model == "compass"
    with pytest.raises(VerifierError, match=r"serves a, b, and --verifier_model is not set"):
        serve(served=("a", "b"))
    with pytest.raises(VerifierError, match=r"serves a, b, and --verifier_model is c"):
        serve(served=("a", "b"), model="c")
    assert serve(served=("a", "b"), model="b")[1].model == "b"


def test_a_url_with_v1_is_the_same_server(serve):
    server, _ = serve()
    verifier = Verifier(server.url + "/v1/")
    verifier.check()
    assert verifier.ask(CASE).correct


def test_all_cases_are_judged_with_bounded_concurrency_and_lazily(serve):
    lock, flying, most, read = threading.Lock(), 0, 0, 0

    def answer(body):
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.02)
        with lock:
            flying -= 1
        return says("A" if "odd" in body["messages"][0]["content"] else "B")

    _, verifier = serve(answer)
    verdicts, ahead = {}, []

    def cases():
        nonlocal read
        for i in range(40):
            read += 1
            ahead.append(read - len(verdicts))
            yield i, Case("", "1", "odd" if i % 2 else "even")

    verifier.judge(cases(), lambda name, verdict: verdicts.__setitem__(name, verdict.correct))
    assert verdicts == {i: bool(i % 2) for i in range(40)}
    assert most <= 4 and max(ahead) <= 5  # what is read is in flight, but for one


def test_no_case_is_no_request(serve):
    server, verifier = serve()
    verifier.judge([], lambda *_: None)
    assert server.bodies(CHAT) == []


def test_verdicts_that_came_before_a_fault_are_handed_over(serve):
    lock, count = threading.Lock(), [0]

    def dies_after_ten(body):
        with lock:
            count[0] += 1
            return says("A") if count[0] <= 10 else (500, {"error": "gone"})

    _, verifier = serve(dies_after_ten, retry_seconds=0.6)
    told = []
    with pytest.raises(VerifierError, match="500: .*gone"):
        verifier.judge(((i, CASE) for i in range(30)), lambda name, verdict: told.append(name))
    assert 1 <= len(told) <= 10
