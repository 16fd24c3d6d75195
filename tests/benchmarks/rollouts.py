"""Rollouts: this package's client, transfer between ranks, pool and push, against stock TRL 1.16.

    python tests/benchmarks/rollouts.py                  # two cores, no GPU, about ten minutes
    python tests/benchmarks/rollouts.py --only client    # one part: client, transfer, servers, simulation

`client` and `transfer` work at the size of the paper's rollout step, scaled by --scale. The client's server is a process that
answers with bodies of that size in the form of a real vLLM answer, because no CPU generates ten million tokens in a benchmark;
`servers` are real ones. The last line is one JSON object.
"""

import argparse
import heapq
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from accelerate import Accelerator  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl.generation.vllm_client import VLLMClient  # noqa: E402

from justrl_trl.data import tiny  # noqa: E402
from justrl_trl.distributed import broadcast_ragged, leave_together  # noqa: E402
from justrl_trl.rollouts.client import RolloutClient, Sampling  # noqa: E402
from justrl_trl.rollouts.dispatch import generate  # noqa: E402
from justrl_trl.rollouts.pool import RolloutPool  # noqa: E402
from justrl_trl.servers.process import ManagedServer, ServerSpec  # noqa: E402
from justrl_trl.weights.sync import WeightSync  # noqa: E402
from tests.unit.fake_server import FakeServer  # noqa: E402

PROMPTS, N, TOKENS = 256, 8, 5000  # a rollout step of the paper


