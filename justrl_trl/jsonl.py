"""JSON Lines: one JSON object per line."""

import json
from collections.abc import Iterable
from pathlib import Path


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_jsonl(path: Path, row: dict) -> None:
    """Add one row and hand it to the operating system, so that it survives the end of this process."""
    with path.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Replace a file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
