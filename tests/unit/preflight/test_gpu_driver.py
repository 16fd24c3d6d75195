"""A GPU that torch cannot use is said, at the installation and at every start; a CPU on purpose passes without a word."""

import os
import subprocess
import sys

import pytest
import torch

from justrl_trl.preflight.gpu_driver import check_gpu_driver

NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *driver_version*) echo 470.82.01 ;;
    -L) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"; echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)" ;;
esac
"""
NO_DRIVER = """#!/bin/sh
echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
exit 9
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`nvidia_smi(text)`: a program of that name is first on the PATH."""

    def install(text: str) -> str:
        program = tmp_path / "nvidia-smi"
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return os.environ["PATH"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return install


def test_a_driver_that_is_too_old_is_said_with_both_versions(nvidia_smi, monkeypatch):
    nvidia_smi(NVIDIA_SMI)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"2 GPUs \(GPU 0: NVIDIA H100 80GB HBM3\).*CUDA 13.0.*470.82.01.*Update the driver"):
        check_gpu_driver()


def test_a_torch_without_cuda_is_said(nvidia_smi, monkeypatch):
    nvidia_smi(NVIDIA_SMI)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="built without CUDA. Install the GPU stack: make clean"):
        check_gpu_driver()


@pytest.mark.parametrize("hidden", ["", "-1", " ", "NoDevFiles"])
def test_a_cpu_on_purpose_passes(nvidia_smi, monkeypatch, hidden):
    nvidia_smi(NVIDIA_SMI)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check_gpu_driver()


def test_a_gpu_number_that_is_not_there_may_be_the_reason_too(nvidia_smi, monkeypatch):
    nvidia_smi(NVIDIA_SMI)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8")
    with pytest.raises(ValueError, match="Update the driver.* Or CUDA_VISIBLE_DEVICES=8 names no GPU of this machine"):
        check_gpu_driver()


def test_deepspeeds_own_switch_hides_no_gpu(nvidia_smi, monkeypatch):
    nvidia_smi(NVIDIA_SMI)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match="nvidia-smi lists 2 GPUs"):
        check_gpu_driver()


@pytest.mark.parametrize(("visible", "stack"), [(None, "gpu"), ("0", "gpu"), ("", "cpu"), ("-1", "cpu"), ("NoDevFiles", "cpu")])
def test_make_installs_the_stack_of_the_gpus_that_may_be_used(nvidia_smi, monkeypatch, tmp_path, visible, stack):
    nvidia_smi(NVIDIA_SMI)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = subprocess.run(["make", "-n", "train", f"VENV={tmp_path}"], capture_output=True, text=True, check=True)
    config = {"gpu": "zero3_1gpu.yaml", "cpu": "zero3_cpu_2proc.yaml"}[stack]
    assert f'"{stack}"' in done.stdout and f"accelerate_configs/{config} " in done.stdout


def test_a_gpu_that_works_passes(nvidia_smi, monkeypatch):
    nvidia_smi(NVIDIA_SMI)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpu_driver()


def test_no_gpu_passes(nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi(NO_DRIVER)
    check_gpu_driver()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    check_gpu_driver()


STARTS = {
    "installation": ["-m", "justrl_trl.preflight.gpu_driver"],
    "training": ["recipes/grpo_justrl.py"],
    "servers": ["recipes/serve.py"],
    "evaluation": ["recipes/evaluate.py", "--model", "m"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU that works there is nothing to say")
@pytest.mark.parametrize("start", STARTS)
def test_every_script_reports_an_unusable_gpu_before_anything_else(nvidia_smi, start):
    nvidia_smi(NVIDIA_SMI)
    done = subprocess.run([sys.executable, *STARTS[start]], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: nvidia-smi lists 2 GPUs" in done.stderr and "Traceback" not in done.stderr and "plan" not in done.stdout


def test_the_installation_asks():
    assert "-m justrl_trl.preflight.gpu_driver || exit 1" in open(".ci/install").read()
