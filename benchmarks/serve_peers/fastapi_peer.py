"""A hand-written server: FastAPI with one uvicorn worker runs the bundle's ONNX graph.

BUNDLE=... uvicorn fastapi_peer:app --port ...
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel, Field, create_model

BUNDLE = Path(os.environ["BUNDLE"])
SCHEMA = json.loads((BUNDLE / "schema.json").read_text())


def _session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(BUNDLE / "model.onnx", options)


def _row() -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for number, item in enumerate(SCHEMA["inputs"]):
        kind: Any = float if item["contract"]["type"] == "number" else str
        if item["contract"]["nullable"]:
            fields[f"f{number}"] = (kind | None, Field(None, alias=item["name"]))
        else:
            fields[f"f{number}"] = (kind, Field(alias=item["name"]))
    return create_model("Row", **fields)


class Request(BaseModel):
    rows: list[_row()]  # type: ignore[misc]


class Prediction(BaseModel):
    probability: float
    positive: bool


class Response(BaseModel):
    predictions: list[Prediction]


app = FastAPI()
session = _session()


@app.post("/predict")
async def predict(request: Request) -> Response:
    feed = {}
    for number, item in enumerate(SCHEMA["inputs"]):
        values = [getattr(row, f"f{number}") for row in request.rows]
        if item["contract"]["type"] == "number":
            feed[item["name"]] = np.array(values, dtype=np.float64)
        else:
            feed[item["name"]] = np.array([v or "" for v in values], dtype=object)
    probabilities = session.run(["probability"], feed)[0][:, 0].tolist()
    return Response(predictions=[Prediction(probability=p, positive=p >= 0.5) for p in probabilities])
