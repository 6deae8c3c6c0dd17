"""Converting texts to tokens with the encoder's own tokenizer, in a file that training and serving share."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from app.data.sources import samples
from app.errors import UserError
from app.state import files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")

TOKENIZER_FILE = "tokenizer.json"
"""File of a prepared data set and of a bundle: the tokenizer, which truncates to `max_length` tokens."""
ENCODER_FILES = ("config.json", "model.safetensors", TOKENIZER_FILE)


def encoder_folder(encoder: str) -> Path:
    """The folder of an encoder, which is a sample's name or a path.

    Raises UserError if a file is missing, or if the encoder is not a BERT.
    """
    folder = samples.encoder(encoder) if encoder in samples.ENCODERS else Path(encoder).expanduser()
    missing = [name for name in ENCODER_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model.encoder: {encoder} must be a folder with {', '.join(ENCODER_FILES)}, or one of the "
            f"samples {', '.join(samples.ENCODERS)}; there is no {folder / missing[0]}"
        )
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise UserError(
            f"model.encoder: {folder / 'config.json'} must be a JSON object, but it is not"
        ) from None
    if model_type != "bert":
        raise UserError(
            f"model.encoder: {encoder} must have the model_type bert; its config.json has {model_type!r}"
        )
    return folder


def version(encoder: str) -> str:
    """The SHA-256 of an encoder's files."""
    folder = encoder_folder(encoder)
    digests = [bytes.fromhex(files.sha256(folder / name)) for name in ENCODER_FILES]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def write(encoder: str, max_length: int, file: Path) -> None:
    """Write the encoder's tokenizer, set to truncate to `max_length` tokens and not to pad.

    Raises UserError if the encoder takes fewer tokens than that.
    """
    folder = encoder_folder(encoder)
    max_positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    if max_length > max_positions:
        raise UserError(
            f"features: max_length must be at most {max_positions} for {encoder}; it is {max_length}"
        )
    tokenizer = load(folder / TOKENIZER_FILE)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    tokenizer.save(str(file))


def load(file: Path) -> "Tokenizer":
    """The tokenizer in a file. Raises UserError if the file is not a tokenizer."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{file}: must be a tokenizer, but it cannot be read: {error}") from None


def encode(tokenizer: "Tokenizer", texts: Iterable[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (rows, longest) int64, with 0 after the end of a text, and lengths in tokens (rows,) int64.

    None is read as the empty text.
    """
    encodings = tokenizer.encode_batch_fast([text or "" for text in texts])
    lengths = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
    ids = np.zeros((len(encodings), lengths.max(initial=0)), dtype=np.int64)
    for row, encoding in zip(ids, encodings, strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return ids, lengths


def pad(ids: Array, lengths: Array) -> tuple[Array, Array]:
    """Token ids cut to the longest text, and the mask, int64, with 1 at a token and 0 at padding: both
    (rows, longest).

    Training pads PyTorch tensors and serving NumPy arrays; the operations here mean the same for both.
    """
    longest = max([1, *lengths.tolist()])
    cut = ids[:, :longest]
    positions = (cut == cut).cumsum(1)  # 1, 2, 3 ... in each row
    return cut, (positions <= lengths[:, None]) * 1
