"""A real vLLM server on the GPU that the trainer uses too: weights arrive over gloo, and the probe tells them from others."""

import math
import os

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from justrl_trl.data.tiny import tiny_base
from justrl_trl.policy.packing import Sequence
from justrl_trl.rollouts.client import RolloutClient, Sampling
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.servers.process import ManagedServer, ServerSpec
from justrl_trl.weights.sync import WeightSync

from .conftest import GPU

IDS = [7, 19, 42, 55, 60, 61, 33, 20, 90, 14, 17, 80, 81, 82, 83, 9, 28, 45, 66, 71] * 5
PROBE = [Sequence(torch.tensor(IDS), prompt_length=1)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    spec = ServerSpec(
        model=str(tiny_base()),
        dtype="bfloat16",
        max_model_len=512,
        host="127.0.0.1",
        port=0,
        max_num_seqs=64,
        kv_cache_bytes=64 << 20,
        gpu_memory_utilization=0.2,
        gpu=0 if GPU else None,
        core=max(os.sched_getaffinity(0)),
        weight_backend="justrl_gloo",
        seed=1,
        log_path=log,
    )
    server = ManagedServer(spec)
    try:
        server.wait(300)
        made = RolloutPool([RolloutClient(server.url, server.key)], [server])
        made.current(made.members, "default")
        yield made
        made.close()
    finally:
        server.stop()


def test_pushed_weights_are_the_served_ones_and_the_probe_tells_them_from_stale_ones(pool, device, figures):
    model = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32).to(device)
    sync = WeightSync(Accelerator(cpu=not GPU), model, pool, address="127.0.0.1", port=0, timeout_seconds=60)
    for version in ("1", "2", "3"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
            logits = model(torch.tensor([IDS], device=device)).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(-1, torch.tensor(IDS[1:], device=device)[:, None])[:, 0]
        stale = sync.prove(PROBE, logps, limit=math.inf)
        sync.push(version)
        fresh = sync.prove(PROBE, logps, limit=math.inf)
        figures(stale=stale.mean, fresh=fresh.mean)
        assert pool.members[0].client.weight_version() == version
        assert fresh.mean < 0.05 and stale.mean > 3 * fresh.mean


def test_the_same_seed_gives_the_same_responses(pool):
    sampling = Sampling(
        n=8, max_tokens=32, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, stop_token_ids=(), seed=5
    )
    client = pool.members[0].client
    first = client.sample([5, 6, 7], sampling, seed=5)
    assert len({tuple(ids) for ids in first}) > 1
    assert client.sample([5, 6, 7], sampling, seed=5) == first
