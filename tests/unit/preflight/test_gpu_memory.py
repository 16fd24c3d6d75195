"""A server that shares a GPU gets what the trainer leaves, and it is known before either starts whether that is enough."""

import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from justrl_trl.config import JustRLConfig
from justrl_trl.preflight.gpu_memory import GIB, ModelSize, Sharing, model_size, server_bytes, share_gpu, trainer_bytes
from justrl_trl.runs.servers import plan_sharing, start_servers

PAPER = ModelSize(1_777_088_000, layers=28, hidden=1536, intermediate=8960, vocabulary=151_936, kv_heads=2, head_dim=128)
SEVEN = ModelSize(7_615_616_512, layers=28, hidden=3584, intermediate=18944, vocabulary=152_064, kv_heads=4, head_dim=128)
CARD = int(79.1 * GIB)  # an H100 of 80 GB


def trainer(size: ModelSize = PAPER, shards: int = 8, tokens: int = 32768, **changes) -> dict[str, int]:
    return trainer_bytes(size, **{"shards": shards, "tokens": tokens, "width": 2, "checkpointing": True, **changes})


def server(size: ModelSize = PAPER, context: int = 32768) -> dict[str, int]:
    return server_bytes(size, width=2, context=context)


def test_the_papers_model_on_eight_ranks_takes_about_20_gib():
    assert 17 < sum(trainer().values()) / GIB < 22


def test_terms_are_what_they_say():
    needs = trainer(shards=4)
    assert needs["states"] == 18 * PAPER.parameters // 4  # master, gradients, two moments in float32; weights in bfloat16
    assert needs["activations"] == 2 * 28 * 32768 * 1536
    assert trainer(shards=4, trained=0)["states"] == 2 * PAPER.parameters // 4
    assert trainer(checkpointing=False)["activations"] > 10 * needs["activations"]
    assert server()["weights"] == 2 * PAPER.parameters
    assert server()["KV cache of one sequence"] == 28672 * (32768 + 128)  # 28 KiB for each token of this model
    assert server(context=100)["KV cache of one sequence"] == 28672 * 128  # in whole blocks


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_server_and_trainer_fit_together_with_something_to_spare(shards):
    sharing = share_gpu(0, CARD, trainer(shards=shards), server(), asked=None, most=0.85, sequences=256)
    assert sharing.server * CARD >= sum(server().values())
    assert sharing.trainer * CARD >= 1.15 * sum(trainer(shards=shards).values())  # they are an estimate
    assert sharing.server + sharing.trainer < 1


def test_a_server_with_0_85_beside_eight_ranks_would_not_have_fitted():
    needs = sum(trainer().values())
    assert 0.85 * CARD + needs > CARD
    assert share_gpu(7, CARD, trainer(), server(), asked=None, most=0.85, sequences=256).server < 0.85


def test_a_small_model_leaves_the_server_no_more_than_it_would_have_alone():
    tiny = ModelSize(600_000, 2, 128, 256, 100, 2, 32)
    assert share_gpu(0, CARD, trainer(tiny, 1, 4096), server(tiny, 112), asked=None, most=0.4, sequences=256).server == 0.4


def test_a_split_that_cannot_fit_is_refused_with_figures_and_remedies():
    with pytest.raises(ValueError) as raised:
        share_gpu(0, CARD, trainer(SEVEN, shards=1), server(SEVEN), asked=None, most=0.85, sequences=256)
    message = str(raised.value)
    for part in ("One GPU of 79 GiB does not hold", "states 127", "--num_processes 4", "--max_tokens_per_micro_batch"):
        assert part in message
    assert "would get 0.00 of the GPU" in message


def test_an_explicit_share_overrides_the_estimate_unless_the_server_cannot_start():
    assert share_gpu(0, CARD, trainer(shards=1), server(), asked=0.3, most=0.85, sequences=256).server == 0.3
    with pytest.raises(ValueError, match=r"The server needs 8 GiB .*, and would get 0\.05 of the GPU"):
        share_gpu(0, CARD, trainer(shards=1), server(), asked=0.05, most=0.85, sequences=256)


def test_the_plan_says_who_gets_what():
    told = share_gpu(7, CARD, trainer(), server(), asked=0.5, most=0.85, sequences=256).describe()
    assert (
        told == "it shares GPU 7 with a rank: 0.50 of 79 GiB = 40 GiB for the server (KV cache 32.2), about 18 GiB for the rank"
    )


