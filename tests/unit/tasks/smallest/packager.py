import numpy as np
import torch
from app.tasks.smallest.task import Task
from torch import nn

from app.bundle.bundle import OUTPUT, feed_of, open_graph
from app.bundle.schema import label_schema
from app.evaluation import predictions
from app.tasks.onnx import export_graph, require_close, write


class Column(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[:, None]


class Packager:
    def __init__(self, task: Task):
        self.task = task

    def export(self, network, folder):
        rows, example = torch.export.Dim("rows", min=1), torch.zeros(2, dtype=torch.float64)
        column, path = self.task.column, folder / "model.onnx"
        write(export_graph(Column(network.eval()), (example,), [column], [OUTPUT], {"x": {0: rows}}), path)
        x = np.array(self.task.prepared.frame("test")[column])
        with torch.no_grad():
            expected = network(torch.from_numpy(x)).numpy()
        graph = open_graph(path).run([OUTPUT], feed_of({column: x}))[0]
        return require_close(float(np.abs(graph[:, 0] - expected).max()))

    def schema(self):
        summary = self.task.prepared.summary
        return label_schema(self.task.project, self.task.prepared.preprocessor, summary["labels"])

    def evaluate(self, bundle, rows=None):
        test = self.task.prepared.frame("test", rows)
        return predictions.evaluate(self.task.project, test, bundle.predict(test))
