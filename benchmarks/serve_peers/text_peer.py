"""A hand-written server of a text model: FastAPI with one uvicorn worker runs the network in eager PyTorch.

BUNDLE=... uvicorn text_peer:app --port ...
"""

import json
import os
from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from safetensors.torch import load_file

from app.data import tokens
from app.tasks.text.network import TextClassifier, load_encoder

BUNDLE = Path(os.environ["BUNDLE"])
CLASSES = json.loads((BUNDLE / "schema.json").read_text())["classes"]


def _network() -> TextClassifier:
    network = TextClassifier(load_encoder(tokens.encoder_folder("minilm")), len(CLASSES), 0.0)
    network.load_state_dict(load_file(BUNDLE / "model.safetensors"))
    return network.eval()


class Row(BaseModel):
    text: str


class Request(BaseModel):
    rows: list[Row]


class Prediction(BaseModel):
    label: str
    probabilities: dict[str, float]


class Response(BaseModel):
    predictions: list[Prediction]


app = FastAPI()
network = _network()
tokenizer = tokens.load(BUNDLE / tokens.TOKENIZER_FILE)


@app.post("/predict")
def predict(request: Request) -> Response:
    ids, mask = tokens.pad(*tokens.encode(tokenizer, [row.text for row in request.rows]))
    with torch.inference_mode():
        outputs = network(torch.from_numpy(ids), torch.from_numpy(mask)).tolist()
    predictions = []
    for probabilities in outputs:
        by_class = dict(zip(CLASSES, probabilities, strict=True))
        predictions.append(Prediction(label=max(by_class, key=by_class.__getitem__), probabilities=by_class))
    return Response(predictions=predictions)
