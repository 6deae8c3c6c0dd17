"""Rules that connect the model of a project with its other sections."""

import copy

import pytest
from pydantic import ValidationError

from app.config import FAMILIES, Gate, Project, family_of
from tests import bundles
from tests.unit.tasks.recommender.example import PROJECT

RATINGS = {**PROJECT["model"], "feedback": "explicit"}


def project(**changes) -> Project:
    return Project.model_validate({**copy.deepcopy(PROJECT), **changes})


def test_every_kind_belongs_to_one_family():
    kinds = [kind for family in FAMILIES.values() for kind in family]
    assert len(set(kinds)) == len(kinds)
    assert family_of(project().model) == "recommender"
    assert family_of(Project.model_validate(bundles.PROJECT).model) == "tabular"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"stars": {"encode": "min_max"}}}, "features: model.kind mf takes none"),
        ({"model": {"kind": "linear"}}, "data.label: model.kind linear needs one"),
        ({"gate": {"metric": "auc"}}, "gate.metric: with model.kind mf, must be one of hr@10, ndcg@10, mrr"),
        (
            {"gate": {"metric": "hr@10", "beat": ["constant"]}},
            "gate.beat: with model.kind mf, must be one of popularity, item_knn, ease; it is 'constant'",
        ),
        ({"gate": {"metric": "r2"}}, "gate.metric: with model.kind mf, must be"),
        ({"model": RATINGS, "gate": {"metric": "r2", "beat": ["ease"]}}, "gate.beat: no baseline has 'r2'"),
        ({"data": {**PROJECT["data"], "split": {"seed": 3}}}, "data.split: model.kind mf takes none"),
        ({"evaluation": {"slices": ["who"]}}, "evaluation.slices: model.kind mf takes none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_section_that_does_not_fit_a_recommender_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        project(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "nobody"}, "data.interactions.user: 'nobody' must be a category"),
        ({"item": "stars"}, "data.interactions.item: 'stars' must be a category"),
        ({"rating": "what"}, "data.interactions.rating: 'what' must be a number"),
    ],
)
def test_the_columns_of_interactions_must_be_in_the_contract(changes, message):
    data = copy.deepcopy(PROJECT["data"])
    data["interactions"].update(changes)
    with pytest.raises(ValidationError, match=message):
        project(data=data)


def test_explicit_feedback_needs_ratings():
    data = copy.deepcopy(PROJECT["data"])
    del data["interactions"]["rating"]
    project(data=data)
    with pytest.raises(ValidationError, match="explicit feedback needs the column of ratings"):
        project(data=data, model=RATINGS)


def test_metrics_of_ratings_need_explicit_feedback():
    gate = {"metric": "r2", "beat": []}
    assert project(model=RATINGS, gate=gate).model.score == "r2"
    assert project().model.score == "hr@10"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_of_keys_names_every_baseline(family):
    for kind in FAMILIES[family]:
        for baseline in kind.model_construct(feedback="implicit").baselines:
            assert baseline in Gate.model_fields["beat"].description
