"""Estimate the disk space that the checkpoints of a run need, and compare it with what is free."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError

_STATE_BYTES = 12  # per trained parameter: float32 master and two Adam moments
GB = 10**9


@dataclass(frozen=True)
class CheckpointDisk:
    """Bytes of a run's checkpoints.

    Attributes:
        one: of one checkpoint.
        count: kept at the end.
        made: written in all.
        free: on the disk of the run folder.
    """

    one: int
    count: int
    made: int
    free: int

    @property
    def total(self) -> int:
        return self.one * self.count

    @property
    def most(self) -> int:
        """At a time: a new one is complete before an old one goes."""
        return self.one * min(self.made, self.count + (self.count < self.made))

    def describe(self, every: str) -> list[str]:
        """Lines for the plan."""
        kept = f"the last {self.count} are kept (save_total_limit)" if self.count < self.made else "all are kept"
        line = f"{every}: {self.made} of about {_size(self.one)} each; {kept}, {_size(self.total)} of {_size(self.free)} free"
        if self.most <= self.free:
            return [line]
        fit = self.free // self.one
        return [
            line,
            f"WARNING: there is room for {fit}; the run will die when it saves the next one. Use a larger disk (--output_dir), "
            f"keep fewer (--save_total_limit {max(1, fit - 1)}), or save more seldom (--save_rollout_steps)",
        ]

    def check(self) -> None:
        """Refuse a disk without room for one checkpoint. (A disk that fills up later is a warning only: it may be cleared.)

        Raises:
            ConfigError: not even the first checkpoint fits.
        """
        if self.one > self.free:
            raise ConfigError(
                f"No checkpoint fits on the disk of the run folder: one takes about {_size(self.one)}, and {_size(self.free)} "
                "are free. Give another --output_dir, or free some space."
            )


def checkpoint_disk(training: JustRLConfig, parameters: int, trained: int) -> CheckpointDisk:
    """Of a run with these arguments: 12 bytes for each trained parameter (float32 master, two Adam moments; not with
    `save_only_model`), and the model's own file: bfloat16 in a bf16 run, else float32; with adapters, the adapters.

    Args:
        parameters: of the model.
        trained: of those, or of its adapters.
    """
    in_file = trained if trained < parameters else parameters
    file = in_file * (2 if training.bf16 or training.fp16 else 4)
    one = file + (0 if training.save_only_model else _STATE_BYTES * trained)
    steps = training.num_rollout_steps
    made = math.ceil(steps / training.save_rollout_steps) if training.save_rollout_steps else 1
    count = min(made, training.save_total_limit) if training.save_total_limit else made
    return CheckpointDisk(one=one, count=count, made=made, free=_free(Path(training.output_dir)))


def _free(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(part for part in (folder, *folder.parents) if part.exists())).free


def _size(amount: int) -> str:
    return f"{amount / GB:,.0f} GB" if amount >= GB else f"{amount / 1e6:,.0f} MB"
