"""Quality of the tabular models, against LightGBM tuned with the same number of trials on the same rows.

    python benchmarks/bench_quality.py [configs/income.yaml] [--trials 20] [--seeds 3] [--only tabm,mlp,...]

Every model is tuned by random search. The validation AUC chooses each trial's best epoch or tree, and the
best trial. Only the best trial is then scored on the test part, with several seeds. Each fit uses one thread.
`lightgbm_exact` is LightGBM that also gets the `exact` features as categories, as the networks do. The last
line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

EARLY_STOPPING_ROUNDS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", nargs="?", default="configs/income.yaml")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help=f"comma-separated, from {', '.join(SPACES)}")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="raylway-bench-") as home:
        os.environ["RAYLWAY_HOME"] = home
        prepared = prepare(arguments.project)
        models: dict[str, Any] = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
            for kind in arguments.only.split(",") if arguments.only else SPACES:
                random = np.random.default_rng(0)
                settings = [SPACES[kind](random) for _ in range(arguments.trials)]
                work = [(arguments.project, prepared, kind, candidate, 0) for candidate in settings]
                trials = list(pool.map(fit, *zip(*work, strict=True)))
                best = max(range(len(trials)), key=lambda i: trials[i]["validation"])
                work = [
                    (arguments.project, prepared, kind, settings[best], seed)
                    for seed in range(arguments.seeds)
                ]
                refits = list(pool.map(fit, *zip(*work, strict=True)))
                tests = [refit["test"] for refit in refits]
                models[kind] = {
                    "test_auc": round(float(np.mean(tests)), 5),
                    "low": round(min(tests), 5),
                    "high": round(max(tests), 5),
                    "validation_auc": round(trials[best]["validation"], 5),
                    "seconds_a_fit": round(float(np.mean([refit["seconds"] for refit in refits])), 1),
                    "chosen": settings[best],
                }
                print(f"{kind:16}" + "  ".join(f"{k} {v}" for k, v in models[kind].items()), flush=True)
    print(f"\n{'':16}{'test AUC':>10}{'low':>10}{'high':>10}{'s per fit':>10}")
    for kind, m in models.items():
        print(f"{kind:16}{m['test_auc']:10.4f}{m['low']:10.4f}{m['high']:10.4f}{m['seconds_a_fit']:10.1f}")
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    about = {"project": Path(arguments.project).stem, "trials": arguments.trials, "seeds": arguments.seeds}
    print(json.dumps({"benchmark": "quality", "machine": machine, **about, "models": models}))


def prepare(project: str) -> Path:
    """The folder of the project's prepared parts."""
    from app.cluster.session import session
    from app.config import projectfile
    from app.data import prepare

    with session(log_to_driver=False):
        return prepare.prepare(projectfile.load(project)).path


def linear(random: np.random.Generator) -> dict[str, Any]:
    return {
        "model": {"kind": "linear"},
        "epochs": int(random.integers(3, 11)),
        "batch_size": 256,
        "learning_rate": log_uniform(random, 1e-3, 1e-1),
        "weight_decay": log_uniform(random, 1e-5, 1e-1),
    }


def mlp(random: np.random.Generator) -> dict[str, Any]:
    width, depth = int(random.choice([128, 256, 512])), int(random.integers(1, 4))
    return {
        "model": {
            "kind": "mlp",
            "hidden": [width] * depth,
            "dropout": round(random.uniform(0, 0.5), 2),
            "numbers": numbers(random),
        },
        "epochs": int(random.integers(6, 13)),
        "batch_size": int(random.choice([128, 256, 512])),
        "learning_rate": log_uniform(random, 5e-4, 5e-3),
        "weight_decay": log_uniform(random, 1e-4, 1e-1),
    }


def tabm(random: np.random.Generator) -> dict[str, Any]:
    width, depth = int(random.choice([64, 128])), int(random.integers(1, 4))
    return {
        "model": {
            "kind": "tabm",
            "members": int(random.choice([8, 16])),
            "hidden": [width] * depth,
            "dropout": round(random.uniform(0, 0.3), 2),
            "numbers": numbers(random),
        },
        "epochs": int(random.integers(6, 13)),
        "batch_size": int(random.choice([256, 512])),
        "learning_rate": log_uniform(random, 2e-3, 1e-2),
        "weight_decay": log_uniform(random, 1e-4, 1e-1),
    }


def numbers(random: np.random.Generator) -> dict[str, Any]:
    embed = str(random.choice(["none", "linear", "periodic"]))
    return {"embed": embed} | ({"scale": log_uniform(random, 0.03, 1)} if embed == "periodic" else {})


