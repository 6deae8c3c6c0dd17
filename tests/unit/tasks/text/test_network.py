import sys

import torch
from safetensors.torch import load_file

from app.data import tokens
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


def test_a_network_gives_a_probability_for_each_class():
    probabilities = network().eval()(*batch())
    assert probabilities.shape == (4, 3)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))


def test_padding_changes_nothing():
    model = network().eval()
    ids, mask = batch(rows=1, length=5)
    more = torch.nn.functional.pad(ids, (0, 7), value=9), torch.nn.functional.pad(mask, (0, 7))
    torch.testing.assert_close(model(*more), model(ids, mask))


def test_the_loss_is_the_weighted_mean_of_the_log_losses():
    model = network().eval()
    inputs, y = batch(), torch.tensor([0, 1, 2, 1])
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0])
    losses = -model(*inputs)[torch.arange(4), y].log()
    expected = (losses * weight).sum() / 4
    torch.testing.assert_close(model.loss(*inputs, y, weight), expected)


def test_a_frozen_encoder_is_not_trained_and_has_no_dropout():
    model = network(FrozenTextClassifier).train()
    ids, mask = batch()
    vectors = model.vectors(ids, mask)
    torch.testing.assert_close(vectors, model.vectors(ids, mask))
    model.loss(vectors, torch.tensor([0, 1, 2, 0]), torch.ones(4)).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


def test_a_frozen_and_a_trained_encoder_predict_the_same():
    inputs, y, weight = batch(), torch.tensor([0, 1, 2, 0]), torch.ones(4)
    trained, frozen = network().eval(), network(FrozenTextClassifier).eval()
    torch.testing.assert_close(trained(*inputs), frozen(*inputs))
    torch.testing.assert_close(
        trained.loss(*inputs, y, weight), frozen.loss(frozen.vectors(*inputs), y, weight)
    )


def test_a_network_learns_the_meaning_of_a_word():
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


def test_lower_layers_have_lower_learning_rates():
    model = network()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.5)
    scales = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert scales["head.weight"] == 1
    assert scales["encoder.encoder.layer.1.output.dense.weight"] == 0.5
    assert scales["encoder.encoder.layer.0.attention.self.query.bias"] == 0.25
    assert scales["encoder.embeddings.word_embeddings.weight"] == 0.125


def test_biases_and_norms_do_not_decay():
    model = network()
    names = {id(p): n for n, p in model.named_parameters()}
    without_decay = {
        names[id(p)] for g in parameter_groups(model, 1.0) for p in g["params"] if "weight_decay" in g
    }
    assert without_decay == {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n}


def test_with_a_frozen_encoder_only_the_head_is_trained():
    groups = parameter_groups(network(FrozenTextClassifier), 0.9)
    assert sum(p.numel() for g in groups for p in g["params"]) == 16 * 3 + 3


def test_an_encoder_is_loaded_without_its_pooler_and_without_output(tmp_path, capfd):
    folder = encoders.build(tmp_path / "tiny")
    encoder = load_encoder(folder)
    saved = load_file(folder / "model.safetensors")
    loaded = encoder.state_dict()
    assert set(loaded) == {name for name in saved if not name.startswith("pooler")}
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded)
    assert capfd.readouterr() == ("", "")


def test_importing_the_network_imports_little():
    """Every rank imports the network, and importing all of transformers takes seconds."""
    assert text.BertModel.__module__ == "transformers.models.bert.modeling_bert"
    assert "transformers.models.t5" not in sys.modules
