"""The baselines of a tabular model: a constant, a logistic regression and gradient boosting."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from app.config import Project
from app.data.features import MISSING
from app.data.prepare import LABEL
from app.evaluation import metrics
from app.tasks.tabular.task import Task


def baselines(task: Task) -> dict[str, dict[str, float]]:
    """See `app.tasks.baselines_of`.

    scikit-learn's models take the raw columns and preprocess them on their own, so that they reveal a loss of
    information in our preprocessing.
    """
    project, train, test = task.project, task.prepared.frame("train"), task.prepared.frame("test")
    y_train, y_test = train[LABEL].to_numpy(), test[LABEL].to_numpy()
    x_train, x_test = (_columns(frame, project) for frame in (train, test))
    scores = {"constant": metrics.evaluate_binary(y_test, np.full(len(y_test), y_train.mean()))}
    for name, model in _models(project, x_train).items():
        # OpenMP's threads spin while they wait for each other: on busy cores a fit takes 15 times as long.
        with threadpool_limits(1):
            model.fit(x_train, y_train)
            scores[name] = metrics.evaluate_binary(y_test, model.predict_proba(x_test)[:, 1])
    return scores


def _columns(frame: pd.DataFrame, project: Project) -> pd.DataFrame:
    """The columns of the features, with MISSING for a missing category."""
    categories = [name for name in project.features if project.data.columns[name].type == "category"]
    filled = {name: frame[name].fillna(MISSING) for name in categories}
    return frame[list(project.features)].assign(**filled)


def _models(project: Project, train: pd.DataFrame) -> Mapping[str, Any]:
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    numbers = [name for name in project.features if project.data.columns[name].type == "number"]
    categories = [name for name in project.features if name not in numbers]
    not_empty = [name for name in numbers if train[name].notna().any()]
    scaled = make_column_transformer(
        (make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler()), numbers),
        (OneHotEncoder(handle_unknown="ignore"), categories),
    )
    indices = OrdinalEncoder(
        handle_unknown="use_encoded_value", unknown_value=np.nan, max_categories=250, dtype=np.float64
    )
    ordinal = make_column_transformer(("passthrough", not_empty), (indices, categories))
    is_category = [False] * len(not_empty) + [True] * len(categories)
    boosting = HistGradientBoostingClassifier(categorical_features=is_category, random_state=project.seed)
    return {
        "logistic_regression": make_pipeline(scaled, LogisticRegression(max_iter=1000)),
        "gradient_boosting": make_pipeline(ordinal, boosting),
    }
