import subprocess

import pytest

from app.bundle import manifest, signature
from app.bundle.manifest import verify
from app.errors import UserError
from tests.bundles import build


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs, made with the commands of the documentation."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return folder


@pytest.fixture
def signed(keys, tmp_path):
    path = build(tmp_path / "bundle", seed=1)
    file = path / manifest.MANIFEST
    signature.write(file, signature.sign(file.read_bytes(), keys / "ours.pem"))
    return path


def test_a_signature_of_a_trusted_key_passes(signed, keys):
    file = signed / manifest.MANIFEST
    signature.require(file, [str(keys / "theirs.pub"), str(keys / "ours.pub")])
    verify(signed)


def test_a_manifest_changed_after_signing_is_refused(signed, keys):
    file = signed / manifest.MANIFEST
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match="is not signed by any key"):
        signature.require(file, [str(keys / "ours.pub")])


def test_another_key_or_no_signature_is_refused(signed, keys, tmp_path):
    with pytest.raises(UserError, match="is not signed by any key"):
        signature.require(signed / manifest.MANIFEST, [str(keys / "theirs.pub")])
    with pytest.raises(UserError, match="is not signed, but"):
        signature.require(build(tmp_path / "other", seed=1) / manifest.MANIFEST, [str(keys / "ours.pub")])


def test_a_file_that_is_not_a_key_is_named(signed, keys, tmp_path, monkeypatch):
    file = signed / manifest.MANIFEST
    (tmp_path / "no.pem").write_text("no key")
    with pytest.raises(UserError, match=r"no\.pem: is not a key in PEM format"):
        signature.sign(file.read_bytes(), tmp_path / "no.pem")
    with pytest.raises(UserError, match=r"gone\.pub"):
        signature.require(file, [str(tmp_path / "gone.pub")])
    with pytest.raises(UserError, match="is not a key"):
        signature.sign(file.read_bytes(), keys / "ours.pub")
    monkeypatch.delenv(signature.SIGNING_KEY, raising=False)
    with pytest.raises(UserError, match=signature.SIGNING_KEY):
        signature.signing_key()
