"""Looking up, fetching and signing versions, with MLflow and SQLite."""

import subprocess

import pytest

from app.bundle import manifest, signature
from app.bundle.manifest import BrokenBundle, verify
from app.errors import UserError
from app.registry import versions
from app.state.audit import Audit
from tests.versions import registered


@pytest.mark.parametrize("version", ["3", "0", "challenger", "no-such-alias", "99999999999999999999"])
def test_an_unknown_version_is_refused_with_the_known_ones(bundles, version):
    if versions.find("single", "1") is None:
        registered("single", bundles[0])
    assert versions.find("single", version) is None
    with pytest.raises(UserError) as caught:
        versions.resolve("single", version)
    assert str(caught.value) == (
        f"no version {version!r} of the model 'single' is registered; single has 1 (champion)"
    )


@pytest.mark.parametrize("version", ["1", "champion"])
def test_a_model_without_versions_is_refused_with_advice(version):
    assert versions.find("nothing", version) is None
    with pytest.raises(UserError, match="nothing has no versions; train one with `raylway train`"):
        versions.resolve("nothing", version)


@pytest.mark.parametrize(
    "name", ["o'brien", "../x", "a/b", "%2e", "", "a" * 5000, "ünï", "a\ud800b", "a\0b", 'a"b']
)
@pytest.mark.parametrize("version", ["champion", "1", "o'brien", ""])
def test_an_invalid_name_is_not_found(name, version):
    assert versions.find(name, version) is None
    with pytest.raises(UserError, match="there is no model"):
        versions.resolve(name, version)
    with pytest.raises(UserError, match="there is no model"):
        versions.versions(name)


@pytest.mark.parametrize(
    "version",
    ["o'brien", "../x", "", "a" * 3000, "٣", "-1", "1.5", "99999999999999999999", "a\ud800b", "a\0b"],
)
def test_an_invalid_version_is_not_found(version):
    assert versions.find("income", version) is None
    with pytest.raises(UserError, match="no version"):
        versions.resolve("income", version)


def test_a_changed_manifest_is_detected(bundles):
    version = registered("forged", bundles[0])
    sealed = verify(version.path)
    original = (version.path / manifest.MANIFEST).read_bytes()
    (version.path / manifest.MANIFEST).write_bytes(manifest.encoded({**sealed, "seed": 17}))
    verify(version.path)
    with pytest.raises(BrokenBundle, match=r"its MANIFEST\.json was changed"):
        versions.resolve("forged", "1")
    (version.path / manifest.MANIFEST).write_bytes(original)
    assert versions.resolve("forged", "1") == version


def test_a_signed_version_has_a_valid_signature(bundles, tmp_path):
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    registered("signed", bundles[0], "signed")
    version = versions.sign("signed", "champion", key)
    signature.require(version.path / manifest.MANIFEST, [str(public)])
    verify(version.path)
    assert Audit().entries("signed")[-1].action == "sign"
