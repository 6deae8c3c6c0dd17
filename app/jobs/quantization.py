"""Making an int8 version of a bundle by ONNX Runtime's dynamic quantization.

Weights of matrix products are stored as int8 with one scale per output; activations are quantized at run
time. It helps with large layers; a small network gains little.
"""

import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from app.bundle import bundle
from app.bundle.bundle import Bundle
from app.bundle.manifest import identity_of, seal
from app.config import Project
from app.data.prepare import Prepared
from app.errors import UserError
from app.evaluation import card
from app.state import stages
from app.tasks import module_of, packager_of, task_of

REPLACED_FILES = ("model.onnx", "metrics.json", "card.md", "example.json")
"""Files that an int8 bundle does not copy from its original."""
TIMED_ROWS = (1, 32)
"""Numbers of rows of the requests that are timed."""
NUM_TIMED_REQUESTS = 30
NUM_WARMUP_REQUESTS = 3


@dataclass(frozen=True)
class CompressedBundle:
    """An int8 bundle, and how it compares with its original."""

    path: Path
    """Folder of the bundle, a candidate without a decision of the gate."""
    comparison: dict[str, Any]
    """`before` and `after` with `bytes`, `ms_1`, `ms_32` and `score`; `metric`, the name of the score; and
    `changed`, the share of test predictions that changed."""


def compress(path: Path) -> CompressedBundle:
    """Make the int8 bundle of a bundle.

    Raises UserError if it loses more of the gate's metric on the test part than `compression.max_loss`, if
    the prepared data were removed, or if the bundle has no int8 version.
    """
    original = Bundle(path.resolve())
    if original.schema.task == "ranking":
        raise UserError(f"{path}: a recommender has no large layers; its int8 version would gain nothing")
    if "compression" in json.loads((path / "metrics.json").read_text()):
        raise UserError(f"{path}: is an int8 bundle already")
    project = Project.model_validate_json((path / "project.json").read_text())
    prepared = prepared_of(original.manifest, path)
    target = stages.folder("compress", key(project, identity_of(original.path)))
    stages.produce(target, lambda draft: _build(original, project, prepared, draft))
    path = stages.current(target)
    comparison = json.loads((path / "metrics.json").read_text())["compression"]
    return CompressedBundle(path, comparison)


def key(project: Project, identity: str) -> str:
    """The stage key of the int8 bundle of a bundle with this identity."""
    return stages.key("compress", {"original": identity}, __name__, module_of(project, "packager"))


def prepared_of(manifest: Mapping[str, Any], path: Path) -> Prepared:
    """The prepared data of a bundle. Raises UserError if they were removed."""
    prepared = Prepared(stages.current(stages.folder("prepare", manifest["prepared"])), cached=True)
    if not prepared.path.exists():
        raise UserError(
            f"{path}: the test part, on which its int8 version is judged, was removed; "
            "run `raylway train` again"
        )
    return prepared


def quantize(graph: Path, target: Path) -> None:
    """Write the int8 version of a graph."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # ONNX Runtime warns that the model should be pre-processed even after that was done.
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        cleaned, preprocessed = Path(scratch) / "cleaned.onnx", Path(scratch) / "preprocessed.onnx"
        # Remove the exporter's shapes: they contradict the weights that pre-processing transposes.
        model = onnx.load(graph)
        del model.graph.value_info[:]
        # Name each operator set once: a graph that was merged from two names it twice.
        opsets = {opset.domain: opset for opset in model.opset_import}
        del model.opset_import[:]
        model.opset_import.extend(opsets.values())
        onnx.save(model, cleaned)
        # Symbolic shapes are not needed for matrix products; strings and custom operators have none.
        quant_pre_process(cleaned, preprocessed, skip_symbolic_shape=True)
        quantize_dynamic(
            preprocessed, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=False
        )


def _build(original: Bundle, project: Project, prepared: Prepared, draft: Path) -> None:
    packager = packager_of(task_of(project, prepared))
    for name in original.manifest["files"]:
        if name not in REPLACED_FILES:
            shutil.copy(original.path / name, draft)
    quantize(original.path / "model.onnx", draft / "model.onnx")
    compressed = Bundle(draft, sealed=False)
    test = prepared.frame("test")
    bundle.write_example(compressed, test)

    metric = project.gate.metric
    evaluations = {"before": packager.evaluate(original), "after": packager.evaluate(compressed)}
    costs = {
        when: {
            "bytes": (measured.path / "model.onnx").stat().st_size,
            **{f"ms_{num_rows}": _milliseconds(measured, test, num_rows) for num_rows in TIMED_ROWS},
            "score": evaluations[when]["model"][metric],
        }
        for when, measured in (("before", original), ("after", compressed))
    }
    loss = costs["before"]["score"] - costs["after"]["score"]
    if loss > project.compression.max_loss:
        raise UserError(
            f"compression.max_loss is {project.compression.max_loss:g}, but int8 loses {loss:.4f} of "
            f"{metric} on the test part ({costs['before']['score']:.4f} to {costs['after']['score']:.4f}); "
            "serve the bundle as it is, or train with a larger limit"
        )
    comparison = {"metric": metric, "changed": _changed_share(original, compressed, test), **costs}
    metrics = json.loads((original.path / "metrics.json").read_text())
    evaluation = {**metrics, **evaluations["after"], "compression": comparison}
    (draft / "metrics.json").write_text(json.dumps(evaluation, indent=1))
    (draft / "card.md").write_text(card.render(project, prepared.summary, evaluation))
    facts = {name: original.manifest[name] for name in ("data_version", "prepared", "seed")}
    parent = {"identity": identity_of(original.path), "decision": original.manifest.get("decision")}
    seal(draft, {**facts, "compressed_from": parent})


def _milliseconds(measured: Bundle, test: pd.DataFrame, num_rows: int) -> float:
    """The median duration of a prediction of `num_rows` rows."""
    rows = test.sample(num_rows, replace=len(test) < num_rows, random_state=0)
    columns = {i.name: rows[i.name].to_numpy() for i in measured.schema.inputs}
    durations_s = []
    for _ in range(NUM_WARMUP_REQUESTS + NUM_TIMED_REQUESTS):
        started = time.perf_counter()
        measured.predict(columns)
        durations_s.append(time.perf_counter() - started)
    return statistics.median(durations_s[NUM_WARMUP_REQUESTS:]) * 1000


def _changed_share(original: Bundle, compressed: Bundle, test: pd.DataFrame) -> float:
    """The share of rows for which the two bundles predict different labels."""
    columns = {i.name: test[i.name].to_numpy() for i in original.schema.inputs}

    def labels(predicting: Bundle) -> np.ndarray:
        probabilities = predicting.predict(columns)
        return probabilities >= 0.5 if probabilities.ndim == 1 else probabilities.argmax(axis=1)

    return float(np.mean(labels(original) != labels(compressed)))
