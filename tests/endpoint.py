"""Serves one bundle on its own cluster until it is killed: `python -m tests.endpoint BUNDLE SERVING`.

SERVING is the section `serving` of a project file, as JSON. Prints the URL once the endpoint answers.
"""

import json
import signal
import sys
from pathlib import Path

from app.cluster.session import session
from app.config import Serving
from app.serving.control import deploy
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant


def main(bundle: str, serving: str) -> None:
    variants = {"champion": DeployedVariant(version="1", weight=1, path=Path(bundle))}
    with session(log_to_driver=False):
        traffic = Traffic(salt="1", policy="weighted", variants=variants)
        print(deploy.deploy(Serving.model_validate(json.loads(serving)), "smoke", traffic), flush=True)
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
