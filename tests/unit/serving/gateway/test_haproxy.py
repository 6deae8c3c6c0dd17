"""The program that Ray Serve starts instead of HAProxy."""

import os
import re
import subprocess
import sys

import pytest

from app.serving.gateway import haproxy
from app.serving.gateway.haproxy_config import edit
from app.state import hooks
from app.state.home import GATEWAY_FOLDER_VARIABLE, GATEWAY_SECRET_VARIABLE
from tests.unit.serving.gateway.test_haproxy_config import serve_configuration


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(GATEWAY_SECRET_VARIABLE, "0123")


@pytest.fixture
def configuration(tmp_path):
    return serve_configuration(tmp_path, [30001])


def run(configuration, **environment):
    """Start the program, which has HAProxy check the configuration."""
    command = [sys.executable, "-m", "app.serving.gateway.haproxy", "-c", "-f", configuration]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30
    )


def test_a_proof_reveals_neither_the_other_nor_the_secret():
    request_proof, response_proof = haproxy.proofs("0123").values()
    assert request_proof != response_proof
    assert "0123" not in (request_proof, response_proof)
    assert response_proof not in haproxy.proofs(request_proof).values()


def test_without_settings_the_defaults_apply(tmp_path, monkeypatch):
    monkeypatch.setenv(GATEWAY_FOLDER_VARIABLE, str(tmp_path))
    assert haproxy.settings() == {}


def test_without_a_secret_haproxy_does_not_start(configuration, monkeypatch):
    monkeypatch.delenv(GATEWAY_SECRET_VARIABLE)
    done = run(configuration)
    assert (done.returncode, GATEWAY_SECRET_VARIABLE in done.stderr) == (1, True)


def test_the_program_executes_haproxy_with_the_edited_configuration(configuration):
    """The variable that makes Serve start the program must not make the program start itself."""
    edited = edit(configuration.read_text(), {})
    done = run(configuration, RAY_SERVE_HAPROXY_BINARY_PATH="/nowhere/raylway-haproxy")
    assert done.returncode == 0, done.stderr
    assert "Configuration file is valid" in done.stdout
    assert configuration.read_text() == edited


def test_a_failed_edit_is_reported_and_haproxy_does_not_start(configuration):
    changed = configuration.read_text().replace("http-reuse always", "http-reuse safe")
    configuration.write_text(changed)
    refused = run(configuration)
    assert refused.returncode == 1
    assert refused.stderr.startswith("[ALERT] Ray Serve's HAProxy configuration must match '^ *http-reuse")
    assert configuration.read_text() == changed
    (fault,) = hooks.reported()
    assert re.match(r"haproxy-.*: Ray Serve's HAProxy configuration must match '\^ \*http-reuse", fault)
    configuration.write_text(changed.replace("http-reuse safe", "http-reuse always"))
    assert run(configuration).returncode == 0
    assert list(hooks.reported()) == []
