"""The gate: the pure decision whether a candidate may be registered, and its reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.config import Gate
from app.evaluation.comparison import Comparison, NotComparable


@dataclass(frozen=True)
class Decision:
    """The gate's decision about a candidate."""

    passed: bool
    reason: str
    """One line with the decisive figures and, if the champion was not compared, the reason."""


def decide(
    gate: Gate,
    candidate: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
    champion: Comparison | NotComparable | None,
) -> Decision:
    """Decide whether a candidate's metrics meet the gate.

    `candidate` and `baselines` are metrics of the whole test part. `champion` is None if no version is
    registered yet. A champion that cannot be compared does not stop a candidate that meets the other
    criteria: the candidate becomes the challenger, and the reason states that it was not compared.
    """
    name = gate.metric
    value = candidate[name]
    faults = [] if math.isfinite(value) else [f"{name} is {value}, not a number"]
    faults += [
        f"{metric} {candidate[metric]:.4f} is below the minimum {minimum:.4f}"
        for metric, minimum in gate.minimum.items()
        if not candidate[metric] >= minimum
    ]
    references = []
    for baseline in gate.beat:
        title, score = baseline.replace("_", " "), baselines[baseline][name]
        references.append(f"{title} {score:.4f}")
        if not value > score:
            faults.append(f"{name} {value:.4f} does not exceed {title}'s {score:.4f}")
    note = ""
    match champion:
        case None:
            references.append("no champion yet")
        case NotComparable(reason):
            note = f"; not compared with the champion: {reason}"
        case Comparison():
            fault, reference = _against_champion(gate, champion)
            faults += [fault] if fault else []
            references.append(reference)
    if faults:
        return Decision(False, "; ".join(faults) + note)
    compared = f" ({', '.join(references)})" if references else ""
    return Decision(True, f"{name} {value:.4f}{compared}{note}")


def _against_champion(gate: Gate, comparison: Comparison) -> tuple[str, str]:
    """A fault if the candidate is worse than the tolerance allows, else ""; and the champion's figure."""
    name = gate.metric
    candidate, champion = comparison.candidate[name], comparison.champion[name]
    rows = ""
    reference = f"champion {champion:.4f}"
    if comparison.num_rows < comparison.num_test_rows:
        counts = f"{comparison.num_rows:,} of {comparison.num_test_rows:,}"
        rows = f" on the {counts} test rows that neither was trained on"
        reference += f" and candidate {candidate:.4f}{rows}"
    if candidate >= champion - gate.tolerance:
        return "", reference
    tolerance = f" (tolerance {gate.tolerance:g})" if gate.tolerance else ""
    return f"{name} {candidate:.4f} is below the champion's {champion:.4f}{rows}{tolerance}", reference
