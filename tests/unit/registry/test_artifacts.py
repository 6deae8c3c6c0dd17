from pathlib import Path

import pytest

from app.registry.artifacts import local_folder, stored_manifest


@pytest.mark.parametrize(
    ("uri", "folder"), [("/a/b", Path("/a/b")), ("file:///a/b", Path("/a/b")), ("s3://bucket/a", None)]
)
def test_the_folder_of_a_local_uri(uri, folder):
    assert local_folder(uri) == folder


def test_the_manifest_of_a_stored_bundle(bundles, tmp_path):
    assert stored_manifest(bundles[0].as_uri()) == (bundles[0] / "MANIFEST.json").read_bytes()
    assert stored_manifest(tmp_path.as_uri()) is None
