"""What every unit test shares: one thread, no network, no trace of a launcher, and a world of as many ranks as asked for."""

import os

import pytest
import torch

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "JUSTRL_SERVER_KEY")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    """Tests run as if started by hand, whatever started pytest; their child processes never reach for the Hub."""
    for name in [name for name in os.environ if name in LAUNCHER or name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors gain nothing from more, and other processes share the machine."""
    torch.set_num_threads(1)


@pytest.fixture
def ranks(monkeypatch):
    """`ranks(32)`: from here on this process is rank 0 of 32, by torch's own fake process group, which sends nothing."""
    from accelerate.state import AcceleratorState
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(count: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(count))
        if count > 1:
            distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield become
    if distributed.is_initialized():
        distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator():
    """An `Accelerator` of one process on the CPU."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
