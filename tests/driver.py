"""Trains on the cluster at RAY_ADDRESS and prints its events, one JSON object per line.

`python -m tests.driver FOLDER SECONDS_PER_STEP KEY=VALUE...`: KEY=VALUE are overrides of configs/smoke.yaml.
Each rank writes a file to FOLDER: its node and environment when it starts, and its parameters when it ends.
"""

import json
import sys
import time
from pathlib import Path

from app.cluster.session import session
from app.config import projectfile
from app.state import hooks


def print_event(kind: str, **facts) -> None:
    print(json.dumps({"kind": kind, "at": time.time(), **facts}), flush=True)


def note_ranks(folder: str, seconds_per_step: float):
    """The argument `wrap` of `trainer.train`: observers sleep after each step, and write notes."""

    def wrap(observer):
        import hashlib
        import json
        import os
        import time
        from pathlib import Path

        import psutil
        import ray

        context = ray.train.get_context()

        class NotingObserver:
            def __init__(self):
                self._note = {
                    "pid": os.getpid(),
                    "steps": 0,
                    "rank": context.get_world_rank(),
                    "size": context.get_world_size(),
                    "node": ray.get_runtime_context().get_node_id(),
                    "address": ray.util.get_node_ip_address(),
                    "hostname": os.uname().nodename,
                    "environment": {
                        n: v for n, v in os.environ.items() if n.startswith(("HOROVOD_", "GLOO_"))
                    },
                }
                name = f"{time.time_ns()}-{self._note['rank']}-of-{self._note['size']}.json"
                self._file = Path(folder) / name
                self._file.write_text(json.dumps(self._note))

            def __getattr__(self, name):
                return getattr(observer, name)

            def begin(self, network, epoch, step):
                self._network = network

            def step(self, epoch, step):
                sockets = psutil.Process().net_connections("tcp")
                self._note["steps"] += 1
                self._note["listens"] = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
                time.sleep(seconds_per_step)

            def end(self, ending):
                parameters = b"".join(p.detach().numpy().tobytes() for p in self._network.parameters())
                digest = hashlib.sha256(parameters).hexdigest()
                self._note |= {"parameters": digest, "bytes": len(parameters)}
                self._file.write_text(json.dumps(self._note))
                observer.end(ending)

        return NotingObserver()

    return wrap


def main(folder: str, seconds_per_step: float, overrides: list[str]) -> None:
    project = projectfile.load("configs/smoke.yaml", overrides)
    with session(log_to_driver=False):
        from app.data.prepare import prepare
        from app.training import trainer

        prepared = prepare(project)
        print_event("prepared")
        try:
            trained = trainer.train(
                project,
                prepared,
                lambda epoch: print_event("epoch", **epoch),
                lambda note: print_event("note", text=note),
                fresh=True,
                wrap=note_ranks(folder, seconds_per_step),
            )
            print_event("end", history=trained.history, without_effect=list(hooks.reported()))
        except Exception as error:
            print_event("error", type=type(error).__name__, text=str(error))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
