"""The number of threads: chosen by time, kept by the run."""

import pytest
import torch

from clipkit.training.threads import fastest, settle_threads


@pytest.fixture(autouse=True)
def threads_as_before():
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(("seconds", "most", "expected"), [
    ({1: 8, 2: 4, 4: 2, 8: 1}, 8, 8), ({1: 8, 2: 4, 4: 2, 8: 1}, 7, 4), ({1: 8, 2: 7.5, 4: 1}, 4, 1),
    ({1: 8, 2: 5, 4: 4.9}, 4, 2), ({1: 8}, 1, 1)], ids=["all of them", "as many as there are", "two save less than a tenth",
                                                         "four neither", "one core"])
def test_threads_are_added_while_they_save_a_tenth(seconds, most, expected):
    now = [0.0]

    def work():
        now[0] += seconds[torch.get_num_threads()]

    assert fastest(work, most, clock=lambda: now[0]) == expected


def test_a_run_that_goes_on_keeps_its_threads(tiny_model):
    options = {"batch_size": 4, "workers": 1, "local_world_size": 1, "precision": "fp32"}
    assert settle_threads(tiny_model, {"threads": 2}, **options) == torch.get_num_threads() == 2
    assert settle_threads(tiny_model, None, **options | {"workers": 1000}) == torch.get_num_threads() == 1
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
