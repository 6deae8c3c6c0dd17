"""The gate: may a candidate be registered? A pure decision, with its reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.config import Gate
from app.evaluation.comparison import Comparison, NotComparable


@dataclass(frozen=True)
class Decision:
    """What the gate says of a candidate."""

    passed: bool
    reason: str
    """One line: what was decisive, in figures; and why there was no comparison with a champion, if so."""


def decide(
    gate: Gate,
    candidate: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
    champion: Comparison | NotComparable | None,
) -> Decision:
    """Hold a candidate's metrics against the gate.

    `candidate` and `baselines` are metrics of the whole test part. `champion` is None where no version is
    registered yet. A champion that cannot be compared does not stop a candidate that meets the other
    criteria: it becomes the challenger, and the reason says that it was not compared.
    """
    name = gate.metric
    value = candidate[name]
    faults = [] if math.isfinite(value) else [f"{name} is {value}, not a number"]
    faults += [
        f"{metric} {candidate[metric]:.4f} is below the minimum {least:.4f}"
        for metric, least in gate.minimum.items()
        if not candidate[metric] >= least
    ]
    faults += [
        f"{name} {value:.4f} does not exceed {other.replace('_', ' ')}'s {baselines[other][name]:.4f}"
        for other in gate.beat
        if not value > baselines[other][name]
    ]
    held = [f"{other.replace('_', ' ')} {baselines[other][name]:.4f}" for other in gate.beat]
    note = ""
    match champion:
        case None:
            held.append("no champion yet")
        case NotComparable(reason):
            note = f"; not compared with the champion: {reason}"
        case Comparison(ours, theirs, num_rows, num_test_rows):
            among = ""
            if num_rows < num_test_rows:
                among = f" on the {num_rows:,} of {num_test_rows:,} test rows that neither was trained on"
            if not ours[name] >= theirs[name] - gate.tolerance:
                allowed = f" (tolerance {gate.tolerance:g})" if gate.tolerance else ""
                faults.append(
                    f"{name} {ours[name]:.4f} is below the champion's {theirs[name]:.4f}{among}{allowed}"
                )
            beside = f" to {ours[name]:.4f}{among}" if among else ""
            held.append(f"champion {theirs[name]:.4f}{beside}")
    if faults:
        return Decision(False, "; ".join(faults) + note)
    against = f" against {', '.join(held)}" if held else ""
    return Decision(True, f"{name} {value:.4f}{against}{note}")
