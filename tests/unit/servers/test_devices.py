"""Every server gets a device of its own, beside the ranks of a run or alone, or an error that says why it cannot."""

import os

import pytest

from justrl_trl.errors import ServerError
from justrl_trl.servers.devices import pick_devices


@pytest.mark.parametrize(
    ("ranks", "gpus", "gpu", "backend"),
    [
        (2, 0, None, "justrl_gloo"),  # no GPU
        (7, 8, 7, "justrl_nccl"),  # the spare one
        (1, 8, 1, "justrl_nccl"),
        (8, 8, 7, "justrl_gloo"),  # the last one is shared, where NCCL refuses two processes
        (1, 1, 0, "justrl_gloo"),
    ],
)
def test_one_server_beside_the_ranks_of_a_run(ranks, gpus, gpu, backend):
    (device,) = pick_devices(1, gpus=gpus, ranks=ranks)
    assert (device["gpu"], device["weight_backend"]) == (gpu, backend)
    if gpus == 0:
        assert device["core"] == max(os.sched_getaffinity(0))


def test_several_servers_beside_ranks_take_the_free_gpus():
    assert [device["gpu"] for device in pick_devices(4, gpus=8, ranks=4)] == [4, 5, 6, 7]
    with pytest.raises(ServerError, match="managed_servers=3 need a GPU each, but 4 GPUs and 2 training ranks leave 2"):
        pick_devices(3, gpus=4, ranks=2)


@pytest.mark.parametrize(
    ("chosen", "count", "expected"),
    [("all", 0, [0, 1, 2, 3]), ("all", 2, [0, 1]), ("1-3", 0, [1, 2, 3]), ("0,2-3", 0, [0, 2, 3]), ("3", 1, [3])],
)
def test_servers_alone_take_the_chosen_gpus_and_get_weights_over_nccl(chosen, count, expected):
    devices = pick_devices(count, gpus=4, chosen=chosen)
    assert [device["gpu"] for device in devices] == expected
    assert {device["weight_backend"] for device in devices} == {"justrl_nccl"}


@pytest.mark.parametrize(("chosen", "count"), [("all", 5), ("1-2", 3)])
def test_more_servers_than_gpus_are_refused(chosen, count):
    with pytest.raises(ServerError, match=f"servers={count} need a GPU each, but 4 GPUs leave . of {chosen}"):
        pick_devices(count, gpus=4, chosen=chosen, option="servers")


@pytest.mark.parametrize("chosen", ["0-4", "7"])
def test_gpus_that_are_not_there_are_refused(chosen):
    with pytest.raises(ServerError, match=f"--gpus {chosen}: this machine has 4 GPUs and no GPU [47]. Write all, or 0-3"):
        pick_devices(0, gpus=4, chosen=chosen)


@pytest.mark.parametrize("chosen", ["a-b", "-", "1,,2", "two"])
def test_a_malformed_gpu_list_is_refused(chosen):
    with pytest.raises(ServerError, match="is not a list of GPUs. Write all, 0-7 or 0,2,5"):
        pick_devices(0, gpus=4, chosen=chosen)


def test_without_a_gpu_servers_take_cores_in_turn_and_gloo():
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    devices = pick_devices(len(cores) + 1, gpus=0)
    assert [device["core"] for device in devices] == [*cores, cores[0]]
    assert {(device["gpu"], device["weight_backend"]) for device in devices} == {(None, "justrl_gloo")}
    assert len(pick_devices(0, gpus=0)) == 1
