"""The text family: its network, its batches and its tokens, with a tiny encoder."""

import copy
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from app.config import Data, Source
from app.data import contract, tokens
from app.data.buckets import NUM_BATCHES, by_length
from app.data.sources import files
from app.errors import UserError
from app.tasks.text import network as text
from app.tasks.text.network import (
    FrozenTextClassifier,
    TextClassifier,
    load_encoder,
    new_encoder,
    parameter_groups,
)
from tests import encoders

CONFIG = {**encoders.CONFIG, "vocab_size": 40}


def network(kind=TextClassifier, dropout: float = 0.0) -> TextClassifier:
    torch.manual_seed(0)
    return kind(new_encoder(CONFIG), 3, dropout)


def batch(rows: int = 4, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    return tokens.pad(ids, lengths)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoders.build(tmp_path_factory.mktemp("encoders") / "tiny")


class TestNetwork:
    def test_gives_a_probability_for_each_class(self):
        given = network().eval()(*batch())
        assert given.shape == (4, 3)
        torch.testing.assert_close(given.sum(dim=1), torch.ones(4))

    def test_padding_changes_nothing(self):
        model = network().eval()
        ids, mask = batch(rows=1, length=5)
        more = torch.nn.functional.pad(ids, (0, 7), value=9), torch.nn.functional.pad(mask, (0, 7))
        torch.testing.assert_close(model(*more), model(ids, mask))

    def test_the_loss_is_the_weighted_mean_of_the_log_losses(self):
        model = network().eval()
        inputs, y = batch(), torch.tensor([0, 1, 2, 1])
        weight = torch.tensor([1.0, 2.0, 0.0, 1.0])
        losses = -model(*inputs)[torch.arange(4), y].log()
        expected = (losses * weight).sum() / 4
        torch.testing.assert_close(model.loss(*inputs, y, weight), expected)

    def test_a_frozen_encoder_neither_learns_nor_drops_out(self):
        model = network(FrozenTextClassifier).train()
        ids, mask = batch()
        vectors = model.vectors(ids, mask)
        torch.testing.assert_close(vectors, model.vectors(ids, mask))
        model.loss(vectors, torch.tensor([0, 1, 2, 0]), torch.ones(4)).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}

    def test_a_frozen_and_a_learning_one_give_the_same(self):
        inputs, y, weight = batch(), torch.tensor([0, 1, 2, 0]), torch.ones(4)
        free, frozen = network().eval(), network(FrozenTextClassifier).eval()
        torch.testing.assert_close(free(*inputs), frozen(*inputs))
        torch.testing.assert_close(
            free.loss(*inputs, y, weight), frozen.loss(frozen.vectors(*inputs), y, weight)
        )

    def test_it_learns_what_a_word_says(self):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ids = torch.randint(4, 40, (96, 6), generator=torch.Generator().manual_seed(0))
        y = torch.arange(96) % 3
        ids[torch.arange(96), torch.arange(96) % 6] = y + 1
        mask, weight = torch.ones_like(ids), torch.ones(96)
        for _ in range(60):
            optimizer.zero_grad()
            model.loss(ids, mask, y, weight).backward()
            optimizer.step()
        assert (model.eval()(ids, mask).argmax(dim=1) == y).float().mean() > 0.9


class TestParameterGroups:
    def test_every_layer_down_learns_slower(self):
        groups = parameter_groups(network(), 0.5)
        names = {id(p): n for n, p in network().named_parameters()}
        model = network()
        names = {id(p): n for n, p in model.named_parameters()}
        scales = {names[id(p)]: g["lr_scale"] for g in parameter_groups(model, 0.5) for p in g["params"]}
        assert scales["head.weight"] == 1
        assert scales["encoder.encoder.layer.1.output.dense.weight"] == 0.5
        assert scales["encoder.encoder.layer.0.attention.self.query.bias"] == 0.25
        assert scales["encoder.embeddings.word_embeddings.weight"] == 0.125
        assert set(scales) == set(names.values())
        assert sum(len(g["params"]) for g in groups) == len(scales)

    def test_biases_and_norms_do_not_decay(self):
        model = network()
        names = {id(p): n for n, p in model.named_parameters()}
        free = {
            names[id(p)] for g in parameter_groups(model, 1.0) for p in g["params"] if "weight_decay" in g
        }
        assert free == {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n}

    def test_of_a_frozen_encoder_only_the_head_learns(self):
        groups = parameter_groups(network(FrozenTextClassifier), 0.9)
        assert sum(p.numel() for g in groups for p in g["params"]) == 16 * 3 + 3


