"""The run folder: paths of its files, the resolved configuration, and what happens to an earlier run.

```
config.yaml        the resolved configuration, loadable with --config
metrics.jsonl      one line per rollout step
samples.jsonl      a few completions per rollout step, with prompt, solution, prediction, reward, advantage
heldout.jsonl      accuracy on held-out problems, before and after
validation.jsonl   scores of each benchmark, where there is validation
dynamics.png       reward, entropy, response length against rollout step (the paper's Figure 2)
summary.json       the run in a dozen numbers
vllm_server.log    output of the managed server
checkpoint-N/      N optimizer steps; resumable; loads with AutoModelForCausalLM
```

Only rank 0 writes. A resumed run drops the lines beyond its checkpoint and goes on; a new run moves an old folder aside.
"""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import yaml

from justrl_trl.config import JustRLConfig
from justrl_trl.jsonl import read_jsonl, write_jsonl


class RunFolder:
    """Paths and records of one run.

    Args:
        path: `output_dir` of the run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.heldout = self.path / "heldout.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.figure = self.path / "dynamics.png"
        self.summary = self.path / "summary.json"
        self.server_log = self.path / "vllm_server.log"
        self.config = self.path / "config.yaml"

    def prepare(self, resume: bool) -> Path | None:
        """Make the folder; without `resume` a used one is moved aside first, so that no run overwrites another.

        Returns:
            Where the old folder went, if there was one.
        """
        moved = None
        if not resume and any(file.exists() for file in (self.config, self.metrics, self.validation)):
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            moved = self.path.with_name(f"{self.path.name}-before-{stamp}")
            self.path.rename(moved)
        self.path.mkdir(parents=True, exist_ok=True)
        return moved

    def cut(self, rollout_step: int) -> None:
        """Drop records beyond `rollout_step`: a resumed run makes them again."""
        for file in (self.metrics, self.samples, self.heldout, self.validation):
            if file.exists():
                kept = [row for row in read_jsonl(file) if row["rollout_step"] <= rollout_step]
                write_jsonl(file, kept)

    def resolved(self, *parts: object) -> dict:
        """The configuration after all defaults and overrides, as plain values that `--config` reads back; no tokens."""
        config = {}
        for part in parts:
            config |= {k: v for k, v in _plain(part).items() if v is not None and "token" not in k.split("_")}
        return config

    def write_config(self, *parts: object) -> None:
        """Write `resolved()`."""
        self.config.write_text(yaml.safe_dump(self.resolved(*parts), sort_keys=True, allow_unicode=True))


def _plain(part: object) -> dict:
    """Dataclass fields as YAML-ready values, as given on input rather than as derived."""
    values = part.to_dict() if hasattr(part, "to_dict") else asdict(part)
    if isinstance(part, JustRLConfig):
        # derived from the number of ranks; the whole batch is what the recipe states
        for name in ("per_device_train_batch_size", "max_steps", "save_steps", "logging_steps", "warmup_steps"):
            values.pop(name)
    return json.loads(json.dumps(values, default=str))
