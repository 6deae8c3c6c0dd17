"""A BentoML service that runs the bundle's ONNX graph.

BUNDLE=... bentoml serve bentoml_peer:Income --port ...
"""

import json
import os
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1)
class Income:
    def __init__(self) -> None:
        bundle = Path(os.environ["BUNDLE"])
        self.inputs = json.loads((bundle / "schema.json").read_text())["inputs"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(bundle / "model.onnx", options)

    @bentoml.api
    async def predict(self, rows: list[dict[str, Any]]) -> list[float]:
        feed = {}
        for item in self.inputs:
            values = [row.get(item["name"]) for row in rows]
            if item["contract"]["type"] == "number":
                feed[item["name"]] = np.array(values, dtype=np.float64)
            else:
                feed[item["name"]] = np.array([v or "" for v in values], dtype=object)
        return self.session.run(["probability"], feed)[0][:, 0].tolist()
