"""An MLServer runtime that runs the bundle's ONNX graph.

mlserver start FOLDER, where FOLDER/model-settings.json names this class and the bundle as its uri.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Income(MLModel):
    async def load(self) -> bool:
        bundle = Path(self.settings.parameters.uri)
        inputs = json.loads((bundle / "schema.json").read_text())["inputs"]
        self.numbers = {i["name"] for i in inputs if i["contract"]["type"] == "number"}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(bundle / "model.onnx", options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {}
        for tensor in payload.inputs:
            if tensor.name in self.numbers:
                feed[tensor.name] = NumpyCodec.decode_input(tensor).ravel()
            else:
                feed[tensor.name] = np.array(StringCodec.decode_input(tensor), dtype=object)
        probabilities = self.session.run(["probability"], feed)[0]
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("probability", probabilities)]
        )
