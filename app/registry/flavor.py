"""The files that make a bundle an MLflow model."""

import platform
from pathlib import Path

import onnx
import onnxruntime
from mlflow.models import Model


def write(folder: Path) -> None:
    """Make a bundle an MLflow model with the ONNX flavor, so that MLflow's own tools can open it."""
    requirements = [f"onnx=={onnx.__version__}", f"onnxruntime=={onnxruntime.__version__}"]
    model = Model()
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    model.add_flavor(
        "python_function",
        loader_module="mlflow.onnx",
        data="model.onnx",
        env={"virtualenv": "requirements.txt"},
        python_version=platform.python_version(),
    )
    model.add_flavor(
        "onnx",
        onnx_version=onnx.__version__,
        data="model.onnx",
        providers=["CPUExecutionProvider"],
        options=None,
        code=None,
    )
    model.save(str(folder / "MLmodel"))
