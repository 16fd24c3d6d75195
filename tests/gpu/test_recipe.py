"""The launch line on one GPU that a ZeRO-3 rank and its server share: the tiny recipe learns."""

import json
import subprocess
import sys

from .conftest import GPU, ROOT, child_environment

CONFIG = "zero3_1gpu" if GPU else "zero3_cpu_2proc"


def test_the_tiny_recipe_learns_through_the_launch_line(tmp_path, figures):
    steps = 40 if GPU else 3
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", f"accelerate_configs/{CONFIG}.yaml"]
    command = [sys.executable, *launch, "recipes/grpo_justrl.py", "--output_dir", str(tmp_path / "run")]
    command += ["--num_rollout_steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = ("reward_first", "reward_last", "heldout_accuracy_first", "heldout_accuracy_last", "seconds")
    figures(**{name: summary[name] for name in names})
    if GPU:
        assert "bfloat16 over float32" in done.stdout and "it shares GPU 0 with a rank" in done.stdout
        assert summary["reward_last"] >= 0.3 > summary["reward_first"]
        assert summary["heldout_accuracy_last"] >= 2 * summary["heldout_accuracy_first"]
