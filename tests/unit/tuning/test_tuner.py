"""Results that a sweep derives from stored trials: the best, rungs, planned points, and the report."""

import pytest
from optuna import create_study, create_trial
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import TrialScheduler

from app.tuning import progress, report, scheduler, tuner
from app.tuning.plan import PlannedPoint, planned_points
from app.tuning.search import Search, state_of
from app.tuning.space import Space
from tests.unit.tuning.test_space import HIDDEN, RATE, project

SPACE = {"training.learning_rate": RATE, "model.hidden": HIDDEN}


def trial(number: int, values: list[float] | None, state: str = "COMPLETE", **facts) -> FrozenTrial:
    params = {"training.learning_rate": 0.01 * (number + 1), "model.hidden": "[8]"}
    distributions = {
        "training.learning_rate": FloatDistribution(0.001, 0.1, log=True),
        "model.hidden": CategoricalDistribution(["[8]", "[16, 16]"]),
    }
    stored = create_trial(
        state=TrialState[state],
        values=values,
        params=params,
        distributions=distributions,
        intermediate_values=facts.pop("steps", {}),
        user_attrs={"core_seconds": 1.0, **facts},
    )
    stored.number = number
    return stored


# The best


def test_the_best_of_one_objective_is_the_first_of_equals():
    trials = [trial(0, [0.5]), trial(1, [0.9]), trial(2, [0.9]), trial(3, None, "PRUNED")]
    assert [t.number for t in progress.best_of(trials, ["maximize"])] == [1]
    assert [t.number for t in progress.best_of(trials, ["minimize"])] == [0]
    assert progress.best_of(trials[3:], ["maximize"]) == []


def test_the_best_of_several_objectives_are_the_pareto_front():
    values = [(0.9, 5.0), (0.8, 1.0), (0.7, 2.0), (0.9, 6.0), (0.9, 5.0)]
    trials = [trial(i, list(v)) for i, v in enumerate(values)]
    assert [t.number for t in progress.best_of(trials, ["maximize", "minimize"])] == [0, 1, 4]
    ranked = [t.number for t in progress.ranked(trials, ["maximize", "minimize"])]
    assert ranked == [0, 4, 1, 3, 2]


@pytest.mark.parametrize(
    ("result", "error", "state"),
    [
        ({"finished": True}, False, "COMPLETE"),
        ({"epochs": 1}, False, "PRUNED"),
        (None, False, "PRUNED"),
        ({"failed": "it diverged"}, False, "FAIL"),
        ({"epochs": 1}, True, "FAIL"),
        (None, True, "FAIL"),
    ],
)
def test_the_end_of_a_trial_is_described(result, error, state):
    assert state_of(result, error).name == state


# Resuming


def test_successive_halving_restores_the_rungs_of_stored_trials():
    space = Space(project(SPACE, scheduler={"kind": "asha", "reduction_factor": 2}))
    stored = [trial(i, [v], steps={1: v, 2: v}) for i, v in enumerate((0.6, 0.7, 0.8, 0.9))]
    fresh, informed = scheduler.scheduler_of(space.sweep), scheduler.scheduler_of(space.sweep)
    scheduler.restore_rungs(informed, stored, space.sweep)
    new = scheduler.StoredTrial("new")
    assert fresh._brackets[0].on_result(new, 1, 0.5) == TrialScheduler.CONTINUE
    assert informed._brackets[0].on_result(new, 1, 0.5) == TrialScheduler.STOP
    assert informed._brackets[0].on_result(scheduler.StoredTrial("good"), 1, 0.95) == TrialScheduler.CONTINUE


def test_interrupted_trials_come_first_then_listed_points_that_were_not_tried():
    tried = trial(0, [0.9])
    waiting = trial(1, None, "RUNNING")
    waiting.state = TrialState.WAITING
    points = [{"training.learning_rate": 0.01}, {"training.learning_rate": 0.05}, {"model.hidden": [16, 16]}]
    plan = planned_points(Space(project(SPACE, points=points)), [tried, waiting])
    assert plan == [
        PlannedPoint(waiting.params, 1),
        PlannedPoint({"training.learning_rate": 0.05}),
        PlannedPoint({"model.hidden": "[16, 16]"}),
    ]