def lightgbm(random: np.random.Generator) -> dict[str, Any]:
    return {
        "learning_rate": log_uniform(random, 0.01, 0.3),
        "num_leaves": int(log_uniform(random, 4, 128)),
        "min_child_samples": int(log_uniform(random, 2, 100)),
        "min_sum_hessian_in_leaf": log_uniform(random, 1e-3, 10),
        "subsample": random.uniform(0.5, 1),
        "colsample_bytree": random.uniform(0.3, 1),
        "reg_lambda": log_uniform(random, 1e-3, 100),
        "cat_smooth": log_uniform(random, 1, 100),
        "max_cat_threshold": int(log_uniform(random, 4, 64)),
    }


def log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(f"{np.exp(random.uniform(np.log(low), np.log(high))):.3g}")


SPACES: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "linear": linear,
    "mlp": mlp,
    "tabm": tabm,
    "lightgbm": lightgbm,
    "lightgbm_exact": lightgbm,
}


def fit(project: str, prepared: Path, kind: str, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Fit once. Return validation and test AUC at the best epoch or tree, and the seconds the fit took."""
    started = time.perf_counter()
    run = fit_lightgbm if kind.startswith("lightgbm") else fit_network
    validation, test = run(project, prepared, kind, settings, seed)
    return {"validation": validation, "test": test, "seconds": time.perf_counter() - started}


def fit_network(
    project: str, prepared: Path, kind: str, settings: dict[str, Any], seed: int
) -> tuple[float, float]:
    """Train as app/training/loop.py does, in one process."""
    import torch
    from pydantic import TypeAdapter

    from app.config import Model, Training, projectfile
    from app.data.prepare import Prepared
    from app.tasks import task_of
    from app.training import schedule

    torch.set_num_threads(1)
    base = projectfile.load(project)
    training = Training(num_workers=1, **{k: v for k, v in settings.items() if k != "model"})
    model = TypeAdapter(Model).validate_python(settings["model"])
    task = task_of(
        base.model_copy(update={"model": model, "training": training}), Prepared(prepared, cached=True)
    )
    parts = {
        part: {name: torch.as_tensor(a) for name, a in task.arrays(task.prepared.frame(part)).items()}
        for part in ("train", "validation", "test")
    }
    torch.manual_seed(seed)
    network = task.network()
    optimizer = torch.optim.AdamW(
        task.parameter_groups(network), weight_decay=training.weight_decay, fused=True
    )
    best = (0.0, 0.0)
    for epoch in range(training.epochs):
        network.train()
        batches = torch.randperm(len(parts["train"]["y"])).split(training.batch_size)
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(training, 1, epoch + step / len(batches))
            optimizer.zero_grad()
            network.loss(*task.batch(parts["train"], rows)).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            scores = [
                task.metrics(*task.outputs(network, parts[part]))["auc"] for part in ("validation", "test")
            ]
        best = max(best, (scores[0], scores[1]), key=lambda pair: pair[0])
    return best


def fit_lightgbm(
    project: str, prepared: Path, kind: str, settings: dict[str, Any], seed: int
) -> tuple[float, float]:
    """Fit on the raw columns; LightGBM itself handles categories and missing values."""
    import lightgbm
    import pandas as pd

    from app.config import projectfile
    from app.data.prepare import LABEL, Prepared
    from app.evaluation.metrics import auc

    loaded = projectfile.load(project)
    frames = {part: Prepared(prepared, cached=True).frame(part) for part in ("train", "validation", "test")}
    categories = {name: name for name in loaded.features if loaded.data.columns[name].type == "category"}
    if kind == "lightgbm_exact":
        exact = [n for n, encoding in loaded.features.items() if getattr(encoding, "exact", None)]
        categories |= {f"{name} as category": name for name in exact}
    columns = list(dict.fromkeys([*loaded.features, *categories]))
    levels = {name: frames["train"][source].dropna().unique() for name, source in categories.items()}
    for part, frame in frames.items():
        # A value that the training part lacks gets code -1, which is a missing value.
        codes = {n: pd.Index(levels[n]).get_indexer(frame[source]) for n, source in categories.items()}
        frames[part] = frame.assign(
            **{n: pd.Categorical.from_codes(code, categories=levels[n]) for n, code in codes.items()}
        )
    model = lightgbm.LGBMClassifier(
        n_estimators=4000, n_jobs=1, verbose=-1, random_state=seed, subsample_freq=1, **settings
    )
    model.fit(
        frames["train"][columns],
        frames["train"][LABEL],
        eval_X=frames["validation"][columns],
        eval_y=frames["validation"][LABEL],
        eval_metric="auc",
        callbacks=[lightgbm.early_stopping(EARLY_STOPPING_ROUNDS, first_metric_only=True, verbose=False)],
    )
    validation, test = (
        auc(frames[part][LABEL].to_numpy(), model.predict_proba(frames[part][columns])[:, 1])
        for part in ("validation", "test")
    )
    return validation, test


if __name__ == "__main__":
    main()
