"""Properties of every network on rows, and the output of networks by hand."""

from typing import Literal

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from app.config import FAMILIES
from app.config.families.tabular import Linear, LinearNumbers, PeriodicNumbers
from app.data.features import Layout
from app.tasks.tabular.network import NETWORKS, Columns, SharedLinear

SETTINGS = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "hidden": [8, 4], "dropout": 0.5, "numbers": {"embed": "linear", "width": 3}},
    "tabm": {"kind": "tabm", "hidden": [8, 4], "members": 3, "numbers": {"embed": "linear", "width": 3}},
}
LAYOUTS = {
    "mixed": Layout(dense=3, embeddings=((4, 2), (6, 3))),
    "dense": Layout(dense=5, embeddings=(), numbers=(1, 3)),
    "embeddings": Layout(dense=0, embeddings=((4, 2),)),
}


def build(kind: str, layout: Layout, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    (settings,) = (k for k in FAMILIES["tabular"] if k.model_fields["kind"].annotation == Literal[kind])
    return NETWORKS[kind](settings.model_validate(SETTINGS[kind]), layout)


def matrix(layout: Layout, count: int = 7) -> torch.Tensor:
    """Random rows with known categories only."""
    random = torch.Generator().manual_seed(0)
    places = [torch.randint(1, size, (count, 1), generator=random) for size, _ in layout.embeddings]
    return torch.cat([torch.rand(count, layout.dense, generator=random), *places], dim=1)


every_model = pytest.mark.parametrize("kind", NETWORKS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@every_model
@every_layout
@pytest.mark.parametrize("count", [1, 7])
def test_a_network_gives_a_finite_probability_for_each_row(kind, layout, count):
    probabilities = build(kind, layout)(matrix(layout, count))
    assert probabilities.shape == (count,)
    assert probabilities.dtype == torch.float32
    assert torch.isfinite(probabilities).all()


@every_model
@every_layout
def test_a_row_is_predicted_the_same_in_any_batch(kind, layout):
    x = matrix(layout)
    model = build(kind, layout).eval()
    torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), model(x))


@every_model
@every_layout
def test_every_parameter_learns(kind, layout):
    model = build(kind, layout).eval()  # without dropout, which may silence a unit
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (model(matrix(layout, 200)) - 1).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0 or not torch.equal(parameter, before[name]), name


@every_model
@pytest.mark.parametrize("layout", [LAYOUTS["mixed"], LAYOUTS["embeddings"]], ids=["mixed", "embeddings"])
def test_an_unseen_value_has_the_zero_vector_and_is_not_trained(kind, layout):
    model = build(kind, layout)
    x = matrix(layout)
    x[:, layout.dense] = 0
    model(x).sum().backward()
    unseen, *others = [table.weight.grad for table in model.columns.embeddings]
    assert not unseen.any()
    for table in model.columns.embeddings:
        assert not table.weight[0].any()
    assert all(grad[1:].any() for grad in others)
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert not model.columns.embeddings[0].weight[0].any()


@every_model
def test_another_category_changes_the_answer(kind):
    layout = LAYOUTS["mixed"]
    model = build(kind, layout).eval()
    with torch.no_grad():
        for table in model.columns.embeddings:
            table.weight[1:] = torch.randn(table.weight[1:].shape, generator=torch.Generator().manual_seed(1))
    x = matrix(layout, 1).repeat(2, 1)
    x[:, 3] = torch.tensor([1.0, 2.0])
    first, second = model(x)
    assert first != second


def test_dropout_is_active_in_training_only():
    layout = LAYOUTS["dense"]
    model = build("mlp", layout)
    x = matrix(layout)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_linear_by_hand():
    model = NETWORKS["linear"](Linear(kind="linear"), Layout(dense=2, embeddings=((3, 5),)))
    with torch.no_grad():
        model.dense.weight[:] = torch.tensor([[2.0, -1.0]])
        model.dense.bias[:] = 0.5
        model.columns.embeddings[0].weight[:] = torch.tensor([[0.0], [10.0], [20.0]])
    x = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 1.0], [0.5, 1.0, 2.0]])
    assert model.logits(x).tolist() == [2 - 3 + 0.5, 10 + 0.5, 1 - 1 + 20 + 0.5]
    torch.testing.assert_close(model(x), torch.sigmoid(model.logits(x)))


def test_every_number_has_its_own_embedding():
    columns = Columns(Layout(dense=5, embeddings=((4, 2),), numbers=(1, 3)), LinearNumbers(embed="linear"))
    x = torch.rand(6, 6)
    x[:, 5] = 2
    vectors = columns(x)
    assert vectors.shape == (6, columns.width) == (6, 1 + 2 + 2 * 16)
    torch.testing.assert_close(vectors[:, :1], x[:, 4:5])
    one, two = columns.numbers.layers
    torch.testing.assert_close(vectors[:, 3:19], torch.relu(one(x[:, :1])))
    torch.testing.assert_close(vectors[:, 19:], torch.relu(two(x[:, 1:4])))


def test_periodic_embeddings_by_hand():
    settings = PeriodicNumbers(embed="periodic", width=4, frequencies=3)
    columns = Columns(Layout(dense=2, embeddings=(), numbers=(1, 1)), settings)
    x = torch.rand(5, 2)
    waves = 2 * torch.pi * x[:, 1:] * columns.numbers.frequencies[1]
    expected = columns.numbers.linear.layers[1](torch.cat([waves.sin(), waves.cos()], dim=1)).relu()
    torch.testing.assert_close(columns(x)[:, 4:], expected)


def test_members_share_the_weight_and_have_their_own_scales():
    layer = SharedLinear(members=3, width_in=4, width_out=2)
    with torch.no_grad():
        layer.scale_in.normal_()
        layer.scale_out.normal_()
    x = torch.rand(5, 4)
    together = layer(x[:, None])
    assert together.shape == (5, 3, 2)
    for member in range(3):
        alone = (x * layer.scale_in[member]) @ layer.weight.T * layer.scale_out[member] + layer.bias[member]
        torch.testing.assert_close(together[:, member], alone)


def test_members_have_their_own_losses_and_predict_the_mean():
    layout = LAYOUTS["mixed"]
    model = build("tabm", layout).eval()
    x, y = matrix(layout), torch.tensor([0.0, 1, 1, 0, 1, 0, 0])
    weight = torch.tensor([1.0, 1, 2, 1, 1, 3, 1])
    members = model.logits(x)
    assert members.shape == (7, 3)
    assert len({tuple(column.tolist()) for column in members.T}) == 3
    torch.testing.assert_close(model(x), members.sigmoid().mean(dim=1))
    total = [binary_cross_entropy(m.sigmoid(), y, weight, reduction="sum") for m in members.T]
    torch.testing.assert_close(model.loss(x, y, weight), torch.stack(total).mean() / weight.sum())


@every_model
def test_only_weights_decay(kind):
    model = build(kind, LAYOUTS["dense"])
    decayed, others = model.parameter_groups()
    names = {id(p): name for name, p in model.named_parameters()}
    assert "weight_decay" not in decayed
    assert others["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert not any(names[id(p)].endswith("weight") for p in others["params"])
