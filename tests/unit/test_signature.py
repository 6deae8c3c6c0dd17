import subprocess

import pytest

from app.bundle import bundle, signature
from app.errors import UserError
from tests.bundles import build


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs, made as the documentation says."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return folder


@pytest.fixture
def signed(keys, tmp_path):
    path = build(tmp_path / "bundle", seed=1)
    manifest = path / bundle.MANIFEST
    signature.put(manifest, signature.signed(manifest.read_bytes(), keys / "ours.pem"))
    return path


def test_what_is_signed_by_one_whom_we_trust_passes(signed, keys):
    manifest = signed / bundle.MANIFEST
    signature.require(manifest, [str(keys / "theirs.pub"), str(keys / "ours.pub")])
    bundle.verify(signed)


def test_what_was_changed_after_it_was_signed_does_not(signed, keys):
    manifest = signed / bundle.MANIFEST
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(UserError, match="signed by nobody"):
        signature.require(manifest, [str(keys / "ours.pub")])


def test_nor_what_others_have_signed_or_nobody(signed, keys, tmp_path):
    with pytest.raises(UserError, match="signed by nobody"):
        signature.require(signed / bundle.MANIFEST, [str(keys / "theirs.pub")])
    with pytest.raises(UserError, match="is not signed"):
        signature.require(build(tmp_path / "other", seed=1) / bundle.MANIFEST, [str(keys / "ours.pub")])


def test_what_is_no_key_is_named(signed, keys, tmp_path, monkeypatch):
    manifest = signed / bundle.MANIFEST
    (tmp_path / "no.pem").write_text("no key")
    with pytest.raises(UserError, match=r"no\.pem: is no key in PEM format"):
        signature.signed(manifest.read_bytes(), tmp_path / "no.pem")
    with pytest.raises(UserError, match=r"gone\.pub"):
        signature.require(manifest, [str(tmp_path / "gone.pub")])
    with pytest.raises(UserError, match="is no key"):
        signature.signed(manifest.read_bytes(), keys / "ours.pub")
    monkeypatch.delenv(signature.SIGNING_KEY, raising=False)
    with pytest.raises(UserError, match=signature.SIGNING_KEY):
        signature.signing_key()
