import asyncio
import socket

import pytest

from app.config.serving import Tls
from app.serving.gateway.grpc import GrpcServer


class LocalServer(GrpcServer):
    """Serve awaits what `__del__` returns; Python does not."""

    def __del__(self):
        pass


def start(**settings):
    """Start a server that cannot start, and return the error."""

    async def run():
        server = LocalServer("127.0.0.1", settings.pop("port"), "http://127.0.0.1:8000", **settings)
        try:
            await server.check_health()
        finally:
            assert server._server is None
            await server._service.close()

    with pytest.raises((RuntimeError, OSError)) as raised:
        asyncio.run(run())
    return raised.value


def test_a_port_in_use_is_an_error():
    """Otherwise another process would answer on the port, and Serve would report its server as healthy."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        error = start(port=other.getsockname()[1], tls=None)
    assert isinstance(error, RuntimeError)


def test_a_missing_certificate_is_an_error(tmp_path):
    (tmp_path / "cert.pem").write_text("")
    tls = Tls(certificate=str(tmp_path / "cert.pem"), key=str(tmp_path / "missing.pem"))
    assert isinstance(start(port=0, tls=tls), FileNotFoundError)
