"""The gate: may a candidate be registered? A pure decision, with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.config import Gate


@dataclass(frozen=True)
class Decision:
    """What the gate says of a candidate."""

    passed: bool
    reason: str
    """One line: what was decisive, in figures."""


def decide(
    gate: Gate,
    candidate: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
    champion: Mapping[str, float] | None,
) -> Decision:
    """Hold a candidate's metrics against the gate.

    All metrics are of the same test part; `champion` is None where none is registered yet.
    """
    name = gate.metric
    value = candidate[name]
    faults = [
        f"{metric} {candidate[metric]:.4f} is below the minimum {least:.4f}"
        for metric, least in gate.minimum.items()
        if not candidate[metric] >= least
    ]
    faults += [
        f"{name} {value:.4f} does not exceed {other.replace('_', ' ')}'s {baselines[other][name]:.4f}"
        for other in gate.beat
        if not value > baselines[other][name]
    ]
    if champion is not None and not value >= champion[name] - gate.tolerance:
        allowed = f" (tolerance {gate.tolerance:g})" if gate.tolerance else ""
        faults.append(f"{name} {value:.4f} is below the champion's {champion[name]:.4f}{allowed}")
    if faults:
        return Decision(False, "; ".join(faults))
    held = [f"{other.replace('_', ' ')} {baselines[other][name]:.4f}" for other in gate.beat]
    held.append(f"champion {champion[name]:.4f}" if champion else "no champion yet")
    return Decision(True, f"{name} {value:.4f} against {', '.join(held)}")
