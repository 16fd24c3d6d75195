"""Store every finished response at once, so that an interrupted evaluation asks only for what is missing.

```
settings.json    what must be equal for two responses to be samples of the same thing; another evaluation is refused
samples.jsonl    one line per response, appended and synced when it arrives, never rewritten
verdicts.jsonl   the same for the answers of a verifier model
grades.jsonl     grade of each response; rewritten by every run
```

Responses cost GPU hours, grades cost seconds and graders change: so a grade is never kept with a response, and grading again
is the normal case. Verdicts cost GPU time too and are kept. `kill -9` can leave a torn last line behind. It is not read, cut
off before the next line is written, and its sample made again.

A line is read once to know what is there and once to grade it; texts are never all in memory.
"""

import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from justrl_trl.errors import JustRLError

Key = tuple[str, int, int]  # benchmark, problem, sample


class Asked(Protocol):
    """What is asked of a request: which sample it is, and a hash of its prompt."""

    key: Key
    prompt_hash: str


class StoreError(JustRLError, ValueError):
    """The folder cannot take or give the samples of this evaluation; the message says why and what to do."""


class Lines:
    """A JSONL file that only grows. What `append` has returned from survives `kill -9` and loss of power.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Whole rows, in order; a torn last line is not one.

        Raises:
            StoreError: for a line that cannot be read and is not the last one: no kill leaves such a thing behind.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                row = _row(line)
                if row is None and file.read(1):
                    raise StoreError(
                        f"{self.path}, line {number}: not a JSON object, though others follow ({line[:60]!r}...). The file was "
                        "damaged by something else than an interruption. Remove that line; its sample is then made again."
                    )
                if row is not None:
                    yield row

    def open(self) -> int:
        """Get ready to append, at the end of the last whole row.

        Returns:
            Bytes of a torn line that were cut off.
        """
        self._file = self.path.open("ab")
        size = self._file.tell()
        whole = _whole_bytes(self.path) if size else 0
        self._file.truncate(whole)
        return size - whole

    def append(self, row: dict[str, Any]) -> None:
        """One more row, on disk when this returns."""
        # lone surrogates are text that JSON can carry and UTF-8 cannot; json.loads reads them back the same way
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of a sample without its text."""

    prompt_hash: str
    tokens: int


class SampleStore:
    """The samples of one evaluation in one folder. Use as a context manager to write; reading needs nothing.

    Args:
        folder: need not exist.
        settings: plain values; all must equal those of `settings.json`, if there is one.

    Attributes:
        stored: what is there, by (benchmark, problem, sample).
        cut: bytes of torn lines that were cut off on entering.

    Raises:
        StoreError: settings differ, the file is damaged, or (on entering) another process writes to the folder.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))
        self.samples, self.verdicts = Lines(self.folder / "samples.jsonl"), Lines(self.folder / "verdicts.jsonl")
        self.stored: dict[Key, Stored] = {}
        self.cut = 0
        self._lock: BinaryIO | None = None
        self._read_bytes = -1
        self._check_settings()
        self._read()

    def __enter__(self) -> "SampleStore":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("wb")
        try:
            # a lock of this process, not of the file: processes that it forks and leaves behind do not hold it
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StoreError(
                f"Another process is writing samples to {self.folder} right now. Wait for it, or give another --output_dir."
            ) from error
        write_whole(self.folder / "settings.json", json.dumps(self.settings, indent=2) + "\n")
        self.cut = self.samples.open() + self.verdicts.open()
        _sync_folder(self.folder)
        if self._read_bytes != self.samples.path.stat().st_size:
            self._read()  # another process added some before the lock was ours, or a torn line is gone
        return self

    def __exit__(self, *error) -> None:
        self.samples.close()
        self.verdicts.close()
        self._lock.close()

    def missing(self, requests: Iterable[Asked]) -> list:
        """Those of the requests that have no sample yet, in their order.

        Raises:
            StoreError: a sample answers another prompt than the request.
        """
        requests = list(requests)
        other = [one for one in requests if one.key in self.stored and self.stored[one.key].prompt_hash != one.prompt_hash]
        if other:
            name, problem, _ = other[0].key
            raise StoreError(
                f"{self.folder} has answers to another text of {name} problem {problem} ({len(other)} such samples): the "
                "problems, the chat template or the tokenizer have changed since. Give another --output_dir."
            )
        return [one for one in requests if one.key not in self.stored]

    def add(self, key: Key, prompt_hash: str, tokens: int, **rest: Any) -> None:
        """Append a finished sample and hand it to the operating system; a sample that is stored already is kept."""
        if key not in self.stored:
            self.samples.append({**_named(key), "prompt_hash": prompt_hash, "tokens": tokens, **rest})
            self.stored[key] = Stored(prompt_hash, tokens)

    def rows(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """All samples with their texts, one at a time, in the order in which they came."""
        seen = set()
        for row in self.samples:
            if (key := _key(row)) not in seen:
                seen.add(key)
                yield key, row

    def _check_settings(self) -> None:
        path = self.folder / "settings.json"
        if not self.samples.path.exists() or not self.samples.path.stat().st_size:
            return  # an evaluation without samples may change its settings
        if not path.exists():
            raise StoreError(
                f"{self.folder} has samples but no settings.json, so it is unknown how they were sampled. Give another "
                "--output_dir, or put the file back."
            )
        try:
            there = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise StoreError(f"{path} cannot be read ({error}). Put it back, or give another --output_dir.") from error
        names = [name for name in {**there, **self.settings} if there.get(name) != self.settings.get(name)]
        if names:
            differ = "; ".join(f"{name} is {there.get(name)!r} there and {self.settings.get(name)!r} here" for name in names)
            raise StoreError(
                f"{self.folder} holds the samples of another evaluation: {differ}. Samples of the two cannot be mixed. Give "
                f"another --output_dir, or repeat the settings of {path}."
            )

    def _read(self) -> None:
        self._read_bytes = self.samples.path.stat().st_size if self.samples.path.exists() else -1
        for row in self.samples:
            try:
                self.stored.setdefault(_key(row), Stored(row["prompt_hash"], row["tokens"]))
            except KeyError as error:
                raise StoreError(
                    f"{self.samples.path} has a row without {error}: it is not the file of an evaluation. Give another "
                    "--output_dir."
                ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync_folder(folder: Path) -> None:
    """New names are on disk too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _named(key: Key) -> dict[str, Any]:
    return dict(zip(("benchmark", "problem", "sample"), key, strict=True))


def _key(row: dict[str, Any]) -> Key:
    return row["benchmark"], row["problem"], row["sample"]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a whole line, else None."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _whole_bytes(path: Path) -> int:
    """Where the last whole row of a file ends: before a line without its end, and before one of garbage."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
        start = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
        return end if end and _row(data[start:end]) is not None else start if end else 0
