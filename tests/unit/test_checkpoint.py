import json

import pytest
import torch

from app.data.features import Layout
from app.models.tabular import MultiLayerPerceptron
from app.training import checkpoint

LAYOUT = Layout(dense=3, embeddings=((5, 2),))


def started() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = MultiLayerPerceptron(LAYOUT, [8], dropout=0.0)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        places = torch.randint(0, 5, (16, 1), generator=random)
        x = torch.cat([torch.rand(16, 3, generator=random), places], dim=1)
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.zero_grad()
        (model(x) - x[:, 0]).square().mean().backward()
        optimizer.step()


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = started()
    steps(*whole, 0, 9)

    stopped = started()
    steps(*stopped, 0, 4)
    history = [{"epoch": 0, "train_loss": 0.1 + 0.2}]
    checkpoint.save(tmp_path, *stopped, {"history": history, "scaler": {}})

    resumed = started()
    steps(*resumed, 50, 53)  # whatever it held before
    assert checkpoint.restore(tmp_path, *resumed) == {"history": history, "scaler": {}}
    steps(*resumed, 4, 9)

    for name, value in whole[0].state_dict().items():
        assert torch.equal(resumed[0].state_dict()[name], value), name
    ours, theirs = (json.dumps(optimizer.state_dict()["param_groups"]) for _, optimizer in (resumed, whole))
    assert ours == theirs
    for index, values in whole[1].state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(resumed[1].state_dict()["state"][index][name], value), (index, name)


def test_a_forgotten_optimizer_state_would_be_noticed():
    """The test above can fail: without AdamW's moments the end is another one."""
    whole = started()
    steps(*whole, 0, 9)
    stopped = started()
    steps(*stopped, 0, 4)
    fresh = torch.optim.AdamW(stopped[0].parameters(), lr=0.05, weight_decay=0.1)
    steps(stopped[0], fresh, 4, 9)
    assert not torch.equal(stopped[0].layers[0].weight, whole[0].layers[0].weight)


def test_before_the_first_step_there_is_no_state_and_that_is_fine(tmp_path):
    model, optimizer = started()
    checkpoint.save(tmp_path, model, optimizer, {})
    again, others = started()
    assert checkpoint.restore(tmp_path, again, others) == {}
    steps(again, others, 0, 1)


def test_is_safetensors_and_json_alone(tmp_path):
    model, optimizer = started()
    steps(model, optimizer, 0, 1)
    checkpoint.save(tmp_path, model, optimizer, {"history": []})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    json.loads((tmp_path / "state.json").read_text())
    for file in tmp_path.glob("*.safetensors"):
        content = file.read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_another_models_checkpoint_is_refused(tmp_path):
    model, optimizer = started()
    checkpoint.save(tmp_path, model, optimizer, {})
    other = MultiLayerPerceptron(LAYOUT, [9], dropout=0.0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpoint.restore(tmp_path, other, torch.optim.AdamW(other.parameters()))
