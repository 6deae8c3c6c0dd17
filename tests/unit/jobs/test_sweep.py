from pathlib import Path

from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from app.jobs import sweep
from app.jobs.sweep import SweepResult
from app.registry.sweep_runs import CurvePoint

HISTORY = [{"epoch": 0, "auc": 0.5}, {"epoch": 1, "auc": 0.6}]


def trial(state=TrialState.COMPLETE, value=0.6, intermediate=None, **attributes):
    return create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params={"rate": 0.1},
        distributions={"rate": FloatDistribution(0, 1)},
        intermediate_values=intermediate or {},
        user_attrs=attributes,
    )


def test_the_curves_of_one_fold_and_of_several():
    assert sweep._curves(trial(history=[HISTORY]), ["auc"]) == [
        CurvePoint("auc", 0, 0.5),
        CurvePoint("auc", 1, 0.6),
    ]
    names = [point.metric for point in sweep._curves(trial(history=[HISTORY, HISTORY]), ["auc"])]
    assert names == ["auc_fold_0", "auc_fold_0", "auc_fold_1", "auc_fold_1"]


def test_a_trial_without_a_history_has_the_curve_of_its_intermediate_values():
    pruned = trial(TrialState.PRUNED, intermediate={1: 0.4, 2: 0.5})
    assert sweep._curves(pruned, ["auc"]) == [CurvePoint("auc", 0, 0.4), CurvePoint("auc", 1, 0.5)]


def test_the_point_of_a_trial_may_have_changed():
    assert sweep.point_of(trial()) == {"rate": 0.1}
    assert sweep.point_of(trial(point={"rate": 0.3})) == {"rate": 0.3}


def test_the_table_of_a_result():
    complete, failed = trial(epochs=3, core_seconds=2.0), trial(TrialState.FAIL)
    complete.number, failed.number = 1, 0
    result = SweepResult("study", ["auc"], [complete, failed], [complete], [], [], Path("report.html"))
    table = result.table()
    assert table.index.tolist() == [0, 1]
    assert table.loc[1].to_dict() == {
        "state": "complete", "auc": 0.6, "epochs": 3, "core_seconds": 2.0, "rate": 0.1,
    }  # fmt: skip
    assert table.loc[0, "state"] == "fail"
