"""The baselines of a text classifier: a constant, and a logistic regression on word counts."""

import numpy as np
from threadpoolctl import threadpool_limits

from app.data.prepare import LABEL
from app.evaluation import metrics
from app.tasks.text.task import Task

INVERSE_PENALTIES = (0.3, 1.0, 3.0, 10.0)
"""Inverse penalties of the logistic regression, from which the validation part chooses."""


def baselines(task: Task) -> dict[str, dict[str, float]]:
    """See `app.tasks.baselines_of`.

    The inputs of the logistic regression are the TF-IDF values, with sublinear counts, of words and pairs of
    words that occur in at least two texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    frames = [task.prepared.frame(part) for part in ("train", "validation", "test")]
    texts = [frame[task.column].fillna("") for frame in frames]
    train, validation, test = (frame[LABEL].to_numpy() for frame in frames)
    shares = np.bincount(train, minlength=len(task.classes)) / len(train)
    scores = {"constant": metrics.evaluate_classes(test, np.tile(shares, (len(test), 1)))}
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    with threadpool_limits(1):
        x_train, x_validation, x_test = words.fit_transform(texts[0]), *map(words.transform, texts[1:])
        models = [LogisticRegression(C=c, max_iter=1000).fit(x_train, train) for c in INVERSE_PENALTIES]
        best = max(models, key=lambda m: metrics.macro_f1(validation, m.predict_proba(x_validation)))
        scores["tfidf_logistic_regression"] = metrics.evaluate_classes(test, best.predict_proba(x_test))
    return scores
