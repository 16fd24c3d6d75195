"""`dynamics.png` appears whole or not at all, from any part of a run, and its running mean is the one drawn by hand."""

import struct

import pytest

from justrl_trl.reports.figures import plot_dynamics, running_mean


def png_size(path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    return struct.unpack(">II", head[16:24])


def rows(count: int) -> list[dict]:
    return [
        {
            "rollout_step": step,
            "entropy": 1 + step / 100,
            "reward": -0.5 + step / 50,
            "completions/mean_length": 20.0 + step,
            "completions/clipped_ratio": 0.1,
        }
        for step in range(1, count + 1)
    ]


HELDOUT = [{"rollout_step": 0, "accuracy": 0.25}, {"rollout_step": 30, "accuracy": 0.75}]


def test_running_mean_by_hand():
    # window 1: mean of each value with one neighbour on either side, fewer at the ends
    assert running_mean([1, 2, 6, 8, 9], 1) == pytest.approx([1.5, 3, 16 / 3, 23 / 3, 8.5])
    assert running_mean([1, 2, 6], 9) == pytest.approx([3, 3, 3])
    assert running_mean([4, 5], 0) == [4, 5]
    assert running_mean((), 3) == []


def test_running_mean_keeps_a_straight_line_inside():
    line = [0.5 * i for i in range(20)]
    assert running_mean(line, 3)[3:-3] == pytest.approx(line[3:-3])


@pytest.mark.parametrize(("count", "heldout"), [(1, []), (2, HELDOUT), (30, HELDOUT)])
def test_figure_is_a_png_of_three_panels_side_by_side(tmp_path, count, heldout):
    path = tmp_path / "dynamics.png"
    plot_dynamics(rows(count), heldout, path)
    assert png_size(path) == (1690, 507)  # 13 x 3.9 inches at 130 dots per inch
    assert path.stat().st_size > 10_000  # curves and labels, not an empty canvas
    assert [p.name for p in tmp_path.iterdir()] == ["dynamics.png"]  # no temporary file stays


def test_figure_shows_the_data(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_dynamics(rows(30), [], one)
    plot_dynamics(rows(30), HELDOUT, two)
    assert one.read_bytes() != two.read_bytes()


VALIDATION = [
    {"rollout_step": step, "benchmark": name, "avg": 0.3 + step / 200, "stderr": 0.05, "samples": 32}
    for step in (0, 15, 30)
    for name in ("aime24", "amc23")
]


def test_validation_is_a_fourth_panel_with_the_papers_curve_where_there_is_one(tmp_path):
    own, beside = tmp_path / "own.png", tmp_path / "beside.png"
    plot_dynamics(rows(30), HELDOUT, own, VALIDATION)
    plot_dynamics(rows(30), HELDOUT, beside, VALIDATION, {0: 28.46, 500: 39.1, 1000: 43.3})
    assert png_size(own) == png_size(beside) == (2253, 507)  # 4 x 4.33 inches
    assert own.read_bytes() != beside.read_bytes()


def test_an_older_figure_is_replaced(tmp_path):
    path = tmp_path / "dynamics.png"
    path.write_bytes(b"old")
    plot_dynamics(rows(3), [], path)
    png_size(path)


def test_rows_that_lack_a_value_are_left_out_of_its_panel(tmp_path):
    path = tmp_path / "dynamics.png"
    partial = rows(3)
    del partial[1]["entropy"]
    partial[2]["completions/clipped_ratio"] = None
    for row in partial:
        del row["completions/mean_length"]
    plot_dynamics(partial, [], path)
    png_size(path)


def test_nothing_is_written_while_there_is_nothing_to_draw(tmp_path):
    plot_dynamics([], HELDOUT, tmp_path / "dynamics.png")
    assert list(tmp_path.iterdir()) == []