def test_the_trainer_is_held_to_what_the_server_leaves(monkeypatch):
    held = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, gpu: held.append((share, gpu)))
    Sharing(gpu=7, card=80 * GIB, server=0.5, kv_cache=0, trainer_needs=0).hold_trainer()
    assert held == [(pytest.approx(0.47 - 2 / 80), 7)]  # CUDA's context and NCCL take memory beside torch's allocator


def test_the_cache_of_the_server_is_what_its_share_has_beside_weights_and_its_own_needs():
    sharing = share_gpu(0, CARD, trainer(), server(), asked=0.5, most=0.85, sequences=256)
    assert sharing.kv_cache == int(0.5 * CARD) - 2 * PAPER.parameters - 4 * GIB
    few = share_gpu(0, CARD, trainer(), server(), asked=0.5, most=0.85, sequences=3)
    assert few.kv_cache == 3 * server()["KV cache of one sequence"]  # more could not be used


@pytest.mark.parametrize("asked", [0.6, 0.98, 1.0])
def test_a_share_that_leaves_the_rank_less_than_its_states_is_refused_with_the_most_that_it_may_be(asked):
    needs = {"trainer": trainer(shards=1), "server": server(), "most": 0.85, "sequences": 256}
    with pytest.raises(ValueError, match=rf"shared_gpu_memory_utilization={asked} leaves .* take 31.8\. Use at most 0\.56"):
        share_gpu(0, CARD, asked=asked, **needs)
    share_gpu(0, CARD, asked=0.56, **needs)


def test_a_share_cannot_be_asked_for_where_the_states_leave_none():
    with pytest.raises(ValueError, match="does not hold a training rank and its rollout server"):
        share_gpu(0, CARD, trainer(SEVEN, shards=1), server(SEVEN), asked=0.3, most=0.85, sequences=256)


def test_the_launch_line_gives_the_server_its_share_and_its_cache(machine, monkeypatch, tmp_path):
    machine(1, 1)
    training, started = paper_recipe(), []
    monkeypatch.setattr("justrl_trl.runs.servers.ManagedServer", started.append)
    sharing = plan_sharing(training, PAPER, shards=1, trained=PAPER.parameters)
    start_servers("org/model", training, None, tmp_path / "vllm_server.log", sharing)
    argv = started[0].command(8000)
    assert argv[argv.index("--gpu-memory-utilization") + 1] == str(sharing.server)
    assert argv[argv.index("--kv-cache-memory-bytes") + 1] == str(sharing.kv_cache)


def test_the_size_of_a_model_is_that_of_its_config(tmp_path):
    config = Qwen2Config(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    model = Qwen2ForCausalLM(config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]}))
    size = model_size(str(tmp_path))  # there are no weights to read
    assert size == ModelSize(sum(p.numel() for p in model.parameters()), 3, 64, 96, 99, 2, 16)


@pytest.fixture
def machine(monkeypatch):
    """`machine(8, 4)`: this machine has 8 GPUs of 80 GB, and 4 ranks of the run."""

    def become(gpus: int, ranks: int) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        card = type("Properties", (), {"total_memory": CARD})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: card)

    return become


def paper_recipe(**options) -> JustRLConfig:
    training = JustRLConfig(**options)
    training.bf16 = True
    return training


@pytest.mark.parametrize(
    ("gpus", "ranks", "servers", "gpu"), [(8, 8, 1, 7), (1, 1, 1, 0), (8, 4, 4, None), (8, 7, 1, None), (0, 2, 1, None)]
)
def test_a_gpu_is_shared_where_no_other_is_left(machine, gpus, ranks, servers, gpu):
    machine(gpus, ranks)
    sharing = plan_sharing(paper_recipe(managed_servers=servers), PAPER, shards=max(ranks, 1), trained=PAPER.parameters)
    assert (None if sharing is None else sharing.gpu) == gpu


def test_given_servers_share_nothing_here(machine):
    machine(8, 8)
    training = paper_recipe(rollout_servers=["http://10.0.0.5:8000"])
    assert plan_sharing(training, PAPER, shards=8, trained=PAPER.parameters) is None


def test_a_share_that_nobody_would_use_is_refused(machine):
    machine(8, 4)
    training = paper_recipe(managed_servers=4, shared_gpu_memory_utilization=0.3)
    with pytest.raises(ValueError, match="shared_gpu_memory_utilization=0.3 has no effect.*Leave it out"):
        plan_sharing(training, PAPER, shards=4, trained=PAPER.parameters)


@pytest.mark.parametrize("value", [0.0, 1.5, -1.0])
@pytest.mark.parametrize("name", ["vllm_gpu_memory_utilization", "shared_gpu_memory_utilization"])
def test_a_share_is_a_fraction(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number above 0 and at most 1, got {value}"):
        JustRLConfig(**{name: value})
