"""What a text classifier must be compared with: a constant, and a logistic regression on word counts."""

import json
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from app import store
from app.config import Project
from app.data.prepare import LABEL, Prepared
from app.evaluation import metrics

STRENGTHS = (0.3, 1.0, 3.0, 10.0)
"""Of the logistic regression (the inverse of its penalty): the best one on the validation part is taken."""


def baselines(project: Project, prepared: Prepared, *, fresh: bool = False) -> dict[str, dict[str, float]]:
    """The metrics of each baseline on the test part, fitted on the training part; done once.

    The logistic regression sees TF-IDF of words and pairs of words that occur twice or more (scikit-learn),
    with sublinear counts.
    """
    key = store.key("baselines", {"prepared": prepared.key}, __name__)
    target = store.folder("baselines", key)

    def build(draft: Path) -> None:
        (draft / "metrics.json").write_text(json.dumps(_scores(project, prepared), indent=1))

    store.produce(target, build, fresh=fresh)
    return json.loads((target / "metrics.json").read_text())


def _scores(project: Project, prepared: Prepared) -> dict[str, dict[str, float]]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    (column,) = project.features
    frames = [prepared.frame(part) for part in ("train", "validation", "test")]
    texts = [frame[column].fillna("") for frame in frames]
    train, validation, test = (frame[LABEL].to_numpy() for frame in frames)
    shares = np.bincount(train, minlength=len(project.data.target.classes or [])) / len(train)
    scores = {"constant": metrics.evaluate_classes(test, np.tile(shares, (len(test), 1)))}
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    with threadpool_limits(1):
        x_train, x_validation, x_test = words.fit_transform(texts[0]), *map(words.transform, texts[1:])
        models = [LogisticRegression(C=c, max_iter=1000).fit(x_train, train) for c in STRENGTHS]
        best = max(models, key=lambda m: metrics.macro_f1(validation, m.predict_proba(x_validation)))
        scores["tfidf_logistic_regression"] = metrics.evaluate_classes(test, best.predict_proba(x_test))
    return scores