def test_a_grid_plans_the_points_that_were_not_tried():
    grid = {"model.hidden": HIDDEN, "training.batch_size": {"type": "choice", "values": [8, 16]}}
    space = Space(project(grid, search="grid", constraints=["training.batch_size * len(model.hidden) < 32"]))
    tried = create_trial(
        values=[0.5],
        params={"model.hidden": "[8]", "training.batch_size": 8},
        distributions={
            "model.hidden": CategoricalDistribution(["[8]", "[16, 16]"]),
            "training.batch_size": CategoricalDistribution([8, 16]),
        },
    )
    assert [p.point for p in planned_points(space, [tried])] == [
        {"model.hidden": "[8]", "training.batch_size": 16},
        {"model.hidden": "[16, 16]", "training.batch_size": 8},
    ]


class Stored:
    """A study that stores nothing."""

    def begin(self, *_) -> int:
        return 0


@pytest.mark.parametrize("search", ["tpe", "gp", "cmaes", "random"])
def test_points_follow_the_seed_of_the_sweep_or_else_of_the_project(search):
    def drawn(of_project: int, **sweep) -> list[dict]:
        space = Space(project(SPACE, search=search, **sweep).model_copy(update={"seed": of_project}))
        searching = Search(space, Stored(), [], [], lambda: True)
        return [searching.suggest(str(number)) for number in range(3)]

    assert drawn(1) == drawn(1) == drawn(7, seed=1)
    assert drawn(1) != drawn(2)
    assert drawn(1) != drawn(1, seed=2)


def test_swept_settings_and_those_without_effect_are_not_shared_settings():
    plain = project(SPACE)
    facts = tuner.shared_settings(Space(plain))
    for change in ({"learning_rate": 0.9}, {"max_failures": 9}, {"num_cpus": 0.5}):
        training = plain.training.model_copy(update=change)
        assert tuner.shared_settings(Space(plain.model_copy(update={"training": training}))) == facts
    more = plain.sweep.model_copy(update={"trials": 99, "search": "random", "seed": 3})
    assert tuner.shared_settings(Space(plain.model_copy(update={"sweep": more}))) == facts
    for other in (
        plain.model_copy(update={"seed": 5}),
        project(SPACE, folds=3),
        project(SPACE, constraints=["seed < 9"]),
    ):
        assert tuner.shared_settings(Space(other)) != facts


# The page


def page(trials: list[FrozenTrial], objectives: list[str], directions: list[str]) -> str:
    study = create_study(study_name="<b>s</b>", directions=directions)
    study.add_trials(trials)
    return report.page(study, objectives)


def test_the_page_has_every_trial_and_escapes_names_and_errors():
    trials = [trial(i, [0.5 + i / 10], steps={1: 0.4}) for i in range(5)]
    trials += [
        trial(5, None, "PRUNED", steps={1: 0.1}),
        trial(6, None, "FAIL", error="<script>alert()</script>"),
    ]
    html = page(trials, ["auc"], ["maximize"])
    for title in ("History", "Importance of parameters", "Parallel coordinates", "Slices", "Curves", "Cost"):
        assert f"<h2>{title}</h2>" in html
    table = html[html.index("<table>") :]
    assert table.count("<tr") == 1 + 7
    assert table.count("class='best'") == 1
    assert "<script>alert" not in html
    assert "<b>s</b>" not in html


def test_the_page_of_several_objectives_has_a_pareto_front():
    trials = [trial(i, [0.5 + i / 10, 5.0 - i]) for i in range(5)]
    html = page(trials, ["auc", "size_mb"], ["maximize", "minimize"])
    assert "<h2>Pareto front</h2>" in html
    assert "<h2>Slices of size_mb</h2>" in html
    assert "<h2>Curves</h2>" not in html


def test_a_study_without_a_complete_trial_has_a_page():
    assert "<h2>Trials</h2>" in page([trial(0, None, "FAIL", error="no")], ["auc"], ["maximize"])
    assert "<h2>Trials</h2>" in page([], ["auc"], ["maximize"])
