import pytest

from app.config import Gate
from app.evaluation.comparison import Comparison, NotComparable
from app.evaluation.gate import decide

CANDIDATE = {"auc": 0.9, "accuracy": 0.8, "recall": 0.6}
BASELINES = {
    "constant": {"auc": 0.5, "accuracy": 0.76},
    "logistic_regression": {"auc": 0.89, "accuracy": 0.79},
    "gradient_boosting": {"auc": 0.92, "accuracy": 0.85},
}


def comparison(champion, candidate=CANDIDATE, num_rows=1000):
    return Comparison(candidate, champion, num_rows, num_test_rows=1000)


CHAMPION = comparison({"auc": 0.9, "accuracy": 0.81})


@pytest.mark.parametrize(
    ("gate", "champion", "reason"),
    [
        (Gate(), None, "auc 0.9000 (constant 0.5000, no champion yet)"),
        (Gate(beat=[]), None, "auc 0.9000 (no champion yet)"),
        (Gate(), CHAMPION, "auc 0.9000 (constant 0.5000, champion 0.9000)"),
        (
            Gate(metric="accuracy", beat=["constant", "logistic_regression"], tolerance=0.02),
            CHAMPION,
            "accuracy 0.8000 (constant 0.7600, logistic regression 0.7900, champion 0.8100)",
        ),
        (
            Gate(minimum={"auc": 0.9, "recall": 0.5}),
            None,
            "auc 0.9000 (constant 0.5000, no champion yet)",
        ),
    ],
)
def test_a_candidate_that_passes_has_the_compared_figures_as_reason(gate, champion, reason):
    decision = decide(gate, CANDIDATE, BASELINES, champion)
    assert decision.passed
    assert decision.reason == reason


@pytest.mark.parametrize(
    ("gate", "champion", "reason"),
    [
        (Gate(minimum={"recall": 0.7}), None, "recall 0.6000 is below the minimum 0.7000"),
        (Gate(beat=["gradient_boosting"]), None, "auc 0.9000 does not exceed gradient boosting's 0.9200"),
        (Gate(), comparison({"auc": 0.91}), "auc 0.9000 is below the champion's 0.9100"),
        (
            Gate(tolerance=0.005),
            comparison({"auc": 0.91}),
            "auc 0.9000 is below the champion's 0.9100 (tolerance 0.005)",
        ),
        (
            Gate(metric="accuracy", minimum={"auc": 0.95, "recall": 0.9}, beat=["gradient_boosting"]),
            CHAMPION,
            "auc 0.9000 is below the minimum 0.9500; recall 0.6000 is below the minimum 0.9000; "
            "accuracy 0.8000 does not exceed gradient boosting's 0.8500; "
            "accuracy 0.8000 is below the champion's 0.8100",
        ),
    ],
)
def test_a_candidate_that_fails_has_every_reason(gate, champion, reason):
    decision = decide(gate, CANDIDATE, BASELINES, champion)
    assert not decision.passed
    assert decision.reason == reason


def test_a_tie_with_a_baseline_fails_and_a_tie_with_the_champion_or_a_minimum_passes():
    score = {"auc": 0.5}
    assert not decide(Gate(beat=["constant"]), score, BASELINES, None).passed
    assert decide(Gate(beat=[], minimum={"auc": 0.5}), score, BASELINES, comparison(score, score)).passed


@pytest.mark.parametrize(("value", "passed"), [(0.75, True), (0.7500001, True), (0.7499, False)])
def test_the_tolerance_allows_a_distance_below_the_champion(value, passed):
    gate = Gate(beat=[], tolerance=0.25)
    assert decide(gate, {"auc": value}, {}, comparison({"auc": 1.0}, {"auc": value})).passed is passed


def test_a_metric_that_is_not_a_number_does_not_pass():
    for gate, champion in ((Gate(beat=["constant"]), None), (Gate(beat=[]), CHAMPION), (Gate(beat=[]), None)):
        assert not decide(gate, {"auc": float("nan")}, BASELINES, champion).passed
    nan = comparison({"auc": 0.5}, {"auc": float("nan")}, num_rows=300)
    assert not decide(Gate(beat=[]), CANDIDATE, {}, nan).passed


def test_candidate_and_champion_are_compared_by_their_scores_on_the_compared_rows():
    on_some_rows = comparison({"auc": 0.84}, {"auc": 0.85}, num_rows=300)
    rows = "on the 300 of 1,000 test rows that neither was trained on"
    decision = decide(Gate(beat=[]), CANDIDATE, {}, on_some_rows)
    assert decision.passed
    assert decision.reason == f"auc 0.9000 (champion 0.8400 and candidate 0.8500 {rows})"
    decision = decide(
        Gate(beat=[]), {"auc": 0.99}, {}, comparison({"auc": 0.86}, {"auc": 0.85}, num_rows=300)
    )
    assert not decision.passed
    assert decision.reason == f"auc 0.8500 is below the champion's 0.8600 {rows}"


def test_without_a_comparison_the_other_criteria_decide_and_the_reason_names_the_obstacle():
    not_comparable = NotComparable("its contract differs")
    decision = decide(Gate(), CANDIDATE, BASELINES, not_comparable)
    assert decision.passed
    assert decision.reason == (
        "auc 0.9000 (constant 0.5000); not compared with the champion: its contract differs"
    )
    decision = decide(Gate(minimum={"auc": 0.95}), CANDIDATE, BASELINES, not_comparable)
    assert not decision.passed
    assert decision.reason.endswith("0.9500; not compared with the champion: its contract differs")
