import copy

import numpy as np
import pytest
import torch

from app.tasks.text import graph
from app.tasks.text.network import TextClassifier, new_encoder
from tests import encoders


def test_the_graph_answers_like_the_network_and_unlike_another(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TextClassifier(new_encoder({**encoders.CONFIG, "vocab_size": 40}), 3, dropout=0.0)
    torch.nn.init.normal_(model.head.weight)
    graph.export(model, tmp_path / "model.onnx")
    lengths = np.array([2, 9, 30, 3, 3])
    ids = np.where(np.arange(30) < lengths[:, None], np.random.default_rng(0).integers(1, 40, (5, 30)), 0)
    assert graph.difference(model, tmp_path / "model.onnx", ids, lengths) < 1e-5
    assert graph.difference(model, tmp_path / "model.onnx", ids[:1], lengths[:1]) < 1e-5
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.head.bias)
    with pytest.raises(RuntimeError, match="differs from the trained model by"):
        graph.difference(other, tmp_path / "model.onnx", ids, lengths)
