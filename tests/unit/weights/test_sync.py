"""What is announced is what is sent, merged, under checkpoint names; a broken push ends on rank 0 with a reason."""

import copy
import math
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from justrl_trl.errors import ServerError
from justrl_trl.policy.packing import Sequence
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.pool import DOWN, LIVE, STALE, AllServersDown, RolloutPool
from justrl_trl.servers.vllm_plugin import GroupInfo, PushInfo, empty_tensors, manifest_mismatch
from justrl_trl.weights import sync as weight_sync
from justrl_trl.weights.stream import PolicyWeights
from justrl_trl.weights.sync import WeightSync
from tests.unit.fake_nccl import FakeCommunicator, NcclGroupOnCpu


def tiny(tied: bool = False, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


def adapted(**extra):
    """A LoRA model whose adapter does something (B starts at zero otherwise)."""
    extra = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | extra
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", **extra)
    model = get_peft_model(tiny(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def checkpoint_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters in the checkpoint of a model without adapter."""
    return [name for name, _ in model.named_parameters()]


MODELS = {
    "untied": tiny,
    "tied": lambda: tiny(tied=True),
    "LoRA": adapted,
    "LoRA with a trained head": lambda: adapted(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", MODELS)
def test_manifest_and_stream_agree(kind, dtype):
    weights = PolicyWeights(MODELS[kind](), dtype)
    announced = [(w.name, w.dtype, w.shape) for w in weights.metadata()]
    for _ in range(2):  # every push says the same
        sent = [(name, tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) for name, tensor in weights]
        assert [row[:3] for row in sent] == announced
        assert all(contiguous for *_, contiguous in sent)


def test_names_are_those_of_the_checkpoint():
    assert [w.name for w in PolicyWeights(tiny(), torch.float32).metadata()] == list(tiny().state_dict())


def test_a_tied_head_is_sent_once_under_the_name_of_the_embedding():
    names = [w.name for w in PolicyWeights(tiny(tied=True), torch.float32).metadata()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert {*names, "lm_head.weight"} == set(tiny(tied=True).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_the_parameters_in_the_servers_dtype(dtype):
    model = tiny()
    state = model.state_dict()
    for name, tensor in PolicyWeights(model, dtype):
        assert torch.equal(tensor, state[name].to(dtype)), name
        assert not tensor.requires_grad


@pytest.mark.parametrize("kind", ["LoRA", "LoRA with a trained head"])
def test_an_adapted_model_is_sent_merged_under_the_names_of_its_base(kind):
    model = MODELS[kind]()
    merged = copy.deepcopy(model).merge_and_unload()
    expected = dict(merged.named_parameters())
    sent = {name: tensor.clone() for name, tensor in PolicyWeights(model, torch.float32)}
    assert list(sent) == checkpoint_names(merged) == checkpoint_names(tiny())
    for name, tensor in sent.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-6), name
    base = dict(tiny().named_parameters())
    changed = {name for name in sent if not torch.allclose(sent[name], base[name], atol=1e-3)}
    trained = {"q_proj", "v_proj", "down_proj"} | ({"lm_head"} if "head" in kind else set())
    assert {name.split(".")[-2] for name in changed} == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pushes_leave_base_and_adapter_bit_by_bit_as_they_were(dtype):
    model = adapted(lora_bias=True, target_modules=["q_proj", "v_proj"]).to(dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = PolicyWeights(model, torch.bfloat16)
    for _ in range(20):
        for _ in weights:
            pass
        assert not any(getattr(module, "merged", False) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_merged_weights_stay_merged_when_the_stream_has_gone_on():
    """A sender may still read a tensor when the next one is made: what is adapted is a copy."""
    model = adapted().to(torch.bfloat16)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    kept = dict(PolicyWeights(model, torch.bfloat16))  # read when the whole pass is over
    for name, tensor in kept.items():
        assert torch.equal(tensor, merged[name]), name
        if any(part in name for part in ("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
            assert tensor.untyped_storage().data_ptr() not in owned, name


@pytest.mark.parametrize("kind", ["untied", "LoRA"])
def test_draining_ends_an_abandoned_pass(kind):
    model = MODELS[kind]()
    streamed = []

    class Recorded(PolicyWeights):
        def _stream(self):
            for name, tensor in super()._stream():
                streamed.append(name)
                yield name, tensor

    weights = Recorded(model, torch.float32)
    iterator = iter(weights)
    next(iterator), next(iterator)
    weights.drain()
    assert streamed == [w.name for w in weights.metadata()]
    assert not any(getattr(module, "merged", False) for module in model.modules())
    weights.drain()  # nothing is left, and nothing starts anew
    assert len(streamed) == len(weights.metadata())


class FakeClient:
    """A server with one worker: joins the trainer's group and receives, as the engine in vLLM does; keeps every event."""

    url = "http://fake"

    understanding = RolloutClient.understanding

    def __init__(self, backend: str | None = "justrl_gloo", dtype: str = "torch.bfloat16", refuse: str | None = None):
        self.config = {"model_config": {"dtype": dtype}, "weight_transfer_config": backend and {"backend": backend}}
        self.refuse, self.events, self.scored = refuse, [], []
        self.weights: dict[str, torch.Tensor] = {}
        self.version, self.stamp = "default", lambda version: version
        self.paused, self.off, self.dies_at = False, 0.0, None
        self._group, self._staged = None, []

    def _called(self, event: str) -> None:
        self.events.append(event)
        if event == self.refuse:
            raise ServerError(f"{event} was refused")

    def vllm_config(self) -> dict:
        return self.config

    def world_size(self) -> int:
        return 1

    def weight_version(self) -> str:
        return self.version

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._called("init")
        self.info = info = GroupInfo(**init_info)
        if self._group is not None:
            self._group.close()
        kind = weight_sync.GROUPS[self.config["weight_transfer_config"]["backend"]]
        self._group = kind(info.address, info.port, info.rank_offset, info.world_size, info.timeout_seconds)
        self._group.join()

    def pause(self) -> None:
        self._called("pause")
        self.paused = True

    def resume(self) -> None:
        self._called("resume")
        self.paused = False

    def start_weight_update(self) -> None:
        assert self.paused
        self._called("start")

    def update_weights(self, update_info: dict) -> None:
        self._called("update")
        assert PushInfo(**update_info).generation == self.info.generation
        self._staged = empty_tensors(self.info)
        for number, (_, tensor) in enumerate(self._staged):
            if number == self.dies_at:
                raise ServerError("connection reset by peer")
            self._group.broadcast(tensor)

    def finish_weight_update(self, weight_version: str) -> None:
        assert self.paused
        self._called("finish")
        self.weights, self.version = dict(self._staged), self.stamp(weight_version)

    def health(self, seconds: float) -> str:
        return self.version

    def abort_weight_update(self) -> None:
        self.events.append("abort")
        self._staged = []

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        self.scored.append(ids)
        return [-float(token) + self.off for token in ids[1:]]


def sync(accelerator, model, *clients, timeout_seconds: float = 10, **options) -> WeightSync:
    options = {"heartbeat_seconds": 1000, "wait_seconds": 0.3, "say": lambda line: None} | options
    pool = RolloutPool(clients, **options)
    return WeightSync(accelerator, model, pool, address="127.0.0.1", port=0, timeout_seconds=timeout_seconds)


@pytest.mark.parametrize("kind", ["untied", "tied", "LoRA"])
def test_a_push_delivers_every_tensor_and_stamps_it(accelerator, kind):
    client, model = FakeClient(), MODELS[kind]()
    made = sync(accelerator, model, client)
    assert made.version is None
    for version in ("4", "8"):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        made.push(version)
        assert made.version == client.version == version
        expected = {name: tensor.clone() for name, tensor in PolicyWeights(model, torch.bfloat16)}
        assert client.weights.keys() == expected.keys()
        assert all(torch.equal(client.weights[name], expected[name]) for name in expected)
    assert client.events == ["init", *["pause", "start", "update", "finish", "resume"] * 2]  # one group for the whole run


def test_weights_travel_in_the_dtype_that_the_server_computes_in(accelerator):
    client = FakeClient(dtype="torch.float32")
    made = sync(accelerator, tiny(), client)
    made.push("1")
    assert {tensor.dtype for tensor in client.weights.values()} == {torch.float32}


@pytest.mark.parametrize("backend", [None, "ipc", "nccl"])
def test_a_server_with_another_backend_is_refused_with_what_can_be_fed(accelerator, backend):
    told = rf"http://fake has weight transfer backend {backend!r}.*'justrl_gloo', 'justrl_nccl'.*Start it"
    with pytest.raises(ServerError, match=told):
        sync(accelerator, tiny(), FakeClient(backend))


def test_a_server_that_does_not_join_is_refused(accelerator):
    with pytest.raises(ServerError, match="init was refused"):
        sync(accelerator, tiny(), FakeClient(refuse="init"), timeout_seconds=1).push("4")


@pytest.mark.parametrize("refused", ["pause", "start", "update", "finish"])
def test_a_push_that_breaks_anywhere_raises_its_reason_and_changes_no_version(accelerator, refused):
    client = FakeClient()
    # the server hangs up while rank 0 broadcasts: the broadcast must not wait for ever, either
    made = sync(accelerator, tiny(), client, timeout_seconds=2)
    made.push("4")
    before = dict(client.weights)
    client.refuse = refused
    with pytest.raises(AllServersDown, match=f"http://fake: down, {refused} was refused"):
        made.push("8")
    assert made.version == client.version == "4" and client.weights == before
    assert client.events[-2:] == [refused, "resume"] and not client.paused


class CountedWeights(PolicyWeights):
    """Counts the parameters that this rank has streamed: each is a gather that all ranks take part in."""

    count = 0

    def _stream(self):
        for pair in super()._stream():
            self.count += 1
            yield pair


@pytest.mark.parametrize("refused", ["start", "update", "finish"])
def test_rank_0_gathers_as_often_as_the_others_however_a_push_breaks(accelerator, refused):
    client, model = FakeClient(refuse=refused), tiny()
    made = sync(accelerator, model, client, timeout_seconds=2)
    made._weights = CountedWeights(model, torch.bfloat16)
    with pytest.raises(AllServersDown):
        made.push("4")
    assert made._weights.count == len(made._weights.metadata())  # whole; the next attempt found nobody, and did not begin


def test_a_stamp_that_is_not_there_is_an_error_with_both_versions(accelerator):
    client = FakeClient()
    made = sync(accelerator, tiny(), client)
    client.stamp = lambda version: "default"
    with pytest.raises(AllServersDown, match=r"http://fake reports weight version 'default' after a push of '4'"):
        made.push("4")
    assert made.version is None


SEQUENCES = [Sequence(torch.tensor([9, 9, 3, 4]), prompt_length=2), Sequence(torch.tensor([9, 5, 6]), prompt_length=1)]
LOGPS = torch.tensor([-3.0, -4.0, -5.0, -6.0])  # what the fake says of them: -token


def proved(accelerator, *off: float, **options) -> tuple[WeightSync, list[FakeClient]]:
    """As many servers as given, whose log-probabilities are `off` by so much; all are live, on version 1."""
    clients = [FakeClient() for _ in off]
    for number, (client, wrong) in enumerate(zip(clients, off, strict=True)):
        client.url, client.off, client.version = f"http://{number}", wrong, "1"
    made = sync(accelerator, tiny(), *clients, **options)
    made.version = "1"
    made._pool.current(made._pool.members, "1")
    return made, clients


def test_the_gap_is_the_largest_and_the_mean_difference_over_responses(accelerator):
    made, _ = proved(accelerator, 0.0)
    gap = made.prove(SEQUENCES, torch.tensor([-3.0, -4.5, -5.0, -5.8]), limit=1.0)
    assert (gap.largest, gap.mean) == (pytest.approx(0.5), pytest.approx(0.7 / 4))
    # differences 0, -0.5, 0, 0.2: exp(d) - 1 - d
    assert gap.k3 == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.exp(0.2) - 1 - 0.2) / 4, rel=1e-5)


def test_every_live_server_is_asked_and_the_widest_gap_counts(accelerator):
    made, clients = proved(accelerator, 0.01, -0.04, 0.02)
    gap = made.prove(SEQUENCES, LOGPS, limit=0.1)
    assert gap.mean == pytest.approx(0.04, rel=1e-3) and gap.largest == pytest.approx(0.04, rel=1e-3)
    assert all(client.scored == [s.ids.tolist() for s in SEQUENCES] for client in clients)


@pytest.mark.parametrize("wrong", [0.3, math.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_the_server_that_differs_is_dropped_and_it_is_named(accelerator, which, wrong):
    told: list[str] = []
    made, _ = proved(accelerator, *(wrong if number == which else 0.02 for number in range(3)), say=told.append)
    assert made.prove(SEQUENCES, LOGPS, limit=0.1).mean == pytest.approx(0.02, rel=1e-3)
    assert [member.state for member in made._pool.members] == [DOWN if number == which else LIVE for number in range(3)]
    assert f"http://{which} is out: after the push of weight version 1 it disagrees" in told[0]
    assert f"{wrong:.3f} on average" in told[0] and f"http://{which} stays out until it is restarted" in told[1]


def test_the_run_ends_if_all_servers_differ(accelerator):
    made, _ = proved(accelerator, 0.3, 0.4)
    with pytest.raises(ServerError, match=r"No server has the trainer.*http://0: .*0\.300 on average.*http://1: .*0\.400 on"):
        made.prove(SEQUENCES, LOGPS, limit=0.1)


def test_a_server_that_was_dropped_stays_out_until_it_is_restarted(accelerator):
    made, clients = proved(accelerator, 0.0, 0.5, heartbeat_seconds=0.02)
    made.prove(SEQUENCES, LOGPS, limit=0.1)
    excluded = made._pool.members[1]
    time.sleep(0.3)  # many probes, which find it healthy
    assert excluded.state == DOWN
    made.push("2")
    assert clients[0].version == "2" and clients[1].version == "1"
    clients[1].version = "default"  # restarted: weights from disk
    until(lambda: excluded.state == STALE)
    made.push("3")
    assert clients[1].version == "3" and excluded.state == LIVE


def test_a_managed_server_that_was_dropped_is_restarted(accelerator):
    class Process:
        """A server of this launch line; its new process has the weights from disk."""

        def __init__(self, client):
            self.client, self.ended, self.calls = client, False, []
            self.spec = type("Spec", (), {"log_path": "log"})

        def stop(self):
            self.calls.append("stop")
            self.ended = True

        def restart(self):
            self.calls.append("restart")
            self.ended, self.client.version, self.client.off = False, "default", 0.0

        def log_tail(self, lines):
            return "the end"

    made, clients = proved(accelerator, 0.0, 0.5, heartbeat_seconds=0.02)
    member = made._pool.members[1]
    member.server = process = Process(clients[1])
    made.prove(SEQUENCES, LOGPS, limit=0.1)
    until(lambda: member.state == STALE)
    assert process.calls == ["stop", "restart"]
    made.push("2")
    assert made.prove(SEQUENCES, LOGPS, limit=0.1).mean == pytest.approx(0.0, abs=1e-6)
    assert [one.state for one in made._pool.members] == [LIVE, LIVE] and process.calls == ["stop", "restart"]


def until(true, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_responses_are_compared_at_all_servers_in_turn(accelerator):
    made, clients = proved(accelerator, 0.01, 0.02, 0.03)
    both = {}
    for _ in range(3):
        gaps = made.gap(SEQUENCES, LOGPS)
        assert len(gaps) == 2
        both |= gaps
    assert {url: round(gap.mean, 3) for url, gap in both.items()} == {"http://0": 0.01, "http://1": 0.02, "http://2": 0.03}
    assert [len(client.scored) for client in clients] == [2, 2, 2]


def test_without_a_live_server_there_is_no_gap_and_no_error(accelerator):
    made, _ = proved(accelerator, 0.0)
    assert made.gap([], torch.zeros(0)) == {}
    made._pool.lose(made._pool.members[0], "gone")
    assert made.gap(SEQUENCES, LOGPS) == {} and made.prove(SEQUENCES, LOGPS, limit=0.1) is None


def test_a_server_that_dies_when_it_is_compared_is_lost_and_the_others_count(accelerator):
    made, clients = proved(accelerator, 0.01, 0.02)

    def dies(ids):
        raise ServerError("connection refused")

    clients[1].prompt_logprobs = dies
    assert made.prove(SEQUENCES, LOGPS, limit=0.1).mean == pytest.approx(0.01, rel=1e-3)
    assert [member.state for member in made._pool.members] == [LIVE, DOWN]


def test_no_thread_stays_behind_a_push(accelerator):
    made = sync(accelerator, tiny(), FakeClient(), FakeClient())
    before = set(threading.enumerate())
    made.push("4")
    assert set(threading.enumerate()) <= before


def test_a_manifest_fits_only_its_own_model():
    shapes = {"a": (2, 3), "b": (4,)}

    def info(names, sizes):
        return GroupInfo("", 0, 1, 2, 1.0, 1, names, ["float32"] * len(names), sizes)

    assert manifest_mismatch(info(["a", "b"], [[2, 3], [4]]), shapes) is None
    assert manifest_mismatch(info(["a", "b"], [[2, 4], [4]]), shapes) == "a is (2, 3) here and (2, 4) in the trainer"
    assert manifest_mismatch(info(["a"], [[2, 3]]), shapes) == "b is (4,) here and absent in the trainer"
    assert manifest_mismatch(info(["a", "b", "c"], [[2, 3], [4], [1]]), shapes) == "c is absent here and (1,) in the trainer"


def test_one_push_feeds_two_servers(accelerator):
    clients, model = [FakeClient(), FakeClient()], tiny()
    clients[1].url = "http://second"
    made = sync(accelerator, model, *clients)
    made.push("4")
    assert [client.version for client in clients] == ["4", "4"]
    assert all(torch.equal(clients[0].weights[name], clients[1].weights[name]) for name in clients[0].weights)
    assert [member.state for member in made._pool.members] == [LIVE, LIVE]


@pytest.mark.parametrize("refused", ["init", "pause", "start", "update", "finish", "resume"])
def test_a_server_that_fails_in_a_push_costs_the_other_one_nothing(accelerator, refused):
    """Both hold the first push; in the second one of them fails, and the other gets a third, alone."""
    clients = [FakeClient(), FakeClient()]
    clients[1].url = "http://second"
    made = sync(accelerator, tiny(), *clients, timeout_seconds=2)
    if refused != "init":
        made.push("4")
    clients[1].refuse = refused
    made.push("8")
    assert clients[0].version == made.version == made._pool.version == "8"
    assert [member.state for member in made._pool.members] == [LIVE, DOWN]
    assert clients[1].version == ("8" if refused == "resume" else "default" if refused == "init" else "4")


def test_a_server_that_was_lost_while_it_was_paused_decodes_again_when_it_is_back(accelerator):
    clients = [FakeClient(), FakeClient(refuse="resume")]
    clients[1].url = "http://second"
    made = sync(accelerator, tiny(), *clients, timeout_seconds=2, heartbeat_seconds=0.05)
    made.push("4")
    member = made._pool.members[1]
    time.sleep(0.3)
    assert member.state == DOWN and clients[1].paused  # no prompt goes to a server that would not answer it
    clients[1].refuse = None
    until(lambda: member.state == LIVE)
    assert not clients[1].paused


def test_a_push_is_loaded_only_after_all_servers_received_it(accelerator):
    clients = [FakeClient(), FakeClient()]
    clients[1].url = "http://second"
    made = sync(accelerator, tiny(), *clients, timeout_seconds=2)
    made.push("4")
    clients[1].refuse, before = "update", list(clients[0].events)
    made.push("8")
    # the good one staged, was told to drop it, joined a group of its own, and only then loaded
    later = clients[0].events[len(before) :]
    assert later[-6:] == ["init", "pause", "start", "update", "finish", "resume"] and later.count("finish") == 1
    assert later.index("abort") < later.index("resume") < len(later) - 6 and not clients[0].paused


def test_a_server_that_comes_back_is_in_the_next_push(accelerator):
    clients = [FakeClient(), FakeClient()]
    clients[1].url = "http://second"
    made = sync(accelerator, tiny(), *clients, timeout_seconds=2, heartbeat_seconds=0.05)
    made.push("4")
    clients[1].refuse = "update"
    made.push("8")
    clients[1].refuse = None
    deadline = time.monotonic() + 5
    while made._pool.members[1].state != STALE and time.monotonic() < deadline:
        time.sleep(0.02)
    made.push("12")
    assert [client.version for client in clients] == ["12", "12"]


def test_servers_that_differ_in_dtype_are_refused(accelerator):
    clients = [FakeClient(), FakeClient(dtype="torch.float32")]
    clients[1].url = "http://second"
    with pytest.raises(ServerError, match="differ in weight dtype.*http://second"):
        sync(accelerator, tiny(), *clients)


# -- NCCL, whose waits have no deadline of their own ------------------------------------------------------------------


@pytest.fixture
def over_nccl(accelerator, monkeypatch):
    """`over_nccl(3)`: so many servers that are fed over NCCL, by a communicator of threads."""
    monkeypatch.setitem(weight_sync.GROUPS, "justrl_nccl", NcclGroupOnCpu)
    FakeCommunicator.reset()

    def start(count: int, **options) -> tuple[WeightSync, list[FakeClient]]:
        clients = [FakeClient("justrl_nccl") for _ in range(count)]
        for number, client in enumerate(clients):
            client.url = f"http://{number}"
        return sync(accelerator, tiny(), *clients, **options), clients

    yield start
    FakeCommunicator.released.set()


def test_a_push_over_nccl_delivers_every_tensor(over_nccl):
    made, clients = over_nccl(2)
    for version in ("4", "8"):
        made.push(version)
        expected = {name: tensor.clone() for name, tensor in PolicyWeights(tiny(), torch.bfloat16)}
        for client in clients:
            assert client.version == version
            assert all(torch.equal(client.weights[name], expected[name]) for name in expected)
    assert FakeCommunicator.events == [(rank, "join") for rank, _ in FakeCommunicator.events]  # one group for the whole run


def test_a_server_that_dies_in_an_nccl_push_is_heard_of_at_once(over_nccl):
    """NCCL would wait; the trainer hears from the HTTP call that ended, and the deadline is not spent."""
    made, clients = over_nccl(2, timeout_seconds=60)
    made.push("4")
    clients[1].dies_at, started = 3, time.monotonic()
    clients[1].health = lambda seconds: (_ for _ in ()).throw(ServerError("connection refused"))
    made.push("8")
    assert time.monotonic() - started < 20
    assert clients[0].version == "8" and [member.state for member in made._pool.members] == [LIVE, DOWN]


def test_a_server_that_hangs_in_an_nccl_push_costs_the_deadline_and_a_new_group_is_made_without_it(over_nccl):
    made, clients = over_nccl(2, timeout_seconds=1)
    made.push("4")
    FakeCommunicator.hangs, started = {(2, "broadcast")}, time.monotonic()
    clients[1].health = lambda seconds: (_ for _ in ()).throw(ServerError("it hangs"))
    made.push("8")
    assert time.monotonic() - started < 20
    assert clients[0].version == "8" and [member.state for member in made._pool.members] == [LIVE, DOWN]
    # rank 0 and the one that is left gave up the old communicator before they joined another one
    for rank in (0, 1):
        assert [event for one, event in FakeCommunicator.events if one == rank] == ["join", "abort", "join"]
    assert not clients[0].paused


def test_a_server_that_hangs_in_ncclcomminitrank_fails_the_push_at_the_deadline(over_nccl):
    made, clients = over_nccl(1, timeout_seconds=1)
    FakeCommunicator.hangs, started = {(1, "join")}, time.monotonic()
    with pytest.raises(AllServersDown, match="not in the NCCL group after 1 s"):
        made.push("4")
    assert time.monotonic() - started < 20 and clients[0].version == "default"
