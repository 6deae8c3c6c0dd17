"""Search spaces: their points, the project of each point, and refusals."""

import datetime
import functools
from random import Random

import optuna
import pytest
from pydantic import ValidationError

from app.config import Project, projectfile
from app.errors import UserError
from app.tuning.space import Space

RATE = {"type": "float", "low": 0.001, "high": 0.1, "log": True}
HIDDEN = {"type": "choice", "values": [[8], [16, 16]]}


@functools.cache
def smoke() -> dict:
    return projectfile.load("configs/smoke.yaml").model_dump(mode="json", exclude_unset=True)


def project(space: dict, **sweep) -> Project:
    """The smoke project with a sweep."""
    document = smoke()
    return Project.model_validate({**document, "sweep": {"space": space, **sweep}})


def space(parameters: dict, **sweep) -> Space:
    return Space(project(parameters, **sweep))


def drawn(swept: Space, count: int = 50) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [dict(swept.suggest(study.ask())) for _ in range(count)]


# Points


def test_a_point_has_a_value_within_each_range():
    points = drawn(space({
        "training.learning_rate": RATE,
        "training.batch_size": {"type": "int", "low": 8, "high": 64, "step": 8},
        "model.hidden": HIDDEN,
        "model.dropout": {"type": "float", "low": 0.0, "high": 0.4, "step": 0.2},
    }))  # fmt: skip
    assert all(0.001 <= p["training.learning_rate"] <= 0.1 for p in points)
    assert {p["training.batch_size"] for p in points} <= set(range(8, 65, 8))
    assert {p["model.hidden"] for p in points} == {"[8]", "[16, 16]"}, "Optuna stores no lists"
    assert {round(p["model.dropout"], 6) for p in points} == {0.0, 0.2, 0.4}


def test_a_point_makes_the_project_with_its_values():
    swept = space({"training.learning_rate": RATE, "model.hidden": HIDDEN})
    point_project = swept.project({"training.learning_rate": 0.05, "model.hidden": "[16, 16]"})
    assert point_project.training.learning_rate == 0.05
    assert point_project.model.hidden == [16, 16]
    before = projectfile.load("configs/smoke.yaml")
    assert point_project.data == before.data
    assert point_project.training.epochs == before.training.epochs
    assert point_project.sweep is None


def test_a_whole_branch_can_be_chosen_without_leftovers_of_the_old_one():
    branches = [{"kind": "linear"}, {"kind": "tabm", "hidden": [8], "members": 2}]
    swept = space({"model": {"type": "choice", "values": branches}})
    assert [swept.project(p).model.kind for p in swept.points()] == ["linear", "tabm"]


def test_a_parameter_is_left_out_if_its_condition_does_not_hold():
    scale = {"type": "choice", "values": [0.1, 0.2], "when": {"model.numbers.embed": "periodic"}}
    dropout = {"type": "choice", "values": [0.1, 0.3], "when": {"model.numbers.scale": [0.1, 0.5]}}
    embed = {"type": "choice", "values": ["none", "periodic"]}
    swept = space({"model.numbers.embed": embed, "model.numbers.scale": scale, "model.dropout": dropout})
    assert list(swept.points()) == [
        {"model.numbers.embed": "none"},
        {"model.numbers.embed": "periodic", "model.numbers.scale": 0.1, "model.dropout": 0.1},
        {"model.numbers.embed": "periodic", "model.numbers.scale": 0.1, "model.dropout": 0.3},
        {"model.numbers.embed": "periodic", "model.numbers.scale": 0.2},
    ]
    assert swept.size() == 4
    assert {frozenset(p) for p in drawn(swept)} == {frozenset(p) for p in swept.points()}


def test_a_condition_may_name_a_key_of_the_project_or_its_default():
    dropout = {"type": "choice", "values": [0.1, 0.2]}
    assert space({"model.dropout": {**dropout, "when": {"model.kind": "mlp"}}}).size() == 2
    assert space({"model.dropout": {**dropout, "when": {"training.backend": "ddp"}}}).size() == 1
    assert space({"model.dropout": {**dropout, "when": {"training.backend": "horovod"}}}).size() == 2
    assert space({"model.dropout": {**dropout, "when": {"model.members": 4}}}).size() == 1


def test_set_values_are_in_every_project():
    swept = space(
        {"training.learning_rate": RATE}, set={"training.num_workers": 1, "training.horovod.autotune": True}
    )
    assert swept.base.training.num_workers == 1
    assert swept.project({"training.learning_rate": 0.01}).training.horovod.autotune


