"""An int8 version of a bundle, by ONNX Runtime's dynamic quantisation.

Weights of matrix products are stored in int8, one scale for each output; activations are quantised as they
come. It is for large layers: a small network gains little.
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

MADE_ANEW = ("model.onnx", "metrics.json", "card.md", "example.json")
"""The files of a bundle that its int8 version does not share."""
SIZES = (1, 32)
"""Rows of a request whose time is taken."""
REPEATS = 30


@dataclass(frozen=True)
class Compressed:
    """The int8 bundle, and what it cost."""

    path: Path
    """A candidate: without a decision of the gate."""
    comparison: dict[str, Any]
    """`before` and `after` with `bytes`, `ms_1`, `ms_32` and `score`; `metric` names the score, `changed` is
    the share of the test part's answers that are other ones."""


def compress(path: Path) -> Compressed:
    """Make the int8 bundle of a bundle.

    Raises UserError if it loses more of the gate's metric on the test part than the project's
    `compression.max_loss`, if the prepared data are gone, or for a bundle that has no int8 version.
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
    return Compressed(path, comparison)


def key(project: Project, identity: str) -> str:
    """The name under which the int8 bundle of a bundle with this identity is kept."""
    return stages.key("compress", {"original": identity}, __name__, module_of(project, "packager"))


def prepared_of(manifest: Mapping[str, Any], path: Path) -> Prepared:
    """The prepared data that a bundle was made of. Raises UserError if they are gone."""
    prepared = Prepared(stages.current(stages.folder("prepare", manifest["prepared"])), cached=True)
    if not prepared.path.exists():
        raise UserError(
            f"{path}: the test part to judge its int8 version on is gone; run `raylway train` again"
        )
    return prepared


def quantize(graph: Path, target: Path) -> None:
    """Write the int8 version of a graph."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)  # it advises to pre-process, also after it was done
    with tempfile.TemporaryDirectory() as scratch:
        bare, ready = Path(scratch) / "bare.onnx", Path(scratch) / "ready.onnx"
        # The shapes that the exporter noted would contradict the weights that are transposed on the way.
        model = onnx.load(graph)
        del model.graph.value_info[:]
        # A graph that was put together from two names its operator set twice.
        opsets = {opset.domain: opset for opset in model.opset_import}
        del model.opset_import[:]
        model.opset_import.extend(opsets.values())
        onnx.save(model, bare)
        # Symbolic shapes are not needed for matrix products, and strings and our own operators have none.
        quant_pre_process(bare, ready, skip_symbolic_shape=True)
        quantize_dynamic(ready, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=False)


def _build(original: Bundle, project: Project, prepared: Prepared, draft: Path) -> None:
    packager = packager_of(task_of(project, prepared))
    for name in original.manifest["files"]:
        if name not in MADE_ANEW:
            shutil.copy(original.path / name, draft)
    quantize(original.path / "model.onnx", draft / "model.onnx")
    smaller = Bundle(draft, sealed=False)
    test = prepared.frame("test")
    bundle.write_example(smaller, test)

    metric = project.gate.metric
    evaluations = {"before": packager.evaluate(original), "after": packager.evaluate(smaller)}
    found = {
        when: {
            "bytes": (opened.path / "model.onnx").stat().st_size,
            **{f"ms_{size}": _milliseconds(opened, test, size) for size in SIZES},
            "score": evaluations[when]["model"][metric],
        }
        for when, opened in (("before", original), ("after", smaller))
    }
    loss = found["before"]["score"] - found["after"]["score"]
    if loss > project.compression.max_loss:
        raise UserError(
            f"int8 loses {loss:.4f} of {metric} on the test part ({found['before']['score']:.4f} to "
            f"{found['after']['score']:.4f}), but compression.max_loss is {project.compression.max_loss:g}; "
            "serve the bundle as it is, or train with a larger limit"
        )
    comparison = {"metric": metric, "changed": _changed(original, smaller, test), **found}
    before = json.loads((original.path / "metrics.json").read_text())
    evaluation = {**before, **evaluations["after"], "compression": comparison}
    (draft / "metrics.json").write_text(json.dumps(evaluation, indent=1))
    (draft / "card.md").write_text(card.render(project, prepared.summary, evaluation))
    facts = {name: original.manifest[name] for name in ("data_version", "prepared", "seed")}
    parent = {"identity": identity_of(original.path), "decision": original.manifest.get("decision")}
    seal(draft, {**facts, "compressed_from": parent})


def _milliseconds(opened: Bundle, test: pd.DataFrame, size: int) -> float:
    """The median time of a prediction of so many rows, after a few to warm up."""
    rows = test.sample(size, replace=len(test) < size, random_state=0)
    columns = {i.name: rows[i.name].to_numpy() for i in opened.schema.inputs}
    times = []
    for _ in range(REPEATS + 3):
        started = time.perf_counter()
        opened.predict(columns)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:]) * 1000


def _changed(original: Bundle, smaller: Bundle, test: pd.DataFrame) -> float:
    """The share of rows for which the two answer another label."""
    columns = {i.name: test[i.name].to_numpy() for i in original.schema.inputs}
    answers = [opened.predict(columns) for opened in (original, smaller)]
    labels = [a >= 0.5 if a.ndim == 1 else a.argmax(axis=1) for a in answers]
    return float(np.mean(labels[0] != labels[1]))
