"""Which variant answers a unit: weighted rendezvous hashing, a pure function."""

from collections.abc import Mapping
from hashlib import blake2b
from math import log


def choose(unit: str, salt: str, weights: Mapping[str, float]) -> str:
    """The variant that answers `unit`: the same on every machine and after every restart.

    A variant gets a share of the units in proportion to its weight (above 0). Raising one weight moves units
    to that variant only, and no more of them than the new shares need. Another `salt` shuffles all units
    anew, independently of the old one.

    Each variant scores -weight / ln(h), where h in (0, 1) is a hash of salt, variant and unit, and the
    highest score wins: rendezvous hashing (Thaler and Ravishankar, 1998) with the logarithmic weights of
    Schindelhauer and Schomaker, "Weighted Distributed Hash Tables" (SPAA 2005).
    """
    return max(weights, key=lambda variant: -weights[variant] / log(_uniform(salt, variant, unit)))


def _uniform(salt: str, variant: str, unit: str) -> float:
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    key = f"{len(salt)}:{salt}{len(variant)}:{variant}{unit}".encode()
    # 52 bits and a half: never exactly 0 or 1, and exact in a float.
    return ((int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 12) + 0.5) / 2**52