@pytest.mark.parametrize(
    ("parameter", "size"),
    [
        ({"type": "int", "low": 1, "high": 10, "step": 3}, 4),
        ({"type": "int", "low": 1, "high": 10, "log": True}, 10),
        ({"type": "float", "low": 0.0, "high": 0.3, "step": 0.1}, 4),
        ({"type": "float", "low": 0.1, "high": 0.1, "step": 0.1}, 1),
        ({"type": "choice", "values": [1]}, 1),
        ({"type": "float", "low": 0.1, "high": 0.2}, None),
    ],
)
def test_size(parameter, size):
    assert space({"training.weight_decay": parameter}).size() == size


def test_a_large_space_is_not_counted_completely():
    numbers = {"type": "int", "low": 1, "high": 1000}
    swept = space({"training.batch_size": numbers, "training.epochs": numbers, "seed": numbers})
    assert swept.describe()[-1] == "size: more than 100,000 points"


def test_the_description_names_ranges_conditions_and_constraints():
    swept = space(
        {
            "training.learning_rate": RATE,
            "model.dropout": {"type": "float", "low": 0, "high": 0.5, "when": {"model.kind": "mlp"}},
        },
        constraints=["training.learning_rate < 0.05"],
    )
    assert swept.describe() == [
        "training.learning_rate: float from 0.001 to 0.1, logarithmic",
        'model.dropout: float from 0 to 0.5, when model.kind is "mlp"',
        "where training.learning_rate < 0.05",
        "size: unbounded, 2 parameters, 2 continuous ranges",
    ]


# Constraints


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        ("training.batch_size * training.num_workers <= 64", True),
        ("training.batch_size * training.num_workers < 64", False),
        ("len(model.hidden) == 1 and model.hidden[0] in (8, 16)", True),
        ("sum(model.hidden) / 2 > 100 or seed == 0", True),
        ("not training.backend == 'ddp'", True),
        ("1 <= training.epochs <= 2", False),
        ("features['marital-status'].encode == 'one_hot'", True),
        ("-training.epochs // 2 % 5 == 3", True),
        ("model.members == 3", True),  # an MLP has no members
        ("1 / seed > 0", True),  # cannot be evaluated with seed 0
    ],
)
def test_constraints(constraint, holds):
    swept = space({"training.learning_rate": RATE}, constraints=[constraint])
    assert swept.admits({"training.learning_rate": 0.01}) is holds


@pytest.mark.parametrize(
    "constraint",
    [
        "__import__('os').system('true') == 0",
        "(lambda: 1)() == 1",
        "[x for x in model.hidden] == []",
        "f'{seed}' == '0'",
        "open('x') == 1",
        "model.hidden.copy() == 1",
        "seed ** 9 > 1",
        "seed",
        "seed =",
        "(seed := 1) == 1",
    ],
)
def test_a_constraint_can_only_compute_and_compare(constraint):
    with pytest.raises(ValueError, match="constraints"):
        project({"training.learning_rate": RATE}, constraints=[constraint])


# What is refused


def refused(parameters: dict, **sweep) -> str:
    """The message with which a space is refused, by `check` or when the project is read."""
    with pytest.raises((UserError, ValueError)) as error:
        space(parameters, **sweep).check()
    return str(error.value)


def test_a_consistent_space_is_accepted():
    space({"training.learning_rate": RATE, "model.hidden": HIDDEN}, points=[{"model.hidden": [8]}]).check()


