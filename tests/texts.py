"""A small text project with a tiny encoder: prepared by hand, and a sealed bundle of an untrained network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from app.bundle import bundle
from app.bundle.bundle import Bundle
from app.bundle.manifest import seal
from app.config import Project
from app.data import tokens
from app.data.prepare import LABEL, Prepared
from app.evaluation import card
from app.tasks.text.packager import Packager
from app.tasks.text.task import Task
from tests import encoders
from tests.bundles import PASSED

CLASSES = ["bad", "fine", "good"]
PARTS = {"train": 240, "validation": 60, "test": 90}


def project(encoder: Path, **model: Any) -> dict[str, Any]:
    return {
        "name": "moods",
        "data": {
            "source": {"path": "rows.parquet"},
            "label": {"column": "mood", "classes": CLASSES},
            "columns": {
                "text": {"type": "text", "max_characters": 200},
                "about": {"type": "category", "nullable": True},
            },
        },
        "features": {"text": {"encode": "tokens", "max_length": 16}},
        "model": {"kind": "text_classifier", "encoder": str(encoder), **model},
        "training": {"num_workers": 2, "epochs": 3, "batch_size": 16, "learning_rate": 0.01},
        "evaluation": {"slices": ["about"]},
        "gate": {"metric": "macro_f1", "beat": ["constant", "tfidf_logistic_regression"]},
        "compression": {"max_loss": 1.0},
        "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
    }


def rows(number: int, seed: int = 0) -> pd.DataFrame:
    """Texts with their mood, which one word of the text decides; `about` is missing in some rows."""
    random = np.random.default_rng(seed)
    moods = random.integers(0, 3, number)
    words = [["bad", "awful"], ["fine", "not"], ["good", "great"]]
    texts = []
    for mood in moods:
        filling = random.choice(encoders.WORDS[13:], random.integers(2, 9)).tolist()
        filling.insert(random.integers(0, len(filling) + 1), str(random.choice(words[mood])))
        texts.append(" ".join(filling))
    about = np.where(random.random(number) < 0.1, None, random.choice(["flights", "phones"], number))
    return pd.DataFrame({"text": texts, "about": about, "mood": np.array(CLASSES)[moods], LABEL: moods})


def prepared(folder: Path, encoder: Path) -> Prepared:
    """Create `folder` with the output of the prepare stage."""
    folder.mkdir(parents=True)
    summary: dict[str, Any] = {"data_version": "0" * 64, "rows": sum(PARTS.values()), "parts": {}}
    for seed, (part, number) in enumerate(PARTS.items()):
        frame = rows(number, seed)
        (folder / part).mkdir()
        frame.drop(columns="mood").to_parquet(folder / part / "rows.parquet")
        counts = [int((frame[LABEL] == i).sum()) for i in range(3)]
        summary["parts"][part] = {"rows": number, "counts": counts}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "preprocessor.json").write_text('{"columns": []}')
    tokens.write(str(encoder), 16, folder / tokens.TOKENIZER_FILE)
    return Prepared(folder, cached=True)


def build(folder: Path, document: dict[str, Any], prepared: Prepared) -> Path:
    """Create a sealed bundle in `folder`, of the project in `document`."""
    folder.mkdir()
    settings = Project.model_validate(document)
    task = Task(settings, prepared)
    packager = Packager(task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = task.network()
        torch.nn.init.normal_(network.head.weight)
    difference = packager.export(network, folder)
    (folder / "schema.json").write_text(packager.schema().model_dump_json())
    (folder / "project.json").write_text(settings.model_dump_json())
    unsealed = Bundle(folder, sealed=False)
    bundle.write_example(unsealed, prepared.frame("test"))
    evaluation = {**packager.evaluate(unsealed), "baselines": {}, "onnx_difference": difference}
    (folder / "metrics.json").write_text(json.dumps(evaluation))
    (folder / "card.md").write_text(card.render(settings, prepared.summary, evaluation))
    facts = {"data_version": "0" * 64, "prepared": prepared.key, "seed": 0, "decision": PASSED}
    seal(folder, facts)
    return folder
