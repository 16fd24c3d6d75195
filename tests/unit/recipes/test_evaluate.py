"""The evaluation line: arguments, plan and every mistake in one paragraph, before anything is started."""

import json
import runpy
import shutil
import threading
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from transformers import Qwen2Config

from justrl_trl.data.benchmarks import BENCHMARKS
from justrl_trl.data.tiny import _tokenizer
from justrl_trl.errors import DataError, ServerError
from justrl_trl.evaluation import tasks as evaluation_tasks
from justrl_trl.evaluation.arguments import EvaluateArguments, folder_of, parse_evaluation, settings_of
from justrl_trl.evaluation.model import EvaluatedModel, find_model, fingerprint
from justrl_trl.evaluation.sampling import Task, requests_of
from justrl_trl.evaluation.servers import check_server, connect
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.seeds import seed_for
from tests.unit.fake_server import FakeServer

np = pytest.importorskip("numpy")
ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "evaluate.py"
EOS = 2


def tasks_of(args: EvaluateArguments):
    return evaluation_tasks.find_tasks(args.benchmarks, data_dir=args.data_dir, samples=args.samples, limit=args.limit)


@pytest.fixture
def arguments(monkeypatch):
    """`arguments("--seed", 1)`: what the command line makes of these options."""

    def run(*options) -> EvaluateArguments:
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", "m", *map(str, options)])
        return parse_evaluation()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder that looks like a model of 200 tokens of context; nobody runs it."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = _tokenizer()
    Qwen2Config(max_position_embeddings=200, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({"weight": np.arange(1000, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def problems(tmp_path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(5)))
    return path


# -- arguments --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_protocol(arguments):
    args = arguments()
    assert (args.temperature, args.top_p, args.max_new_tokens, args.benchmarks, args.samples) == (
        0.7,
        0.9,
        31_744,
        "paper",
        None,
    )
    assert (args.grader, args.verifier_protocol) == ("rule", "exact")


def test_a_yaml_file_gives_options_and_the_command_line_wins(arguments, tmp_path):
    path = tmp_path / "eval.yaml"
    path.write_text("benchmarks: aime24\nsamples: 8\nseed: 5\n")
    for spelling in (["--config", path], [f"--config={path}"]):
        args = arguments(*spelling, "--seed", 7)
        assert (args.benchmarks, args.samples, args.seed) == ("aime24", 8, 7)
    path.write_text("benchmarcks: aime24\n")
    with pytest.raises(ValueError, match="benchmarcks"):
        arguments("--config", path)
    with pytest.raises(ValueError, match="there is no such file"):
        arguments("--config", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", 0], "samples must be an integer of at least 1, got 0"),
        (["--limit", -1], "limit must be an integer of at least 1, got -1"),
        (["--top_p", 0], "top_p must be a number above 0 and at most 1, got 0.0"),
        (["--temperature", -1], "temperature must be a number of at least 0.0, got -1.0"),
        (["--managed_servers", 2, "--rollout_servers", "http://a:1"], "start servers or use running ones, not both"),
        (["--rollout_servers", "a:1"], "rollout_servers: 'a:1' is not an address. Write it as http://HOST:PORT"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(*options)


def test_every_option_says_what_it_is():
    for name, field in EvaluateArguments.__dataclass_fields__.items():
        assert field.metadata.get("help", "").endswith("."), name


# -- problems ---------------------------------------------------------------------------------------------------------


def test_samples_are_the_papers_unless_given(arguments, monkeypatch):
    monkeypatch.setattr(evaluation_tasks, "load", lambda benchmark, data_dir: ["problem"] * benchmark.problems)
    tasks = {task.name: task for task in tasks_of(arguments())}
    assert set(tasks) == set(BENCHMARKS)
    few = {"math500", "minerva", "olympiad"}
    assert {name: task.samples for name, task in tasks.items()} == {name: 4 if name in few else 32 for name in BENCHMARKS}
    # 30 x 32 in four sets, 40 x 32 in two; 500, 272 and 674 x 4
    assert sum(len(task.problems) * task.samples for task in tasks.values()) == 6 * 960 + 640 + 4 * (500 + 272 + 674)
    assert {task.samples for task in tasks_of(arguments("--samples", 2))} == {2}
    assert [len(task.problems) for task in tasks_of(arguments("--limit", 3))] == [3] * 9


def test_competitions_go_first_since_their_responses_are_the_longest(arguments, monkeypatch):
    monkeypatch.setattr(evaluation_tasks, "load", lambda benchmark, data_dir: [])
    names = [task.name for task in tasks_of(arguments("--benchmarks", "math500,aime24"))]
    assert names == ["aime24", "math500"]


def test_a_file_is_a_benchmark_named_by_its_stem(arguments, problems):
    (task,) = tasks_of(arguments("--benchmarks", problems))
    assert (task.name, task.samples, len(task.problems)) == ("sums", 4, 5)
    assert (task.problems[3].problem, task.problems[3].answer) == ("3 + 1?", "4")


def test_the_embedded_problems_are_those_that_training_never_sees(arguments):
    (task,) = tasks_of(arguments("--benchmarks", "embedded:arithmetic", "--limit", 7))
    assert (task.name, len(task.problems)) == ("arithmetic", 7)


def test_mistakes_in_names_are_named(arguments, problems):
    with pytest.raises(DataError, match="unknown benchmark 'aime23': choose from aime24, aime25"):
        tasks_of(arguments("--benchmarks", f"aime23,{problems}"))
    with pytest.raises(DataError, match="two of these benchmarks are called sums"):
        tasks_of(arguments("--benchmarks", f"{problems},{problems}"))
    with pytest.raises(DataError, match="no benchmark named"):
        tasks_of(arguments("--benchmarks", ","))
    with pytest.raises(DataError, match="none.jsonl' does not exist"):
        tasks_of(arguments("--benchmarks", "none.jsonl"))
    problems.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(DataError, match="has columns label, text: no problem and answer there"):
        tasks_of(arguments("--benchmarks", problems))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_same_command_comes_back_to_its_folder_and_other_settings_do_not(arguments):
    def folder(*options) -> Path:
        args = arguments(*options)
        return folder_of(args, settings_of(args, "small", "abc", (EOS,)))

    assert folder() == folder("--benchmarks", "aime24", "--samples", 8, "--grader", "math_verify")
    assert folder().parent == Path("runs/eval") and folder().name.startswith("small-")
    others = (["--seed", 1], ["--temperature", 1], ["--max_new_tokens", 5], ["--server_dtype", "float32"])
    assert len({folder(), *(folder(*other) for other in others)}) == 5
    assert folder("--output_dir", "here") == Path("here")


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_local_model_is_known_by_its_weights(model, tmp_path):
    found = find_model(str(model), None)
    assert (found.context, found.revision, found.slug) == (200, None, "small")
    assert found.stop_token_ids == (found.tokenizer.eos_token_id,)
    weights = np.arange(1000, dtype=np.float32)
    save_file({"weight": weights}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) == found.weights
    weights[500] += 1
    save_file({"weight": weights}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != found.weights


def test_a_large_file_is_known_by_its_blocks(tmp_path):
    data = bytearray(20 << 20)
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    before = fingerprint(tmp_path)
    for place in (0, len(data) - 1):
        data[place] = 1
        path.write_bytes(data)
        assert fingerprint(tmp_path) != before
        data[place] = 0


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("hbx/JustRL-DeepSeek-1.5B", "JustRL-DeepSeek-1.5B"),
        ("runs/tiny/checkpoint-160/", "tiny-checkpoint-160"),
        ("embedded:tiny-base", "tiny-base"),
        ("../models/my model", "my-model"),
    ],
)
def test_a_folder_is_named_after_the_model(name, slug):
    assert EvaluatedModel(name, "", None, "", None, (), None).slug == slug


def test_models_that_are_not_there_or_have_no_weights_are_refused(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/none", "./none", "a/b/c", "gpt2", "embedded:other"):
        with pytest.raises(DataError, match=f"model={name!r}: there is no such folder"):
            find_model(name, None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="model='a/b' cannot be read: .* Give a folder with config.json"):
        find_model("a/b", None)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="no weight file in that folder .*It is an adapter: merge it"):
        fingerprint(tmp_path)
    with pytest.raises(DataError, match="model_revision='main' has no meaning for the folder"):
        find_model(str(model), "main")


def test_weights_that_are_pickles_are_refused(model, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no weight file in that folder .*pickles, which are not loaded: save it again"):
        find_model(str(folder), None)


def test_a_model_of_the_hub_is_known_by_its_commit(model, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--hbx--small"
    shutil.copytree(model, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_model("hbx/small", None)
    assert (found.path, found.revision, found.weights, found.slug) == ("hbx/small", commit, commit, "small")


# -- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def serving():
    """`serving(model="m", ...)`: a client of a server that says it serves this."""
    servers = []

    def start(version="default", paused=False, **config):
        def answer(method, path, body):
            if path.startswith("/server_info"):
                return 200, {"vllm_config": {"model_config": {"dtype": "torch.bfloat16", "max_model_len": 300, **config}}}
            return 200, {"is_paused": paused} if path == "/is_paused" else {"weight_version": version}

        servers.append(FakeServer(answer))
        return RolloutClient(servers[-1].url, "k3y")

    yield start
    for server in servers:
        server.close()


def test_a_server_of_something_else_is_refused(serving, model):
    judged = find_model(str(model), None)
    assert check_server(serving(model=str(model)), judged, "bfloat16", "default") == 300
    with pytest.raises(ServerError, match="serves 'other/model', and .* is needed. Start it with --model"):
        check_server(serving(model="other/model"), judged, "bfloat16", "default")
    with pytest.raises(
        ServerError, match="holds weights in bfloat16, and --server_dtype is float32. Give --server_dtype bfloat16"
    ):
        check_server(serving(model=str(model)), judged, "float32", "default")
    with pytest.raises(ServerError, match="version '17', and --weight_version is 'default'.*--weight_version 17 to judge"):
        check_server(serving(model=str(model), version="17"), judged, "bfloat16", "default")
    with pytest.raises(
        ServerError, match="is paused: a trainer is pushing weights to it, or died while it did.*start the server"
    ):
        check_server(serving(model=str(model), paused=True), judged, "bfloat16", "default")


def test_a_server_that_is_not_there_is_left_out_and_one_with_too_little_room_refused(serving, model, arguments):
    judged = find_model(str(model), None)
    requests = requests_of(Task("aime24", "", [], 1), [[1] * 100], seed=0)
    good = serving(model=str(model))
    options = ["--rollout_servers", good.url, "http://127.0.0.1:9", "--vllm_server_timeout", 0.1]
    pool = connect(judged, arguments(*options, "--max_new_tokens", 200), [], requests)
    try:
        assert [member.url for member in pool.live()] == [good.url]
    finally:
        pool.close()
    with pytest.raises(ServerError, match=rf"The server at {good.url} takes 300 tokens.*aime24 problem 0 \(100\).*200 or less"):
        connect(judged, arguments(*options, "--max_new_tokens", 201), [], requests)
    with pytest.raises(ServerError, match="No rollout server answered"):
        connect(judged, arguments("--rollout_servers", "http://127.0.0.1:9", "--vllm_server_timeout", 0.1), [], requests)


# -- the line itself --------------------------------------------------------------------------------------------------


class Failed(Exception):
    """The line ended with this status and these words."""


@pytest.fixture
def line(monkeypatch, capsys, tmp_path):
    """`line("--model", ...)`: run the recipe in an empty folder as a shell would; what it printed, or `Failed`."""
    monkeypatch.chdir(tmp_path)

    def run(*options) -> str:
        monkeypatch.setattr("sys.argv", [str(RECIPE), *map(str, options)])
        capsys.readouterr()
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as end:
            raise Failed(end.code, "".join(capsys.readouterr())) from end
        return capsys.readouterr().out

    return run


def test_a_dry_run_prints_the_plan_and_leaves_nothing(line, model, problems, tmp_path):
    out = line("--model", model, "--benchmarks", problems, "--max_new_tokens", 100, "--output_dir", "out", "--dry_run")
    for expected in (
        f"  model        {model} (weights {fingerprint(model)})",
        "  benchmarks   sums    5 problems x  4 =     20",
        "  samples      20 responses of at most 100 tokens; none is there yet",
        "  sampling     temperature 0.7, top-p 0.9, seed 0",
        "  grader       the rule grader",
        "  results      out/",
    ):
        assert expected in out.splitlines()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "error: The model .* takes 200 tokens of prompt and response"),
        (
            ["--max_new_tokens", 50, "--verifier_server", "http://127.0.0.1:9"],
            "error: The verifier at http://127.0.0.1:9 does not",
        ),
        (
            ["--max_new_tokens", 50, "--data_dir", "x", "--benchmarks", "aime24"],
            "error: AIME 2024: no file 'x/AIME24/test.parquet'",
        ),
        (["--samplez", 3], "error: .*samplez"),
    ],
    ids=["too long", "no verifier", "no data", "no such option"],
)
def test_a_mistake_is_one_paragraph_and_status_2_and_leaves_nothing(
    line, model, problems, tmp_path, monkeypatch, options, words
):
    monkeypatch.setattr("justrl_trl.evaluation.verifier._CHECK_SECONDS", 0.1)
    with pytest.raises(Failed, match=rf"\(2, .*{words}"):
        line("--model", model, "--benchmarks", problems, *options)
    assert not list(tmp_path.glob("runs"))


BOXED = {seed_for(0, "sums", problem, sample) for problem in range(5) for sample in range(0, 6, 2)}


class Oracle:
    """A rollout server on weights from disk that answers i + 1 to problem i, in a box for every other sample; or fails."""

    def __init__(self, model: Path):
        self.tokenizer, self.path, self.asked, self.fails_after = find_model(str(model), None).tokenizer, model, 0, None
        self.lock, self.fake = threading.Lock(), FakeServer(self.answer)

    def answer(self, method, path, body):
        if path.startswith("/server_info"):
            config = {"model": str(self.path), "dtype": "torch.bfloat16", "max_model_len": 200}
            return 200, {"vllm_config": {"model_config": config}}
        if path == "/v1/models":
            return 200, {"data": [{"id": "oracle"}]}
        if path == "/is_paused":
            return 200, {"is_paused": False}
        if path != "/v1/completions":
            return 200, {"weight_version": "default"}
        with self.lock:
            if self.fails_after == self.asked:
                return 400, {"error": "out of order"}
            self.asked += 1
        number = int(self.tokenizer.decode(body["prompt"]).split("user\n")[1].split(" ")[0]) + 1
        text = f"It is \\boxed{{{number}}}" if body["seed"] in BOXED else f"It is {number}, boxed"
        return 200, {"choices": [{"index": 0, "token_ids": [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]}]}


@pytest.fixture
def oracle(model):
    server = Oracle(model)
    yield server
    server.fake.close()


@pytest.fixture
def evaluate(line, model, problems, oracle, tmp_path):
    """`evaluate(...)`: the line on the oracle, in `tmp_path/out`; returns what it printed and the results."""
    options = ["--model", model, "--benchmarks", problems, "--max_new_tokens", 50, "--output_dir", "out"]
    options += ["--rollout_servers", oracle.fake.url, "--server_max_num_seqs", 1]

    def run(*more) -> tuple[str, dict]:
        out = line(*options, *more)
        return out, json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def rows(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_samples_grades_and_results_are_written_and_printed(evaluate, oracle, tmp_path):
    out, results = evaluate()
    samples = rows(tmp_path / "out" / "samples.jsonl")
    right = sum(row["seed"] in BOXED for row in samples)
    assert len(samples) == oracle.asked == 20 and right == 10  # of each problem's four samples, two
    scores = results["scores"]["sums"]
    assert scores["avg"] == 0.5 and scores["no_box"] == 0 and scores["truncated"] == 0
    grades = rows(tmp_path / "out" / "grades.jsonl")
    assert [grade["correct"] for grade in grades] == [row["seed"] in BOXED for row in samples]
    assert {grade["answer"] for grade in grades} == {None, "1", "2", "3", "4", "5"}
    assert "50.00 ± 0.00" in out and (tmp_path / "out" / "results.md").read_text() in out
    assert all("eos" not in row["completion"] and "<|im_end|>" not in row["completion"] for row in samples)


def test_the_same_command_samples_nothing_again_and_more_samples_only_the_rest(evaluate, oracle):
    _, first = evaluate()
    out, second = evaluate()
    assert oracle.asked == 20 and "none needed: nothing is missing" in out and first["scores"] == second["scores"]
    _, third = evaluate("--samples", 6)
    assert oracle.asked == 30 and third["scores"]["sums"]["samples"] == 6
    _, fourth = evaluate("--samples", 4, "--limit", 3)
    assert oracle.asked == 30 and fourth["scores"]["sums"]["problems"] == 3


def test_samples_before_a_fault_are_kept_and_only_missing_ones_are_requested(evaluate, oracle, tmp_path):
    oracle.fails_after = 7
    with pytest.raises(
        Failed, match=r"\(2, .*out of order.*[567] of 20 samples are in out; the same command goes on from there"
    ):
        evaluate()
    kept, before = rows(tmp_path / "out" / "samples.jsonl"), oracle.asked
    oracle.fails_after = None
    _, results = evaluate()
    samples = rows(tmp_path / "out" / "samples.jsonl")
    assert samples[: len(kept)] == kept
    assert 20 - len(kept) <= oracle.asked - before <= 20 - len(kept) + 3  # three of the first run may have come late
    assert len({(row["problem"], row["sample"]) for row in samples}) == len(samples) == 20
    assert results["scores"]["sums"]["avg"] == 0.5


def test_other_settings_in_the_same_folder_are_refused_by_name(evaluate):
    evaluate()
    with pytest.raises(
        Failed, match=r"\(2, .*out holds the samples of another evaluation: temperature is 0.7 there and 1.0 here"
    ):
        evaluate("--temperature", 1)


def test_other_problems_under_the_same_name_are_refused(evaluate, problems):
    evaluate()
    problems.write_text(problems.read_text().replace("3 + 1?", "3 plus 1?"))
    with pytest.raises(Failed, match=r"\(2, .*another text of sums problem 3 \(4 such samples\)"):
        evaluate()


def test_another_grader_grades_again_without_sampling(evaluate, oracle):
    evaluate()
    out, results = evaluate("--grader", "math_verify")
    # math_verify also reads a number that is in no box
    assert oracle.asked == 20 and results["grader"] == "math_verify" and results["scores"]["sums"]["avg"] == 1.0


@pytest.fixture
def verifier():
    """A verifier that finds everything right but problem 2; `asked` are the prompts."""
    asked = []

    def answer(method, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "compass", "max_model_len": 32768}]}
        asked.append(body["messages"][0]["content"])
        if verifier.fails_after == len(asked) - 1:
            return 403, {"error": "no more"}
        return 200, {"choices": [{"message": {"content": "B" if "It is 3, boxed" in asked[-1] else "A"}}]}

    verifier = FakeServer(answer)
    verifier.fails_after, verifier.asked = None, asked
    yield verifier
    verifier.close()


def test_the_verifier_is_asked_once_about_what_the_rule_rejects_and_can_only_add(evaluate, verifier, tmp_path):
    out, results = evaluate("--verifier_server", verifier.url)
    assert len(verifier.asked) == 10 and all(", boxed" in prompt for prompt in verifier.asked)
    assert results["scores"]["sums"]["avg"] == 0.9 and results["scores_without_verifier"]["sums"]["avg"] == 0.5
    assert results["turned_by_verifier"] == 8 and "the verifier turned 8 wrong into right" in out
    assert results["grader"] == "the rule grader, then compass (protocol exact) on what it rejects"
    evaluate("--verifier_server", verifier.url)
    assert len(verifier.asked) == 10  # verdicts are kept
    _, results = evaluate("--verifier_server", verifier.url, "--verifier_protocol", "with_question")
    assert len(verifier.asked) == 20  # of another protocol they are others
    assert "0 + 1?" in "".join(verifier.asked[10:]) and "0 + 1?" not in "".join(verifier.asked[:10])
    _, results = evaluate()
    assert results["scores"]["sums"]["avg"] == 0.5 and "scores_without_verifier" not in results


def test_a_verifier_that_fails_half_way_goes_on_with_the_rest(evaluate, verifier, tmp_path):
    verifier.fails_after = 4
    with pytest.raises(Failed, match=r"\(2, .*403: .*no more.*20 of 20 samples are in out"):
        evaluate("--verifier_server", verifier.url, "--verifier_concurrency", 1)
    assert len(rows(tmp_path / "out" / "verdicts.jsonl")) == 4
    verifier.fails_after = None
    _, results = evaluate("--verifier_server", verifier.url)
    assert len(verifier.asked) == 5 + 6 and results["scores"]["sums"]["avg"] == 0.9


def test_ctrl_c_says_what_is_kept(evaluate, oracle, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("justrl_trl.evaluation.sampling.Rollouts.run", interrupted)
    with pytest.raises(Failed, match=r"\(130, .*interrupted. 0 of 20 samples are in out; the same command goes on from there"):
        evaluate()
