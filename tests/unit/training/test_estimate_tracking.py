"""The tracker on real tensors, against sums worked by hand."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.training.tracking import Tracker, gradients_as, tensors

FLOAT = 4  # bytes
CPU = torch.device("cpu")


def chain() -> Tensor:
    a = torch.zeros(100)
    b = a + 1  # both alive: 200 numbers
    del a
    c = b[:50]  # a view
    c.mul_(2)  # in place
    return torch.cat([c, c])  # 100 more


def test_peak_is_the_highest_sum_of_what_is_alive() -> None:
    with Tracker(CPU, "rest") as tracker:
        kept = chain()
        assert tracker.alive == {"rest": FLOAT * 100}
        assert tracker.peak == {"rest": FLOAT * 200}
        more = [torch.zeros(100), torch.zeros(150)]
        assert tracker.peak == {"rest": FLOAT * 350}
        del more
        tracker.start()
        assert tracker.peak == {"rest": FLOAT * 100}
    del kept
    assert tracker.alive == {"rest": 0}


def test_fake_tensors_count_as_real_ones_and_give_no_numbers() -> None:
    with FakeTensorMode(), Tracker(CPU, "rest") as tracker:
        kept = chain()
        assert kept.sum().item() == 0
    assert tracker.peak == {"rest": FLOAT * 200}


def test_a_storage_is_of_one_kind_until_it_is_freed() -> None:
    with Tracker(CPU, "rest") as tracker:
        a, b = torch.zeros(10), torch.zeros(20)
        tracker.assign("weights", [a, a[:5]])
        assert tracker.alive == {"rest": FLOAT * 20, "weights": FLOAT * 10}
        assert tracker.peak == {"rest": FLOAT * 30}  # when it was highest, there was no other kind
        del a, b
        assert tracker.alive == {"rest": 0, "weights": 0}


def test_gradients_are_of_their_own_kind_when_backward_has_made_them() -> None:
    layer = nn.Linear(30, 40, bias=False)
    with Tracker(CPU, "rest") as tracker:
        with gradients_as(tracker, "gradients", layer.parameters()):
            layer(torch.ones(1, 30)).sum().backward()
        assert tracker.alive["gradients"] == FLOAT * 30 * 40
        layer.weight.grad = None
        layer(torch.ones(1, 30)).sum().backward()  # outside: not marked
        assert tracker.alive["gradients"] == 0


def test_tensors_are_found_in_nested_containers() -> None:
    x, y = torch.zeros(1), torch.zeros(2)
    found = tensors({"a": [x, 1], "b": ("text", {"c": y}), "d": None})
    assert len(found) == 2 and found[0] is x and found[1] is y
