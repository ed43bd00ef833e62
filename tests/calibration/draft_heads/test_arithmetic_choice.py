"""What a machine multiplies faster with: what is timed decides, and by more than noise."""

import pytest
import torch

from calibration.draft_heads import arithmetic_choice
from calibration.draft_heads.arithmetic_choice import bfloat16_is_faster, choose_threads


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("ratio", "faster"), [(4.0, True), (1.6, True), (1.4, False), (0.3, False)])
def test_bfloat16_is_taken_where_it_is_far_faster(monkeypatch, ratio, faster):
    seconds = {torch.float32: 1.0, torch.bfloat16: 1.0 / ratio}
    monkeypatch.setattr(arithmetic_choice, "_products", lambda dtype, _: seconds[dtype])
    assert bfloat16_is_faster() is faster


def test_a_type_that_is_emulated_is_not_timed_at_length(monkeypatch):
    asked = []

    def seconds(dtype, rows):
        asked.append((dtype, rows))
        return 1.0 if dtype == torch.float32 else 40.0

    monkeypatch.setattr(arithmetic_choice, "_products", seconds)
    assert not bfloat16_is_faster()
    assert asked == [(torch.bfloat16, 8), (torch.float32, 8)]


@pytest.mark.parametrize(("seconds_of_two", "threads"), [(0.5, 2), (0.95, 1), (6.0, 1)])
def test_threads_are_taken_where_they_share_the_work(monkeypatch, seconds_of_two, threads):
    torch.set_num_threads(2)
    monkeypatch.setattr(arithmetic_choice, "_products", lambda _, rows, count: seconds_of_two if count == 2 else 1.0)
    assert choose_threads() == threads
    assert torch.get_num_threads() == threads


def test_products_are_timed():
    torch.set_num_threads(1)
    assert choose_threads() == 1
    assert isinstance(bfloat16_is_faster(), bool)