def sampling(**changes) -> Sampling:
    values = {"n": N, "max_tokens": TOKENS, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return Sampling(**values | {"repetition_penalty": 1.0, "stop_token_ids": (), "seed": 1} | changes)


# -- client: CPU and bytes per million tokens -----------------------------------------------------------------------------


def big_answers() -> None:
    """A process that answers completions of `TOKENS` tokens in vLLM's form; prints its address."""
    ids = [random.Random(0).randrange(150_000) for _ in range(TOKENS)]

    def choice(index: int, logprobs: bool) -> dict:
        made = {
            "index": index,
            "text": "",
            "token_ids": ids,
            "prompt_token_ids": [1, 7, 9],
            "finish_reason": "length",
            "logprobs": None,
        }
        if logprobs:  # vLLM with return_tokens_as_token_ids, as TRL asks for it
            names = [f"token_id:{i}" for i in ids]
            values = [-0.1 * (i % 97) for i in ids]
            made["logprobs"] = {
                "tokens": names,
                "token_logprobs": values,
                "top_logprobs": [{name: value} for name, value in zip(names, values, strict=True)],
                "text_offset": list(range(TOKENS)),
            }
        return made

    texts = {logprobs: json.dumps(choice(0, logprobs)) for logprobs in (False, True)}

    def answer(method, path, body):
        if path == "/v1/completions":
            several = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            text = texts[body.get("logprobs") is not None]
            count = len(several) * body["n"]
            parts = (text.replace('"index": 0', f'"index": {index}', 1) for index in range(count))
            return 200, f'{{"choices": [{", ".join(parts)}]}}'.encode()
        return 200, {"data": [{"id": "model"}], "weight_version": "1"}

    print(FakeServer(answer).url, flush=True)
    threading.Event().wait()


def client(scale: float, repetitions: int) -> dict:
    """CPU seconds of this process and bytes received per million tokens, in alternation."""
    server = subprocess.Popen([sys.executable, __file__, "--only", "answers"], stdout=subprocess.PIPE, text=True)
    received = [0]
    original = requests.Session.send

    def counting(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        received[0] += len(answer.content)
        return answer

    requests.Session.send = counting
    try:
        url = server.stdout.readline().strip()
        prompts = [[i, 7, 9] for i in range(max(2, round(PROMPTS * scale)))]
        million = len(prompts) * N * TOKENS / 1e6
        pool = RolloutPool([RolloutClient(url, "key")], heartbeat_seconds=3600, say=lambda line: None)
        pool.current(pool.members, "1")
        trl = VLLMClient(base_url=url)
        sides = {
            "trl": lambda: trl.generate(prompts, n=N, max_tokens=TOKENS),
            "ours": lambda: generate(pool, prompts, sampling()),
        }
        seen = {name: [] for name in sides}
        for _ in range(repetitions):
            for name, call in sides.items():
                received[0], cpu = 0, time.process_time()
                call()
                seen[name].append(((time.process_time() - cpu) / million, received[0] / million / 1e6))
        cpu, size = ({name: statistics.median(one[i] for one in values) for name, values in seen.items()} for i in (0, 1))
        pool.close()
    finally:
        requests.Session.send = original
        server.kill()
    print(
        f"client, per million tokens: TRL {cpu['trl']:.2f} CPU s and {size['trl']:.0f} MB, "
        f"ours {cpu['ours']:.3f} CPU s and {size['ours']:.1f} MB"
    )
    return {
        "client_cpu_seconds_per_million_tokens": round(cpu["ours"], 4),
        "client_cpu_seconds_per_million_tokens_trl": round(cpu["trl"], 3),
        "client_cpu_ratio": round(cpu["trl"] / cpu["ours"], 1),
        "client_bytes_ratio": round(size["trl"] / size["ours"], 2),
    }


# -- transfer between ranks -----------------------------------------------------------------------------------------------


def transfer_ranks(scale: float) -> None:
    """In two ranks: rank 0's responses to all, as stock TRL sends them and as we do."""
    from accelerate.utils import broadcast_object_list

    accelerator = Accelerator(cpu=True)
    rows = round(PROMPTS * N * scale)
    ids = [[(7 * i + j) % 150_000 for j in range(TOKENS)] for i in range(rows)] if accelerator.is_main_process else None
    seconds = {}
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    broadcast_ragged(ids, rows, accelerator)
    accelerator.wait_for_everyone()
    seconds["ours"] = time.perf_counter() - started
    payload = None
    if accelerator.is_main_process:  # what TRL's vLLM generation hands to every rank
        logprobs = [[[-0.5] for _ in row] for row in ids]
        payload = ([[1, 2, 3]] * rows, ids, logprobs, [[[token] for token in row] for row in ids])
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    broadcast_object_list([payload])
    accelerator.wait_for_everyone()
    seconds["trl"] = time.perf_counter() - started
    if accelerator.is_main_process:
        print(json.dumps(seconds))
    leave_together()


def transfer(scale: float) -> dict:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--only", "ranks", "--scale", str(scale)]
    done = subprocess.run([*launcher, *options], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    seconds = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    rows = round(PROMPTS * N * scale)
    print(f"two ranks, {rows:,} x {TOKENS:,} tokens: TRL {seconds['trl']:.1f} s, ours {seconds['ours']:.2f} s")
    return {
        "rank_transfer_seconds": round(seconds["ours"], 3),
        "rank_transfer_seconds_trl": round(seconds["trl"], 2),
        "rank_transfer_ratio": round(seconds["trl"] / seconds["ours"], 1),
    }


# -- real servers ---------------------------------------------------------------------------------------------------------


def model_of_135m(folder: Path) -> None:
    """Random weights in the shape of SmolLM2-135M (30 layers, hidden 576) with a small vocabulary."""
    tokenizer = tiny._tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def servers(repetitions: int) -> dict:
    """The same prompts on one server (one core) and on two (a core each), lengths with a long tail; and the push."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model_of_135m(path / "model")
        cores = sorted(os.sched_getaffinity(0))
        common = {"model": str(path / "model"), "dtype": "bfloat16", "max_model_len": 512, "host": "127.0.0.1", "port": 0}
        common |= {"max_num_seqs": 16, "kv_cache_bytes": 512 << 20, "gpu_memory_utilization": 0.5, "gpu": None, "seed": 1}
        common |= {"weight_backend": "justrl_gloo"}
        running = [
            ManagedServer(ServerSpec(**common, core=cores[i % len(cores)], log_path=path / f"{i}.log")) for i in range(2)
        ]
        try:
            for server in running:
                server.wait(600)
            clients = [RolloutClient(server.url, server.key) for server in running]
            pools = {n: RolloutPool(clients[:n], max_num_seqs=16, heartbeat_seconds=3600) for n in (1, 2)}
            for pool in pools.values():
                pool.current(pool.members, "default")
            # 16 of some 400 tokens end a response: geometric lengths, a mean of 25 and a tail to 160
            tail = sampling(n=2, max_tokens=160, stop_token_ids=tuple(range(100, 116)))
            prompts = [[5 + i, 6, 7] for i in range(160)]
            walls = {1: [], 2: []}
            for repetition in range(repetitions + 1):
                for count, pool in pools.items():
                    started = time.perf_counter()
                    tokens = sum(map(len, generate(pool, prompts, tail)))
                    if repetition:
                        walls[count].append(tokens / (time.perf_counter() - started))
            speed = {count: statistics.median(values) for count, values in walls.items()}
            model = Qwen2ForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
            sync = WeightSync(Accelerator(cpu=True), model, pools[2], address="127.0.0.1", port=0, timeout_seconds=120)
            sync.push("1")
            started = time.perf_counter()
            sync.push("2")
            push = time.perf_counter() - started
            millions = sum(p.numel() for p in model.parameters()) / 1e6
        finally:
            for server in running:
                server.stop()
    print(f"135M shape: one server {speed[1]:.0f} tokens/s, two {speed[2]:.0f}; push of {millions:.0f}M to both {push:.2f} s")
    return {
        "tokens_per_second_1_server": round(speed[1], 1),
        "tokens_per_second_2_servers": round(speed[2], 1),
        "two_servers_speedup": round(speed[2] / speed[1], 3),
        "push_seconds_per_million_parameters": round(push / millions, 5),
    }


# -- simulation -----------------------------------------------------------------------------------------------------------


def simulation() -> dict:
    """Idle share of decoding slots until the last response of a rollout step is there, by replicas and order of dispatch.

    A replica decodes up to 256 sequences at one token per tick; prompts come in groups of 8 whose lengths are alike (a hard
    prompt is long for all its responses). `known`: the client knows each prompt's mean of last time; `static`: an equal share
    of prompts for each replica, as a single POST to each would be.
    """
    rng = random.Random(0)
    groups = []
    for _ in range(PROMPTS):
        mean = rng.lognormvariate(-1.54, 0.8)
        groups.append([min(15360, int(15360 * mean * rng.lognormvariate(0, 0.4)) + 1) for _ in range(N)])
    result, hidden = {}, {}
    print(f"simulated idle share of slots: {'replicas':>9}{'static':>9}{'random':>9}{'known':>9}   scoring hidden")
    for replicas in (1, 4, 16, 32, 64):
        known = sorted(groups, key=lambda group: -sum(group))
        idle = {
            "static": idle_share([groups[i::replicas] for i in range(replicas)]),
            "random": idle_share(pulled(groups, replicas)),
            "known": idle_share(pulled(known, replicas)),
        }
        hidden[replicas] = round(hidden_scoring([finish_times(share) for share in pulled(known, replicas)]), 4)
        print(f"{'':30}{replicas:>9}" + "".join(f"{value:>9.1%}" for value in idle.values()) + f"{hidden[replicas]:>17.1%}")
        result[replicas] = {name: round(value, 4) for name, value in idle.items()}
    return {"tail_idle_share": result, "scoring_hidden_share": hidden}


def finish_times(share: list[list[int]], slots: int = 256) -> list[tuple[int, int]]:
    """When each group of one replica is complete, and its tokens."""
    free, done = [0] * slots, []
    for group in share:
        ends = [heapq.heapreplace(free, free[0] + length) + length for length in group]
        done.append((max(ends), sum(group)))
    return done


def hidden_scoring(replicas: list[list[tuple[int, int]]], cost: float = 0.3) -> float:
    """Share of the scoring pass that is over when the last response comes, if groups are scored as they finish.

    Args:
        replicas: `finish_times` of each.
        cost: time of the whole scoring pass relative to the generation (verl's documentation has 108 s beside 357 s).
    """
    done = sorted(group for replica in replicas for group in replica)
    end, total = done[-1][0], sum(tokens for _, tokens in done)
    rate, clock = total / (cost * end), 0.0
    for when, tokens in done:
        clock = max(clock, when) + tokens / rate
    return 1 - min(clock - end, cost * end) / (cost * end)


def pulled(groups: list[list[int]], replicas: int) -> list[list[list[int]]]:
    """Each group goes, in order, to the replica with the fewest tokens left: least-loaded dispatch."""
    heap, shares = [(0, r) for r in range(replicas)], [[] for _ in range(replicas)]
    for group in groups:
        load, r = heapq.heappop(heap)
        shares[r].append(group)
        heapq.heappush(heap, (load + sum(group), r))
    return shares


def idle_share(shares: list[list[list[int]]], slots: int = 256) -> float:
    """Slots of all replicas, from the start to the end of the last one, that decode nothing; slots that there are sequences
    for are counted, so few sequences on many replicas are not idleness."""
    ends, work, used = [], 0, []
    for share in shares:
        lengths = [length for group in share for length in group]
        free = [0] * min(slots, len(lengths))
        for length in lengths:
            heapq.heappush(free, heapq.heappop(free) + length)
        ends.append(max(free, default=0))
        work += sum(lengths)
        used.append(min(slots, len(lengths)))
    return 1 - work / (max(ends) * sum(used))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["client", "transfer", "servers", "simulation", "answers", "ranks"])
    parser.add_argument("--scale", type=float, default=0.125, help="of the paper's rollout step, for client and transfer")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    if args.only == "answers":
        return big_answers()
    if args.only == "ranks":
        return transfer_ranks(args.scale)
    parts = {
        "client": lambda: client(args.scale, args.repetitions),
        "transfer": lambda: transfer(args.scale),
        "servers": lambda: servers(args.repetitions),
        "simulation": simulation,
    }
    result = {"scale": args.scale}
    for name, part in parts.items():
        if args.only in (None, name):
            result |= part()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
