"""What the checkpoints of a run will take is told before it; a disk that cannot hold them is no surprise of the ninth day."""

from types import SimpleNamespace

import pytest

from justrl_trl.config import JustRLConfig
from justrl_trl.preflight import checkpoint_disk as module
from justrl_trl.preflight.checkpoint_disk import GB, checkpoint_disk

N = 1_777_088_000  # DeepSeek-R1-Distill-Qwen-1.5B


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """`disk(free, ...)`: of a run with these options, where so many bytes are free."""

    def plan(free: float, parameters: int = N, trained: int = N, half: bool = True, **options):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free)))
        training = JustRLConfig(output_dir=str(tmp_path / "not" / "there"), **options)
        training.bf16 = half
        return checkpoint_disk(training, parameters, trained)

    return plan


def test_the_papers_run_keeps_88_checkpoints_of_25_gb(disk):
    plan = disk(5000 * GB)
    assert (plan.made, plan.count) == (88, 88)  # every 50 of 4,380 rollout steps, and the last one
    assert plan.one == pytest.approx(24.9 * GB, rel=0.01)
    (line,) = plan.describe("every 50 rollout steps")
    assert line == "every 50 rollout steps: 88 of about 25 GB each; all are kept, 2,189 GB of 5,000 GB free"
    plan.check()


def test_a_disk_that_fills_up_is_a_warning_with_what_would_fit(disk):
    plan = disk(300 * GB)
    line, warning = plan.describe("every 50 rollout steps")
    assert warning.startswith("WARNING: there is room for 12; the run will die")
    assert "--save_total_limit 11)" in warning
    plan.check()  # it may be cleared meanwhile


def test_the_advised_save_total_limit_fits(disk):
    assert len(disk(300 * GB, save_total_limit=11).describe("")) == 1
    assert len(disk(300 * GB, save_total_limit=12).describe("")) == 2  # a 13th is complete before the first one goes


def test_a_limit_is_honoured_and_told(disk):
    plan = disk(5000 * GB, save_total_limit=3)
    assert "the last 3 are kept (save_total_limit), 75 GB of" in plan.describe("")[0]
    assert plan.most == 4 * plan.one


def test_a_disk_without_room_for_one_ends_the_run_before_it_begins(disk):
    with pytest.raises(ValueError, match="one takes about 25 GB, and 20 GB are free. Give another --output_dir"):
        disk(20 * GB).check()


@pytest.mark.parametrize(
    ("options", "bytes_per_parameter"),
    [({"half": False}, 16), ({"save_only_model": True}, 2), ({"save_only_model": True, "half": False}, 4)],
)
def test_a_checkpoint_has_the_model_and_what_resuming_needs(disk, options, bytes_per_parameter):
    assert disk(5000 * GB, **options).one == bytes_per_parameter * N


def test_of_adapters_only_the_adapters_are_saved(disk):
    assert disk(5000 * GB, trained=1000).one == 14 * 1000


@pytest.mark.parametrize(("every", "made"), [(0, 1), (20, 2), (30, 2), (40, 1)])
def test_checkpoints_are_counted_as_they_are_written(disk, every, made):
    assert disk(5000 * GB, num_rollout_steps=40, save_rollout_steps=every).made == made


def test_free_space_is_that_of_the_folder_that_will_hold_the_run(tmp_path):
    training = JustRLConfig(output_dir=str(tmp_path / "a" / "b"))
    assert checkpoint_disk(training, 10, 10).free == pytest.approx(module.shutil.disk_usage(tmp_path).free, rel=0.01)
