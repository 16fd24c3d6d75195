"""What is announced is what is sent, merged, under checkpoint names; a broken push ends on rank 0 with a reason."""

import copy
import math
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from justrl_trl.gloo_group import GlooGroup
from justrl_trl.packing import Sequence
from justrl_trl.policy_weights import PolicyWeights
from justrl_trl.pool import DOWN, LIVE, STALE, AllServersDown, RolloutPool
from justrl_trl.rollout import RolloutClient
from justrl_trl.server import ServerError
from justrl_trl.vllm_plugin import GlooInitInfo, GlooUpdateInfo, empty_tensors, manifest_mismatch
from justrl_trl.weight_sync import WeightSync


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
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **extra)
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
def test_what_is_announced_is_what_is_sent(kind, dtype):
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


def test_the_adapter_is_taken_out_again_after_every_push():
    model = adapted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = PolicyWeights(model, torch.bfloat16)
    for _ in range(50):
        for _ in weights:
            pass
        assert not any(getattr(module, "merged", False) for module in model.modules())
    for name, parameter in model.named_parameters():
        # adding and subtracting in float32 rounds once; it must not add up
        assert torch.allclose(parameter, before[name], rtol=0, atol=1e-7), name


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
        self.refuse, self.events = refuse, []
        self.weights: dict[str, torch.Tensor] = {}
        self.version, self.stamp = "default", lambda version: version
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
        self.info = info = GlooInitInfo(**init_info)
        self._group = GlooGroup(info.address, info.port, info.rank_offset, info.world_size, info.timeout_seconds)
        self._group.join()

    def start_weight_update(self) -> None:
        self._called("start")

    def update_weights(self, update_info: dict) -> None:
        self._called("update")
        assert GlooUpdateInfo(**update_info).generation == self.info.generation
        self._staged = empty_tensors(self.info)
        for _, tensor in self._staged:
            self._group.broadcast(tensor)

    def finish_weight_update(self, weight_version: str) -> None:
        self._called("finish")
        self.weights, self.version = dict(self._staged), self.stamp(weight_version)

    def health(self, seconds: float) -> str:
        return self.version

    def abort_weight_update(self) -> None:
        self.events.append("abort")
        self._staged = []

    def prompt_logprobs(self, ids: list[int], seconds: float) -> list[float]:
        return [-float(token) for token in ids[1:]]


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
    assert client.events == ["init", *["start", "update", "finish"] * 2]  # one group for the whole run


def test_weights_travel_in_the_dtype_that_the_server_computes_in(accelerator):
    client = FakeClient(dtype="torch.float32")
    made = sync(accelerator, tiny(), client)
    made.push("1")
    assert {tensor.dtype for tensor in client.weights.values()} == {torch.float32}


@pytest.mark.parametrize("backend", [None, "ipc"])
def test_a_server_with_another_backend_is_refused_with_what_can_be_fed(accelerator, backend):
    with pytest.raises(ServerError, match=rf"http://fake has weight transfer backend {backend!r}.*justrl_gloo.*nccl.*Start it"):
        sync(accelerator, tiny(), FakeClient(backend))


def test_a_server_that_does_not_join_is_refused(accelerator):
    with pytest.raises(ServerError, match="init was refused"):
        sync(accelerator, tiny(), FakeClient(refuse="init"), timeout_seconds=1).push("4")


@pytest.mark.parametrize("refused", ["start", "update", "finish"])
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
    assert client.events[-1] == refused


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


def test_the_gap_is_the_largest_and_the_mean_difference_over_responses(accelerator):
    made = sync(accelerator, tiny(), FakeClient())
    sequences = [Sequence(torch.tensor([9, 9, 3, 4]), prompt_length=2), Sequence(torch.tensor([9, 5, 6]), prompt_length=1)]
    # the fake says -token: -3, -4 and -5, -6
    made._pool.current(made._pool.members, "1")
    largest, mean, k3 = made.gap(sequences, torch.tensor([-3.0, -4.5, -5.0, -5.8]))
    assert (largest, mean) == (pytest.approx(0.5), pytest.approx(0.7 / 4))
    # differences 0, -0.5, 0, 0.2: exp(d) - 1 - d
    assert k3 == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.exp(0.2) - 1 - 0.2) / 4, rel=1e-5)


def test_without_a_live_server_there_is_no_gap_and_no_error(accelerator):
    made = sync(accelerator, tiny(), FakeClient())
    made._pool.lose(made._pool.members[0], "gone")
    sequence = Sequence(torch.tensor([9, 3]), prompt_length=1)
    assert made.gap([sequence], torch.tensor([-3.0])) is None
    assert made.gap([], torch.zeros(0)) is None


def test_no_thread_stays_behind_a_push(accelerator):
    made = sync(accelerator, tiny(), FakeClient(), FakeClient())
    before = set(threading.enumerate())
    made.push("4")
    assert set(threading.enumerate()) <= before


def test_a_manifest_fits_only_its_own_model():
    shapes = {"a": (2, 3), "b": (4,)}

    def info(names, sizes):
        return GlooInitInfo("", 0, 1, 2, 1.0, 1, names, ["float32"] * len(names), sizes)

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


@pytest.mark.parametrize("refused", ["init", "start", "update", "finish"])
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
    assert clients[1].version != "8"


def test_nobody_uses_a_push_that_not_all_have_received(accelerator):
    clients = [FakeClient(), FakeClient()]
    clients[1].url = "http://second"
    made = sync(accelerator, tiny(), *clients, timeout_seconds=2)
    made.push("4")
    clients[1].refuse, before = "update", list(clients[0].events)
    made.push("8")
    # the good one staged, was told to drop it, joined a group of its own, and only then loaded
    later = clients[0].events[len(before) :]
    assert later[-4:] == ["init", "start", "update", "finish"] and later.count("finish") == 1 and "abort" in later


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
