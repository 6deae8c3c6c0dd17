import json

import pytest

from app.config.serving import Issuer
from app.errors import UserError
from app.serving.gateway import haproxy, settings
from app.serving.gateway.frontend import Backend, Frontend, Gateway
from app.state.home import GATEWAY_FOLDER_VARIABLE

SECURED = Backend(Issuer(issuer="i", jwks="/keys.json"), 1.0, 1000)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "settings"
    monkeypatch.setenv(GATEWAY_FOLDER_VARIABLE, str(folder))
    return folder


def create_gateway(backends=None, **frontend) -> Gateway:
    defaults = {"host": "127.0.0.1", "port": 8000, "certificate": None, "key": None, "grpc_port": None}
    return Gateway(Frontend(**{**defaults, **frontend}), backends or {})


def test_a_gateway_is_read_as_it_was_written(folder):
    gateway = create_gateway({"one": SECURED, "two": Backend(None, 2.5, 1)}, connections_per_address=7)
    with settings.applied(gateway):
        pass
    assert settings.read() == gateway
    stored = haproxy.settings()
    assert (stored["host"], stored["pem"], stored["connections_per_address"]) == ("127.0.0.1", None, 7)
    assert stored["max_wait_s"] == {"one": 1.0, "two": 2.5}
    assert (folder / haproxy.SETTINGS_FILE).stat().st_mode & 0o777 == 0o600


def test_settings_of_an_earlier_version_are_not_read(folder):
    folder.mkdir()
    (folder / haproxy.SETTINGS_FILE).write_text(json.dumps({"host": "127.0.0.1"}))
    assert settings.read() is None


def test_a_failure_restores_the_previous_settings(folder):
    with pytest.raises(KeyError), settings.applied(create_gateway()):
        raise KeyError
    assert settings.read() is None
    previous = create_gateway({"one": SECURED}, host="127.0.0.2")
    with settings.applied(previous):
        pass
    with pytest.raises(KeyError), settings.applied(create_gateway()):
        raise KeyError
    assert settings.read() == previous
    settings.remove()
    assert list(folder.iterdir()) == []


def test_a_renewed_certificate_gets_its_own_file(folder, tmp_path):
    """The previous file may be needed again, and HAProxy may be reading it."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text("1")
    key.write_text("key")
    gateway = create_gateway(certificate=str(certificate), key=str(key))

    def pem_contents():
        return sorted(file.read_text() for file in folder.glob("*.pem"))

    with settings.applied(gateway):
        assert pem_contents() == ["1\nkey"]
    certificate.write_text("2")
    with settings.applied(gateway):
        assert pem_contents() == ["1\nkey", "2\nkey"]
    assert pem_contents() == ["2\nkey"]


def test_a_missing_certificate_is_refused_and_changes_nothing(folder, tmp_path):
    gateway = create_gateway(certificate=str(tmp_path / "missing.pem"), key=str(tmp_path / "missing.key"))
    with pytest.raises(UserError, match="the files of the certificate"), settings.applied(gateway):
        pass
    assert settings.read() is None
