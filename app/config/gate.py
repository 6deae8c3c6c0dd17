"""The sections `gate`, `evaluation` and `compression`: what a candidate must show on the test part."""

from typing import Literal, get_args

from pydantic import Field

from app.config.section import NonNegativeFloat, Section

BinaryMetric = Literal["auc", "accuracy", "precision", "recall", "f1"]
ClassMetric = Literal["macro_f1", "accuracy", "macro_precision", "macro_recall"]
RankingMetric = Literal["hr@10", "ndcg@10", "mrr"]
RatingMetric = Literal["r2"]
Metric = Literal[BinaryMetric, ClassMetric, RankingMetric, RatingMetric]
"""A metric that a gate may name; higher is better."""

BINARY_METRICS: tuple[str, ...] = get_args(BinaryMetric)
"""Metrics of a binary outcome."""
CLASS_METRICS: tuple[str, ...] = get_args(ClassMetric)
"""Metrics of several classes; `macro` is the unweighted mean over the classes."""
RANKING_METRICS: tuple[str, ...] = get_args(RankingMetric)
"""Metrics of a recommender, by the rank of each user's held-out item among all items that are new to the
user."""
RATING_METRICS: tuple[str, ...] = get_args(RatingMetric)
"""Further metrics of explicit feedback: `r2`, the explained share of the ratings' variance."""


class Gate(Section):
    """What a candidate must show on the test part to be registered."""

    metric: Metric = "auc"
    """Metric that is compared with the champion and the baselines."""
    minimum: dict[Metric, float] = Field({})
    """Minimum of each named metric on the test part."""
    beat: list[str] = Field(["constant"])
    """Baselines whose metric the candidate must exceed. Tabular models have constant, logistic_regression and
    gradient_boosting, text models constant and tfidf_logistic_regression, recommenders popularity, item_knn
    and ease."""
    tolerance: NonNegativeFloat = 0.0
    """Maximum difference by which the candidate's metric may be below the champion's."""


class Evaluation(Section):
    """Further results on the test part."""

    slices: list[str] = Field([])
    """Categories of the contract whose values slice the test part: the metrics of each slice are in
    `metrics.json` and on the card. They need not be inputs of the model."""


class Compression(Section):
    """What `raylway compress` accepts."""

    max_loss: NonNegativeFloat = 0.01
    """Maximum loss of `gate.metric` on the test part by the int8 version."""
