import pytest
import torch

from app.training import device

CPU = torch.device("cpu")


def test_the_random_state_is_restored():
    torch.manual_seed(1)
    state = device.random_state(CPU)
    drawn = torch.rand(3)
    torch.rand(5)
    second_row = torch.stack([torch.zeros_like(state), state])[1]  # a view, as of the second rank
    device.restore_random_state(second_row, CPU)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_precision_on_the_cpu(setting, dtype):
    assert device.precision(setting, CPU) is dtype
