"""The application of the gRPC server.

Ray Serve reads its flags when it is imported, so the functions import it when they are called.
"""

from pathlib import Path
from typing import Any

from app.config.serving import Tls
from app.errors import UserError
from app.serving.control.applications import create_deployment, run_application
from app.serving.gateway import preflight
from app.serving.gateway.frontend import Gateway
from app.serving.gateway.grpc import GrpcServer
from app.serving.names import GRPC


def update(gateway: Gateway, previous: Gateway | None) -> None:
    """Start, update or stop the gRPC server according to the gateway's settings.

    Raises UserError if it cannot start; the server with the previous settings is then restored.
    """
    from ray import serve

    is_running = GRPC in serve.status().applications
    host, port = gateway.frontend.host, gateway.frontend.grpc_port
    if port is None:
        if is_running:
            serve.delete(GRPC)
        return
    if not is_running or previous is None or previous.frontend.grpc_port != port:
        preflight.require_free_port(host, port, "serving.grpc_port")
    try:
        run_application(_application(gateway), GRPC, GRPC, None)
    except UserError:
        if is_running and previous is not None and previous.frontend.grpc_port is not None:
            run_application(_application(previous), GRPC, GRPC, None)
        else:
            serve.delete(GRPC)
        raise


def _application(gateway: Gateway) -> Any:
    frontend, backends = gateway.frontend, gateway.backends.values()
    issuers = {backend.issuer for backend in backends}
    # If an endpoint requires no token, the server requires none; replicas check the tokens of the others.
    accepted = [] if None in issuers else sorted((issuer for issuer in issuers if issuer), key=repr)
    max_message_bytes = max(backend.max_body_bytes for backend in backends)
    tls = None
    certificate_files = []
    if frontend.certificate and frontend.key:
        tls = Tls(certificate=frontend.certificate, key=frontend.key)
        certificate_files = [Path(file).read_text() for file in (frontend.certificate, frontend.key)]
    inputs = [frontend.host, frontend.grpc_port, frontend.url, certificate_files]
    server = create_deployment(
        GrpcServer,
        GRPC,
        [*inputs, [issuer.model_dump() for issuer in accepted], max_message_bytes],
        ray_actor_options={"num_cpus": 0},
        # The old replica must release the port before the new one listens on it.
        max_surge_percent=0,
    )
    return server.bind(frontend.host, frontend.grpc_port, frontend.url, tls, accepted, max_message_bytes)