class TestBuckets:
    LENGTHS = torch.randint(2, 60, (1000,), generator=torch.Generator().manual_seed(0))

    def order(self, seed: int, rows: int = 1000) -> torch.Tensor:
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))

    @pytest.mark.parametrize("rows", [1000, 990, 7, 8, 1])
    def test_every_row_stands_once(self, rows):
        order = self.order(0, rows)
        arranged = by_length(self.LENGTHS, order, 8)
        assert sorted(arranged.tolist()) == sorted(order.tolist())

    def test_follows_from_the_order_alone(self):
        first = by_length(self.LENGTHS, self.order(1), 8)
        torch.manual_seed(99)
        assert torch.equal(by_length(self.LENGTHS, self.order(1), 8), first)
        assert not torch.equal(by_length(self.LENGTHS, self.order(2), 8), first)

    def padded(self, order: torch.Tensor, batch_size: int = 8) -> int:
        return sum(len(rows) * int(self.LENGTHS[rows].max()) for rows in order.split(batch_size))

    def test_little_is_padding(self):
        tokens = int(self.LENGTHS.sum())
        assert self.padded(self.order(0)) > 1.5 * tokens
        assert self.padded(by_length(self.LENGTHS, self.order(0), 8)) < 1.1 * tokens

    def test_the_ranks_have_like_lengths_at_the_same_step(self):
        longest = [
            [int(self.LENGTHS[rows].max()) for rows in by_length(self.LENGTHS, self.order(seed), 8).split(8)]
            for seed in (1, 2)
        ]
        apart = np.abs(np.subtract(*longest))
        assert len(apart) == 125 > NUM_BATCHES
        assert np.median(apart) <= 3


class TestEncoder:
    def test_is_loaded_without_its_pooler_and_silently(self, folder, capfd):
        encoder = load_encoder(folder)
        saved = load_file(folder / "model.safetensors")
        loaded = encoder.state_dict()
        assert set(loaded) == {name for name in saved if not name.startswith("pooler")}
        assert all(torch.equal(loaded[name], saved[name]) for name in loaded)
        assert capfd.readouterr() == ("", "")

    def test_a_sample_is_known_by_its_name(self):
        assert (tokens.encoder_folder("minilm") / "model.safetensors").exists()

    def test_a_folder_that_is_none_is_refused_with_what_is_missing(self, tmp_path):
        with pytest.raises(
            UserError, match=r"model.encoder: nowhere must be a folder with config.json, .*minilm"
        ):
            tokens.encoder_folder("nowhere")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match=f"there is no {tmp_path}/model.safetensors"):
            tokens.encoder_folder(str(tmp_path))

    def test_another_type_of_encoder_is_refused(self, tmp_path):
        other = encoders.build(tmp_path / "other")
        (other / "config.json").write_text(json.dumps({**CONFIG, "model_type": "t5"}))
        with pytest.raises(UserError, match=r"must be of the type bert; its config.json says 't5'"):
            tokens.encoder_folder(str(other))

    def test_its_version_is_of_its_weights_too(self, folder, tmp_path):
        assert tokens.version(str(folder)) == tokens.version(str(encoders.build(tmp_path / "same")))
        assert tokens.version(str(folder)) != tokens.version(str(encoders.build(tmp_path / "other", seed=1)))


