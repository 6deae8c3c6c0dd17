import numpy as np
from app.tasks.smallest.task import Task

from app.data.prepare import LABEL
from app.evaluation import metrics


def baselines(task: Task):
    share = task.prepared.frame("train")[LABEL].mean()
    labels = task.prepared.frame("test")[LABEL].to_numpy()
    return {"constant": metrics.evaluate_binary(labels, np.full(len(labels), share))}
