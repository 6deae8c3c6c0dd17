"""The encoder's files and its tokenizer, with a tiny encoder."""

import json

import numpy as np
import pytest
import torch

from app.data import tokens
from app.errors import UserError
from tests import encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoders.build(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def tokenizer(folder, tmp_path):
    tokens.write(str(folder), 6, tmp_path / "tokenizer.json")
    return tokens.load(tmp_path / "tokenizer.json")


def test_a_sample_is_an_encoder():
    assert (tokens.encoder_folder("minilm") / "model.safetensors").exists()


def test_a_missing_file_of_an_encoder_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"model.encoder: nowhere must be a folder with config.json, .*minilm"
    ):
        tokens.encoder_folder("nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"there is no {tmp_path}/model.safetensors"):
        tokens.encoder_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (json.dumps({**encoders.CONFIG, "model_type": "t5"}), "must have the model_type bert; .* has 't5'"),
        ("[]", "config.json must be a JSON object, but it is not"),
        ("{", "config.json must be a JSON object, but it is not"),
    ],
)
def test_an_encoder_that_is_not_a_bert_is_refused(config, message, tmp_path):
    other = encoders.build(tmp_path / "other")
    (other / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        tokens.encoder_folder(str(other))


def test_the_version_depends_on_the_weights(folder, tmp_path):
    version = tokens.version(str(folder))
    assert version == tokens.version(str(encoders.build(tmp_path / "same")))
    assert version != tokens.version(str(encoders.build(tmp_path / "other", seed=1)))


def test_texts_are_truncated_to_the_length_in_the_file(tokenizer):
    ids, lengths = tokens.encode(tokenizer, ["a good day", "we good good good good good good", "", None])
    assert lengths.tolist() == [5, 6, 2, 2]
    assert ids.shape == (4, 6)
    assert ids[0].tolist() == [2, *ids[0, 1:4], 3, 0]
    assert ids[1, -1] == 3, "a truncated text keeps its end token"


def test_no_texts_have_no_tokens(tokenizer):
    ids, lengths = tokens.encode(tokenizer, [])
    assert (ids.shape, lengths.shape) == ((0, 0), (0,))


@pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["serving", "training"])
def test_a_batch_is_cut_to_its_longest_text(array):
    ids, mask = tokens.pad(array(np.arange(10).reshape(2, 5)), array([1, 3]))
    assert ids.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert str(ids.dtype).removeprefix("torch.") == str(mask.dtype).removeprefix("torch.") == "int64"


@pytest.mark.parametrize("array", [np.zeros, torch.zeros], ids=["serving", "training"])
def test_no_texts_are_a_batch_too(array):
    ids, mask = tokens.pad(array((0, 5)), array(0))
    assert ids.shape == mask.shape == (0, 1)


def test_a_length_beyond_the_encoders_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"max_length must be at most 32 for .*; it is 33"):
        tokens.write(str(folder), 33, tmp_path / "tokenizer.json")


def test_a_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="must be a tokenizer, but it cannot be read"):
        tokens.load(tmp_path / "tokenizer.json")
