"""Detect a GPU that the driver lists and torch cannot use; otherwise everything would silently run on the CPU.

`python -m justrl_trl.preflight.gpu_driver` is what the installation asks.
"""

import os
import shutil
import subprocess
import sys

import torch

from justrl_trl.errors import ConfigError

_NO_GPU = ("", "-1", "NoDevFiles")


def check_gpu_driver() -> None:
    """On purpose without a GPU is a CUDA_VISIBLE_DEVICES that is empty, -1, or Slurm's NoDevFiles. DS_ACCELERATOR=cpu is not:
    it is for DeepSpeed alone, and neither torch nor vLLM looks at it.

    Raises:
        ConfigError: `nvidia-smi` lists a GPU, and torch cannot use it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (visible is not None and visible.strip() in _NO_GPU) or torch.cuda.is_available():
        return
    listed = [line for line in _nvidia_smi("-L").splitlines() if line.startswith("GPU ")]
    if not listed:
        return
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA. Install the GPU stack: make clean, then make train"
    else:
        driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip() or "?"
        reason = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and the driver (version {driver}) is most "
            "likely too old for that. Update the driver, or run in a container with its forward compatibility package "
            "(cuda-compat)"
        )
        if visible is not None:
            reason += f". Or CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine"
    raise ConfigError(
        f"nvidia-smi lists {len(listed)} GPUs ({listed[0].split(' (UUID')[0]}), but torch cannot use them: {reason}. "
        "Everything would run on the CPU instead, many times slower. If that is what you want, say so: CUDA_VISIBLE_DEVICES='' "
        "(with make, after make clean: it then installs the CPU stack)."
    )


def _nvidia_smi(*options: str) -> str:
    """What it prints; nothing where there is none, or where it cannot talk to a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, *options], capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:
        return ""


if __name__ == "__main__":
    try:
        check_gpu_driver()
    except ConfigError as error:
        sys.exit(f"\nerror: {error}")