@pytest.mark.parametrize(
    ("parameters", "sweep", "why"),
    [
        ({}, {}, "at least 1"),
        ({"training.learning_rate": {**RATE, "low": 1}}, {}, "low must not be above high"),
        ({"training.learning_rate": {**RATE, "low": 0}}, {}, "above 0 with log"),
        ({"training.learning_rate": {**RATE, "step": 0.1}}, {}, "must be left out with log"),
        ({"model.hidden": {"type": "choice", "values": []}}, {}, "at least 1"),
        ({"model.hidden": {"type": "choice", "values": [[8], [8]]}}, {}, "listed twice"),
        ({"gate.tolerance": RATE}, {}, "cannot vary"),
        ({"sweep.trials": RATE}, {}, "cannot vary"),
        ({"training.learning_rat": RATE}, {}, "training.learning_rat"),
        ({"model.members": HIDDEN}, {}, "model.members"),
        ({"training.epochs.x": RATE}, {}, "is a value, so it has no keys"),
        ({"training.learning_rate": {**RATE, "low": 0.001, "high": 0.1, "when": {"model.dropout": 0}},
          "model.dropout": HIDDEN}, {}, "must be listed before it"),
        ({"model.dropout": {"type": "float", "low": 0.1, "high": 2}}, {}, "makes no valid project"),
        ({"model.hidden": {"type": "choice", "values": [[8], "wide"]}}, {}, "'model.hidden': 'wide'"),
        ({"training.learning_rate": RATE}, {"constraints": ["training.learning_rate > 1"]}, "none of"),
        ({"training.learning_rate": RATE}, {"constraints": ["model.kind > 1"]}, "cannot be evaluated"),
        ({"training.learning_rate": RATE}, {"points": [{"model.dropout": 0.1}]}, "a key of sweep.space"),
        ({"training.learning_rate": RATE}, {"points": [{"training.learning_rate": 5}]}, "points.0"),
        ({"training.learning_rate": RATE}, {"set": {"training.epochs": 0}}, "sweep.set"),
        ({"training.learning_rate": RATE}, {"search": "grid"}, "step"),
        ({"training.learning_rate": RATE}, {"objectives": ["speed"]}, "sweep.objectives"),
        ({"training.learning_rate": RATE}, {"objectives": ["auc", "auc"]}, "listed twice"),
        ({"training.learning_rate": RATE}, {"objectives": ["auc", "size_mb"], "target": 0.9}, "target"),
        ({"training.learning_rate": RATE}, {"objectives": ["auc", "size_mb"], "search": "cmaes"}, "cmaes"),
        ({"training.learning_rate": RATE},
         {"objectives": ["auc", "size_mb"], "scheduler": {"kind": "asha"}}, "needs a single objective"),
        ({"model.hidden": HIDDEN}, {"scheduler": {"kind": "pbt"}}, "changes parameters during training"),
        ({"training.learning_rate": RATE}, {"scheduler": {"kind": "pbt"}, "folds": 3}, "folds"),
    ],
)  # fmt: skip
def test_an_inconsistent_space_is_refused(parameters, sweep, why):
    assert why in refused(parameters, **sweep)


def test_a_project_without_a_sweep_is_refused_with_an_example():
    plain = project({"training.learning_rate": RATE}).model_copy(update={"sweep": None})
    with pytest.raises(UserError, match="space"):
        Space(plain)


# A search can try what `check` accepts


STEPS = {"type": "float", "low": 0.1, "high": 1.0, "step": 0.2}


@pytest.mark.parametrize(
    ("parameter", "values", "top"),
    [
        (STEPS, [0.1, 0.3, 0.5, 0.7, 0.9], 0.9),
        ({"type": "float", "low": 0.0, "high": 0.3, "step": 0.1}, [0.0, 0.1, 0.2, 0.3], 0.3),
        ({"type": "int", "low": 8, "high": 30, "step": 8}, [8, 16, 24], 24),
    ],
)
def test_a_range_ends_at_its_last_step(parameter, values, top):
    swept = space({"training.learning_rate": parameter})
    assert [p["training.learning_rate"] for p in swept.points()] == values
    assert swept.sweep.space["training.learning_rate"].top == top
    assert {round(p["training.learning_rate"], 6) for p in drawn(swept)} <= set(values)


@pytest.mark.parametrize(
    ("parameter", "value", "allowed"),
    [
        (STEPS, 0.5, True),
        (STEPS, 0.4, False),
        (STEPS, 1.0, False),
        ({"type": "int", "low": 8, "high": 64, "step": 8}, 12, False),
        ({"type": "int", "low": 8, "high": 64, "step": 8}, 64, True),
        ({"type": "int", "low": 8, "high": 64}, 8.0, False),
        ({"type": "int", "low": 0, "high": 64}, True, False),
        (RATE, 0.2, False),
        (RATE, "0.01", False),
        (RATE, float("nan"), False),
        (RATE, 10**400, False),
        ({"type": "choice", "values": [1, 2]}, True, False),
        ({"type": "choice", "values": [1, 2]}, 2, True),
        ({"type": "choice", "values": [[8], [16]]}, [16], True),
        ({"type": "choice", "values": ["a", "b"]}, {1, 2}, False),
    ],
)
def test_the_values_of_a_listed_point_must_be_in_their_ranges(parameter, value, allowed):
    swept = space({"training.batch_size": parameter}, points=[{"training.batch_size": value}])
    swept.project = lambda point: swept.base  # whether the project is valid or not
    if allowed:
        swept.check()
        return
    with pytest.raises(UserError, match=r"sweep\.points\.0\.training\.batch_size: must be "):
        swept.check()


def test_a_listed_point_is_checked_with_random_values_for_its_missing_parameters():
    """The values of the project are not used, because the search never tries them."""
    sizes = {"type": "int", "low": 64, "high": 128}
    parameters = {"training.batch_size": sizes, "training.epochs": {"type": "int", "low": 1, "high": 4}}
    limit = ["training.batch_size * training.epochs <= 128"]
    space(parameters, constraints=limit, points=[{"training.epochs": 1}]).check()
    with pytest.raises(UserError, match=r"sweep\.points\.0: .*breaks a constraint, whatever"):
        space(parameters, constraints=limit, points=[{"training.epochs": 4}]).check()


