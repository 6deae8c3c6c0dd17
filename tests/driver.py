"""Trains on the cluster at RAY_ADDRESS and prints what happens, a JSON object a line.

`python -m tests.driver FOLDER SECONDS_PER_STEP KEY=VALUE...`: each rank notes in FOLDER where it is when it
starts, and its parameters when it ends; KEY=VALUE are overrides of configs/smoke.yaml.
"""

import json
import sys
import time
from pathlib import Path

from app.cluster.session import session
from app.config import projectfile


def say(kind: str, **facts) -> None:
    print(json.dumps({"kind": kind, "at": time.time(), **facts}), flush=True)


def observed(folder: str, seconds_per_step: float):
    """The training loop, slowed down, with notes of each rank."""

    def train_loop(settings):
        import hashlib
        import json
        import os
        import time
        from pathlib import Path

        import psutil
        import ray

        from app.training import loop

        def slowed(*arguments, step=loop._step):
            sockets = psutil.Process().net_connections("tcp")
            note["steps"] += 1
            note["listens"] = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
            time.sleep(seconds_per_step)
            return step(*arguments)

        loop._step = slowed
        context = ray.train.get_context()
        note = {
            "pid": os.getpid(),
            "steps": 0,
            "rank": context.get_world_rank(),
            "size": context.get_world_size(),
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "hostname": os.uname().nodename,
            "environment": {n: v for n, v in os.environ.items() if n.startswith(("HOROVOD_", "GLOO_"))},
        }
        file = Path(folder) / f"{time.time_ns()}-{note['rank']}-of-{note['size']}.json"
        file.write_text(json.dumps(note))
        model = loop.train(settings)
        parameters = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        note |= {"parameters": hashlib.sha256(parameters).hexdigest(), "bytes": len(parameters)}
        file.write_text(json.dumps(note))

    return train_loop


def main(folder: str, seconds_per_step: float, overrides: list[str]) -> None:
    project = projectfile.load("configs/smoke.yaml", overrides)
    with session(log_to_driver=False):
        from app.data.prepare import prepare
        from app.training import trainer

        prepared = prepare(project)
        say("prepared")
        trainer.loop.train_loop = observed(folder, seconds_per_step)
        try:
            trained = trainer.train(
                project,
                prepared,
                lambda epoch: say("epoch", **epoch),
                lambda note: say("note", text=note),
                fresh=True,
            )
            say("end", history=trained.history)
        except Exception as error:
            say("error", type=type(error).__name__, text=str(error))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