class TestTokens:
    @pytest.fixture
    def tokenizer(self, folder, tmp_path):
        tokens.write(str(folder), 6, tmp_path / "tokenizer.json")
        return tokens.load(tmp_path / "tokenizer.json")

    def test_are_cut_at_the_length_that_the_file_holds(self, tokenizer):
        ids, lengths = tokens.encode(tokenizer, ["a good day", "we good good good good good good", "", None])
        assert lengths.tolist() == [5, 6, 2, 2]
        assert ids.shape == (4, 6)
        assert ids[0].tolist() == [2, *ids[0, 1:4], 3, 0]
        assert ids[1, -1] == 3, "the mark of the end stays"

    @pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["serving", "training"])
    def test_a_batch_is_cut_to_its_longest_text(self, array):
        ids, mask = tokens.pad(array(np.arange(10).reshape(2, 5)), array([1, 3]))
        assert ids.tolist() == [[0, 1, 2], [5, 6, 7]]
        assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
        assert str(ids.dtype).removeprefix("torch.") == str(mask.dtype).removeprefix("torch.") == "int64"

    @pytest.mark.parametrize("array", [np.zeros, torch.zeros], ids=["serving", "training"])
    def test_no_texts_are_a_batch_too(self, array):
        ids, mask = tokens.pad(array((0, 5)), array(0))
        assert ids.shape == mask.shape == (0, 1)

    def test_more_than_the_encoder_takes_is_refused(self, folder, tmp_path):
        with pytest.raises(UserError, match=r"max_length must be at most 32 for .*; it is 33"):
            tokens.write(str(folder), 33, tmp_path / "tokenizer.json")

    def test_a_broken_file_is_refused(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match="is no tokenizer"):
            tokens.load(tmp_path / "tokenizer.json")


def test_the_graph_says_what_the_network_says(tmp_path):
    from app.tasks.text import graph as export

    model = network()
    torch.nn.init.normal_(model.head.weight)
    export.export(model, tmp_path / "model.onnx")
    lengths = np.array([2, 9, 30, 3, 3])
    ids = np.where(np.arange(30) < lengths[:, None], np.random.default_rng(0).integers(1, 40, (5, 30)), 0)
    assert export.difference(model, tmp_path / "model.onnx", ids, lengths) < 1e-5
    assert export.difference(model, tmp_path / "model.onnx", ids[:1], lengths[:1]) < 1e-5
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.head.bias)
    with pytest.raises(RuntimeError, match="differs from the trained model by"):
        export.difference(other, tmp_path / "model.onnx", ids, lengths)


def test_importing_the_network_imports_little():
    """Each rank does; transformers as a whole would take a while."""
    import sys

    assert text.BertModel.__module__ == "transformers.models.bert.modeling_bert"
    assert "transformers.models.t5" not in sys.modules


class TestContract:
    """What the source must keep, where a column is a text and the label has classes."""

    DATA = Data.model_validate(
        {
            "source": {"path": "rows.parquet"},
            "label": {"column": "mood", "classes": ["bad", "good"]},
            "columns": {"text": {"type": "text", "max_characters": 8}},
        }
    )

    def test_rows_that_keep_it(self):
        table = pa.table({"text": ["fine", "12345678"], "mood": ["good", "bad"]})
        frame, found = contract.conform(table, self.DATA)
        assert found == []
        assert frame["text"].tolist() == ["fine", "12345678"]

    def test_a_text_that_is_too_long_and_a_class_that_is_none_are_told(self):
        table = pa.table({"text": ["123456789", None], "mood": ["great", "bad"]})
        _, found = contract.conform(table, self.DATA)
        assert {(v.column, v.rule, v.count) for v in found} == {
            ("text", "must have at most 8 characters", 1),
            ("text", "must not be missing", 1),
            ("mood", "must be one of bad, good", 1),
        }

    def test_a_column_of_numbers_is_no_text(self, tmp_path):
        pa.parquet.write_table(pa.table({"text": [1], "mood": ["bad"]}), tmp_path / "rows.parquet")
        data = self.DATA.model_copy(update={"source": Source(path=str(tmp_path / "rows.parquet"))})
        with pytest.raises(UserError, match="column 'text' must hold strings, but its type is int64"):
            files.Files(data.source).check(files.kinds(data))
