import io

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from app.console import Console
from app.jobs import sweep_view
from app.tuning.progress import Progress, Running

RATE = {"training.learning_rate": FloatDistribution(0, 1)}


def trial(number: int, state: TrialState, value: float | None = None, **attributes):
    created = create_trial(
        state=state,
        value=value,
        params={"training.learning_rate": 0.123456},
        distributions=RATE,
        user_attrs=attributes,
    )
    created.number = number
    return created


def progress(*trials, num_earlier: int = 0) -> Progress:
    return Progress("study", 5, ["auc"], ["maximize"], list(trials), num_earlier=num_earlier)


COMPLETE = trial(0, TrialState.COMPLETE, 0.9)
PRUNED = trial(1, TrialState.PRUNED)
FAILED = trial(2, TrialState.FAIL, error="out of memory")


def test_summary_counts_trials():
    assert sweep_view.summary(progress(COMPLETE)) == "1 of 5 trials"
    assert sweep_view.summary(progress(COMPLETE, PRUNED, FAILED)) == "3 of 5 trials, 1 pruned, 1 failed"


def test_costs_are_no_validation_metrics():
    two = create_trial(values=[0.91234, 12.345])
    assert sweep_view.describe_values(two, ["auc", "latency_ms"]) == "validation auc 0.9123, latency_ms 12.3"


def test_without_a_terminal_each_new_trial_is_a_line():
    stream = io.StringIO()
    with sweep_view.watching(Console(stream)) as watch:
        watch(progress(COMPLETE, num_earlier=1))
        watch(progress(COMPLETE, PRUNED, num_earlier=1))
        watch(progress(COMPLETE, PRUNED, FAILED, num_earlier=1))
    assert [line.strip() for line in stream.getvalue().splitlines()] == [
        "trial 1 (2/5) pruned     learning_rate=0.123",
        "trial 2 (3/5) fail     out of memory  learning_rate=0.123",
    ]


def test_the_table_has_the_best_and_the_running_trials():
    current = progress(COMPLETE, PRUNED)
    current.running[3] = Running({"model.kind": "mlp"}, epochs=2)
    stream = io.StringIO()
    Console(stream).print(sweep_view._table(current))
    output = stream.getvalue()
    assert "study: 2 of 5 trials, 1 pruned, about 0 s left" in output
    assert "best" in output
    assert "0.9000" in output
    assert "kind=mlp" in output


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations(seconds, text):
    assert sweep_view._describe_duration(seconds) == text
