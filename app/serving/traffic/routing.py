"""Assignment of units to variants by weighted rendezvous hashing: a pure function."""

from collections.abc import Mapping
from hashlib import blake2b
from math import log


def choose(unit: str, salt: str, weights: Mapping[str, float]) -> str:
    """The variant that answers `unit`: the same on every machine and after every restart.

    Each variant gets a share of the units in proportion to its weight, which must be above 0. If a weight is
    raised, units move only to that variant, and only as many as its new share needs. Another `salt` gives an
    independent assignment.

    The variant with the highest score -weight / ln(h) answers; h in (0, 1) is a hash of salt, variant and
    unit. This is rendezvous hashing (Thaler and Ravishankar, 1998) with the logarithmic weights of
    Schindelhauer and Schomaker, "Weighted Distributed Hash Tables" (SPAA 2005).
    """
    return max(weights, key=lambda variant: -weights[variant] / log(_uniform(salt, variant, unit)))


def _uniform(salt: str, variant: str, unit: str) -> float:
    # The lengths are part of the key: without them, ("a", "bc") and ("ab", "c") would have the same hash.
    key = f"{len(salt)}:{salt}{len(variant)}:{variant}{unit}".encode()
    # 52 bits plus one half are exact in a float64. The result is neither 0, which has no logarithm, nor 1,
    # whose logarithm is 0 and cannot be a divisor.
    return ((int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 12) + 0.5) / 2**52
