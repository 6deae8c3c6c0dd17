import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy

from app.data.prepare import LABEL
from app.evaluation import metrics


class Network(nn.Module):
    def __init__(self, slope: float):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.offset = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return torch.sigmoid(self.slope * x.float() + self.offset)

    def loss(self, x, y):
        return binary_cross_entropy(self(x), y)


class Task:
    def __init__(self, project, prepared):
        self.project, self.prepared, self.score = project, prepared, project.model.score
        (self.column,) = project.features

    def arrays(self, frame):
        return {"x": np.array(frame[self.column], "float64"), "y": np.array(frame[LABEL], "float32")}

    def network(self):
        return Network(self.project.model.slope)

    def parameter_groups(self, network):
        return [{"params": list(network.parameters())}]

    def arrange(self, arrays, order, batch_size):
        return order

    def batch(self, arrays, rows):
        return arrays["x"][rows], arrays["y"][rows]

    def outputs(self, network, arrays):
        return network(arrays["x"]), arrays["y"]

    def metrics(self, probabilities, labels):
        if not probabilities.isfinite().all():
            return {"loss": math.nan, "auc": math.nan}
        loss = binary_cross_entropy(probabilities, labels).item()
        return {"loss": loss, "auc": metrics.auc(labels.numpy(), probabilities.numpy())}
