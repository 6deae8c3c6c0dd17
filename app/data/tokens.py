"""Texts to tokens: the encoder's own tokenizer, in a file that training and serving share."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from app.data.sources import samples
from app.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")

FILE = "tokenizer.json"
"""In a prepared folder and in a bundle: with the cut at `max_length` in it."""
ENCODER_FILES = ("config.json", "model.safetensors", FILE)


def encoder_folder(encoder: str) -> Path:
    """The folder of an encoder: a sample's, or the path itself.

    Raises UserError if it is not whole, or no BERT's.
    """
    folder = samples.encoder(encoder) if encoder in samples.ENCODERS else Path(encoder).expanduser()
    missing = [name for name in ENCODER_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model.encoder: {encoder} must be a folder with {', '.join(ENCODER_FILES)}, or one of the "
            f"samples {', '.join(samples.ENCODERS)}; there is no {folder / missing[0]}"
        )
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise UserError(f"model.encoder: {folder / 'config.json'} is no JSON object") from None
    if kind != "bert":
        raise UserError(f"model.encoder: {encoder} must be of the type bert; its config.json says {kind!r}")
    return folder


def version(encoder: str) -> str:
    """The SHA-256 of an encoder's files."""
    digest = hashlib.sha256()
    for name in ENCODER_FILES:
        with (encoder_folder(encoder) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write(encoder: str, max_length: int, file: Path) -> None:
    """The encoder's tokenizer, cut at `max_length` tokens and without padding.

    Raises UserError if the encoder takes no texts of that length.
    """
    folder = encoder_folder(encoder)
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    if max_length > longest:
        raise UserError(f"features: max_length must be at most {longest} for {encoder}; it is {max_length}")
    tokenizer = load(folder / FILE)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    tokenizer.save(str(file))


def load(file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # it raises no other
        raise UserError(f"{file}: is no tokenizer: {error}") from None


def pad(ids: Array, lengths: Array) -> tuple[Array, Array]:
    """Cut tokens (rows, any length) to the longest text, and make the mask: 1 where a text has a token.

    Both are (rows, longest), the mask int64. Training pads PyTorch tensors and serving NumPy arrays; the few
    operations here mean the same for both.
    """
    longest = max([1, *lengths.tolist()])
    cut = ids[:, :longest]
    places = (cut == cut).cumsum(1)  # 1, 2, 3 ... in each row
    return cut, (places <= lengths[:, None]) * 1


def encode(tokenizer: "Tokenizer", texts: Iterable[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, longest) with 0 after a text's end, int64, and their number, int64 (rows,).

    None is read as the empty text.
    """
    found = tokenizer.encode_batch_fast([text or "" for text in texts])
    lengths = np.array([len(each.ids) for each in found], dtype=np.int64)
    ids = np.zeros((len(found), lengths.max(initial=0)), dtype=np.int64)
    for row, each in zip(ids, found, strict=True):
        row[: len(each.ids)] = each.ids
    return ids, lengths