@pytest.mark.parametrize(
    ("parameter", "why"),
    [
        ({"type": "float", "low": -1e308, "high": 1e308}, "too far apart"),
        ({"type": "float", "low": 0, "high": 1, "step": 1e-15}, "step: 1e-15 is too small"),
        ({"type": "float", "low": 1e-5, "high": 2, "step": 1 / 3}, "too many digits"),
        ({"type": "int", "low": 0, "high": 10**30}, "high"),
        ({"type": "choice", "values": [[8], "[8]"]}, "listed twice"),
        ({"type": "choice", "values": [1.0, float("inf")]}, "finite numbers"),
        ({"type": "choice", "values": [datetime.date(2020, 1, 1)]}, "finite numbers"),
    ],
)
def test_a_range_that_a_search_cannot_handle_is_refused(parameter, why):
    with pytest.raises(ValidationError, match=why):
        space({"training.learning_rate": parameter})


@pytest.mark.parametrize(
    "constraint",
    [
        "max([]) < 1",
        "'a' * 10000000000 == 'b'",
        "[1] * 10000000000 == [1]",
    ],
)
def test_a_constraint_that_cannot_be_evaluated_is_refused(constraint):
    with pytest.raises(UserError, match=r"sweep\.constraints: .* cannot be evaluated"):
        space({"training.learning_rate": RATE}, constraints=[constraint]).check()


@pytest.mark.parametrize(
    "constraint", ["+".join(["1"] * 100_000) + " > 1", "1" * 5000 + " > 1", "(" * 300, "\0"]
)
def test_a_constraint_that_takes_long_to_parse_is_refused(constraint):
    with pytest.raises(ValidationError, match="constraints"):
        space({"training.learning_rate": RATE}, constraints=[constraint])


def random_parameter(random: Random) -> dict:
    bounds = sorted(
        random.choice([0, 1, 0.1, 0.3, 1e-5, 2, 7, 1e6, round(random.random(), 3)]) for _ in range(2)
    )
    match random.choice(["float", "int", "choice"]):
        case "float":
            step = {"step": random.choice([1, 0.1, 0.3, 7])} if random.random() < 0.5 else {}
            log = {"log": True} if not step and bounds[0] > 0 else {}
            return {"type": "float", "low": bounds[0], "high": bounds[1], **step, **log}
        case "int":
            low, high = int(bounds[0]), int(bounds[1])
            return {"type": "int", "low": low, "high": high, "step": random.choice([1, 2, 3, 7])}
    values = [1, 0.5, None, "a", [1], {"a": 1}]
    return {"type": "choice", "values": random.sample(values, random.randint(1, 4))}


def random_value(random: Random, parameter: dict):
    if parameter["type"] == "choice":
        return random.choice(parameter["values"])
    steps = random.randint(0, 3) * parameter.get("step", 0.5)
    return random.choice([parameter["low"] + steps, parameter["low"], parameter["high"], 1, 0.3])


@pytest.mark.filterwarnings("error")
def test_a_point_that_is_accepted_is_tried_as_it_is():
    random, accepted = Random(0), 0
    keys = ["training.learning_rate", "training.weight_decay", "model.dropout"]
    for _ in range(30):
        parameters = {key: random_parameter(random) for key in random.sample(keys, random.randint(1, 3))}
        first, *others = parameters
        if others and random.random() < 0.5:
            parameters[others[0]]["when"] = {first: random_value(random, parameters[first])}
        point = {k: random_value(random, p) for k, p in parameters.items() if random.random() < 0.8}
        swept = space(parameters, points=[point])
        swept.project = lambda point, swept=swept: swept.base  # whether the project is valid or not
        try:
            swept.check()
        except UserError:
            continue
        accepted += 1
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=1))
        encoded = swept.encode(point)
        for number in range(3):
            study.enqueue_trial(dict(encoded))
            trial = study.ask()
            tried = swept.suggest(trial)
            assert all(tried[key] == value for key, value in encoded.items() if key in tried)
            optuna.trial.create_trial(params=dict(tried), distributions=swept.distributions(tried), value=0.0)
            study.tell(trial, float(number))
    assert accepted > 10


def test_a_large_space_with_conditions_is_counted_quickly():
    numbers = {"type": "int", "low": 1, "high": 10**6}
    many = {"training.epochs": numbers, "training.batch_size": {**numbers, "when": {"model.dropout": 0.1}}}
    swept = space({"model.dropout": {"type": "choice", "values": [0.0, 0.1]}, **many})
    assert swept.describe()[-1] == "size: more than 100,000 points"
