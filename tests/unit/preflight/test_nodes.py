"""A run on several machines that could not work is refused before anything starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from justrl_trl.config import JustRLConfig
from justrl_trl.preflight.nodes import check_weight_address, check_writable_folder
from justrl_trl.runs.setup import check_machine

ROOT = Path(__file__).resolve().parents[3]


def checked(**options) -> None:
    check_weight_address(JustRLConfig(**options))


@pytest.mark.parametrize("loopback", ["127.0.0.1", "localhost", "127.0.1.1", "::1"])
def test_a_loopback_address_with_remote_servers_is_refused_at_once(loopback):
    servers = ["http://192.0.2.7:8000", "http://127.0.0.1:8001"]  # the first is a documentation address: nobody has it
    with pytest.raises(
        ValueError, match=r"only this machine reaches, and http://192.0.2.7:8000 run.*--weight_sync_address \S+"
    ):
        checked(rollout_servers=servers, weight_sync_address=loopback)


def test_a_server_whose_name_is_unknown_counts_as_remote():
    with pytest.raises(ValueError, match="http://no-such-host.invalid:8000 run"):
        checked(rollout_servers=["http://no-such-host.invalid:8000"])


def own_address() -> str | None:
    found = [a.address for one in psutil.net_if_addrs().values() for a in one if a.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), None)


def test_servers_of_this_machine_pass_under_every_address_of_it():
    own = [f"http://{host}:8000" for host in ("127.0.0.1", "localhost", own_address()) if host]
    checked(rollout_servers=own)
    checked()  # and managed ones


def test_an_address_that_others_reach_passes():
    if own_address() is not None:  # a machine without a network has none
        checked(rollout_servers=["http://192.0.2.7:8000"], weight_sync_address=own_address())


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ValueError, match="cannot listen on weight_sync_address='192.0.2.7'.*rank 0's own machine, e.g."):
        checked(rollout_servers=["http://192.0.2.7:8000"], weight_sync_address="192.0.2.7")


def test_every_interface_is_refused():
    with pytest.raises(ValueError, match="'0.0.0.0' would open the weights to every network"):
        checked(weight_sync_address="0.0.0.0")


def test_a_port_that_is_taken_is_said_before_the_run():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on port {port} \(vllm_group_port\) of.*in use.*0 for a free one"):
            checked(vllm_group_port=port)
    checked(vllm_group_port=port)  # the check itself does not keep it


def test_a_folder_that_can_be_made_or_written_passes_and_nothing_is_made(tmp_path):
    check_writable_folder(tmp_path)
    check_writable_folder(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "run", "a/run"])
def test_a_run_folder_that_is_a_file_is_refused_before_the_run(tmp_path, below):
    (tmp_path / "file").touch()
    training = JustRLConfig(output_dir=str(tmp_path / "file" / below))
    with pytest.raises(ValueError, match=f"cannot be a folder: {tmp_path}/file is none. Give another --output_dir"):
        check_machine(training)


def test_a_link_to_nowhere_is_no_folder(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "not_mounted")
    with pytest.raises(ValueError, match=f"{tmp_path}/runs is none"):
        check_writable_folder(tmp_path / "runs" / "mine")


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path, monkeypatch):
    # who runs the tests may be root, for whom only the file system itself can be read-only
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with pytest.raises(ValueError, match=f"cannot be written: {tmp_path} is read-only, or belongs to another user"):
        check_writable_folder(tmp_path / "run")


PROGRAM = """
import os, sys
from pathlib import Path
from accelerate import PartialState
from justrl_trl.preflight import nodes
nodes._FOLDER_SECONDS = 1.0
state = PartialState(cpu=True, backend="gloo")
folder = Path(sys.argv[1 + state.process_index])
nodes.socket.gethostname = lambda: f"node-{state.process_index}"
try:
    nodes.check_shared_folder(folder, state)
    print(f"rank {state.process_index}: shared, {folder.exists()}", flush=True)
except ValueError as error:
    print(f"rank {state.process_index}: {error}", flush=True)
state.destroy_process_group()
"""


def on_two_ranks(tmp_path: Path, *folders: Path) -> str:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    done = subprocess.run(
        [*launcher, str(program), *map(str, folders)], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_folder_for_all_ranks_passes_and_is_left_as_it_was(tmp_path):
    folder = tmp_path / "new" / "run"
    told = on_two_ranks(tmp_path, folder, folder)
    assert "rank 0: shared, False" in told and "rank 1: shared" in told
    assert not (tmp_path / "new").exists()
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    assert "rank 0: shared, True" in on_two_ranks(tmp_path, folder, folder)
    assert [file.name for file in folder.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_a_machine_does_not_see_is_refused_on_every_rank_with_its_name(tmp_path):
    told = on_two_ranks(tmp_path, tmp_path / "one", tmp_path / "other")
    for rank, folder in enumerate(("one", "other")):
        assert f"rank {rank}: output_dir='{tmp_path / folder}' is not one folder for all ranks" in told
    assert told.count("not seen on node-1.") == 2
