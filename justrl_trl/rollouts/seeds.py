"""Sampling seeds: every response of a run has its own, and other runs and purposes have others.

vLLM gives response k of a request with seed s the seed s + k, so requests whose seeds are less than n apart would sample the
same random numbers for several of their responses.
"""

import hashlib

SEEDS = 2**31  # what vLLM and every random generator below it take


def seed_for(*what: int | str) -> int:
    """A seed below 2^31 for what is named, e.g. `seed_for(1, "aime24", 3, 0)`; names that differ in anything have unrelated
    seeds, also where only the run's seed differs by one."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest()) % SEEDS


def request_seeds(base: int, requests: int, n: int) -> list[int]:
    """Seeds of consecutive requests for `n` responses each: all `requests x n` responses have different ones."""
    return [(base + index * n) % SEEDS for index in range(requests)]
