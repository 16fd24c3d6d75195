"""serve.py gives every server a device of its own, or says why it cannot."""

import os
import runpy
from pathlib import Path

import pytest

from justrl_trl.servers.process import ServerError

SERVE = runpy.run_path(str(Path(__file__).resolve().parents[3] / "recipes" / "serve.py"))
pick_devices = SERVE["pick_devices"]


@pytest.mark.parametrize(
    ("gpus", "servers", "expected"),
    [("all", 0, [0, 1, 2, 3]), ("all", 2, [0, 1]), ("1-3", 0, [1, 2, 3]), ("0,2-3", 0, [0, 2, 3]), ("3", 1, [3])],
)
def test_each_server_has_a_gpu_and_gets_its_weights_over_nccl(gpus, servers, expected):
    devices = pick_devices(gpus, servers, available=4)
    assert [device["gpu"] for device in devices] == expected
    assert {device["weight_backend"] for device in devices} == {"justrl_nccl"}


@pytest.mark.parametrize(("gpus", "servers"), [("all", 5), ("0-4", 0), ("7", 1), ("1-2", 3)])
def test_more_servers_than_gpus_or_gpus_that_are_not_there_are_refused(gpus, servers):
    with pytest.raises(ServerError, match=rf"--gpus {gpus} --servers {servers}: this node has 4 GPUs"):
        pick_devices(gpus, servers, available=4)


@pytest.mark.parametrize("gpus", ["a-b", "-", "1,,2", "two"])
def test_what_is_not_a_list_of_gpus_is_refused(gpus):
    with pytest.raises(ServerError, match="is not a list of GPUs. Write all, 0-7 or 0,2,5"):
        pick_devices(gpus, 0, available=4)


def test_without_a_gpu_servers_take_cores_in_turn_and_gloo():
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    devices = pick_devices("all", len(cores) + 1, available=0)
    assert [device["core"] for device in devices] == [*cores, cores[0]]
    assert {(device["gpu"], device["weight_backend"]) for device in devices} == {(None, "justrl_gloo")}
    assert len(pick_devices("all", 0, available=0)) == 1
