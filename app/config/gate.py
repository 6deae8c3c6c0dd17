"""What a candidate must show to be registered."""

from typing import Literal

from pydantic import Field

from app.config.section import NonNegativeFloat, Section

METRICS = ("auc", "accuracy", "precision", "recall", "f1")
"""The metrics of a binary outcome that a gate may name, each better when higher."""
CLASS_METRICS = ("macro_f1", "accuracy", "macro_precision", "macro_recall")
"""The same of several classes; `macro` is the mean over the classes, each counting the same."""
RANKING_METRICS = ("hr@10", "ndcg@10", "mrr")
"""Of a recommender: how far up each user's held-out item stands among all that the user has not had."""
RATING_METRICS = ("r2",)
"""Of explicit feedback, beside those: the share of the ratings' variance that is explained."""
Metric = Literal[
    "auc",
    "accuracy",
    "precision",
    "recall",
    "f1",
    "macro_f1",
    "macro_precision",
    "macro_recall",
    "hr@10",
    "ndcg@10",
    "mrr",
    "r2",
]


class Gate(Section):
    """What a candidate must show on the test part to be registered."""

    metric: Metric = "auc"
    """What is compared with the champion and the baselines."""
    minimum: dict[Metric, float] = Field({})
    """Minimum of each named metric on the test part."""
    beat: list[str] = Field(["constant"])
    """Baselines whose metric the candidate must exceed. Tabular models have constant, logistic_regression and
    gradient_boosting, text models constant and tfidf_logistic_regression, recommenders popularity, item_knn
    and ease."""
    tolerance: NonNegativeFloat = 0.0
    """How far below the champion's metric the candidate may be."""


class Evaluation(Section):
    """What else is looked at on the test part."""

    slices: list[str] = Field([])
    """Columns of categories: the metrics of the rows with each of their values, for the card. An input of the
    model or not."""


class Compression(Section):
    """`raylway compress`: an int8 version of a bundle."""

    max_loss: NonNegativeFloat = 0.01
    """How much of `gate.metric` it may lose on the test part."""
