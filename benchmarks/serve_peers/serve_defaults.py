"""Ray Serve with its defaults: the same model behind a FastAPI ingress, with Serve's default autoscaling.

BUNDLE=... python serve_defaults.py PORT
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from fastapi import FastAPI
from ray import serve

app = FastAPI()


@serve.deployment(
    num_replicas="auto",
    autoscaling_config={"min_replicas": 1, "max_replicas": 2},
    ray_actor_options={"num_cpus": 0.1},
)
@serve.ingress(app)
class Income:
    def __init__(self) -> None:
        folder = Path(os.environ["BUNDLE"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        inputs = json.loads((folder / "schema.json").read_text())["inputs"]
        self._numbers = {i["name"]: i["contract"]["type"] == "number" for i in inputs}

    @app.post("/predict")
    def predict(self, body: dict[str, Any]) -> dict[str, Any]:
        feed = {}
        for name, is_number in self._numbers.items():
            values = [row.get(name) for row in body["rows"]]
            if is_number:
                feed[name] = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            else:
                feed[name] = np.array(["" if v is None else v for v in values], dtype=object)
        probabilities = self._session.run(["probability"], feed)[0][:, 0]
        return {"probabilities": probabilities.tolist(), "replica": os.getpid()}


if __name__ == "__main__":
    serve.start(http_options={"port": int(sys.argv[1])})
    serve.run(Income.bind())
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
