import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.models.dropout import Dropout
from ldm.training.draws import Draws, cubic, generator
from ldm.transfer import send


def test_row_i_depends_on_seed_purpose_and_position_alone() -> None:
    together = Draws(3, [10, 11, 12, 13]).normal("noise", 4, 2)
    assert together.shape == (4, 4, 2) and together.dtype == torch.float32
    for split in ([[10], [11], [12], [13]], [[10, 11], [12, 13]], [[12, 13], [10, 11]]):
        for positions in split:
            rows = together[[p - 10 for p in positions]]
            assert torch.equal(Draws(3, positions).normal("noise", 4, 2), rows)


def test_seed_purpose_and_position_all_matter() -> None:
    base = generator(0, "noise", 5).initial_seed()
    others = [(1, "noise", 5), (0, "t", 5), (0, "noise", 6), (0, "noise5", 0), (0, "noise/5", 5)]
    assert base not in {generator(*other).initial_seed() for other in others}
    assert generator(0, "noise", 5).initial_seed() == base


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    Draws(0, [1, 2]).normal("noise", 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("split", [[[4, 5, 6, 7]], [[4, 5], [6, 7]], [[6], [4], [7], [5]]])
def test_dropout_draws_for_each_position_whatever_shares_its_batch(split: list[list[int]]) -> None:
    layer, twice = Dropout(0.5), 2  # rows of each sample

    def dropped(positions: list[int], seed: int = 0) -> torch.Tensor:
        Draws(seed, positions).seed_layers(layer, 0)
        first, second = layer(torch.ones(twice * len(positions), 64)), layer(torch.ones(twice * len(positions), 64))
        assert not torch.equal(first, second)
        return torch.stack([first, second]).view(2, len(positions), twice, 64)

    together = dropped([4, 5, 6, 7])
    for positions in split:
        assert torch.equal(dropped(positions), together[:, [p - 4 for p in positions]])
    assert len({row.numpy().tobytes() for row in together.flatten(0, 2)}) == 2 * 4 * twice
    assert not torch.equal(dropped([4], seed=1), together[:, :1])


def test_what_layers_draw_for_all_is_drawn_by_the_step() -> None:
    def drawn(seed: int, step: int, *positions: int) -> torch.Tensor:
        Draws(seed, positions).seed_layers(Dropout(0.5), step)
        return torch.rand(8)

    assert torch.equal(drawn(0, 3, 7, 8), drawn(0, 3, 9))
    assert not torch.equal(drawn(0, 3, 7), drawn(0, 4, 7)) and not torch.equal(drawn(0, 3, 7), drawn(1, 3, 7))


def test_draws_follow_their_distributions() -> None:
    draws = Draws(0, range(2000))
    normal, uniform, integers = draws.normal("a", 8), draws.uniform("b"), draws.integers("c", 10)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert uniform.shape == (2000,) and 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
    assert integers.dtype == torch.int64 and integers.unique().tolist() == list(range(10))
    assert (integers.bincount() - 200).abs().max() < 60


def test_cubic_times_prefer_the_noisy_end_and_never_reach_t() -> None:
    t = cubic(torch.rand(2_000_000), 1000)  # P(t >= a T) = (1 - a)^(1/3)
    assert t.double().mean().sub(749.5).abs() < 1
    assert (t >= 667).double().mean().sub(0.693).abs() < 0.002
    assert (t < 333).double().mean().sub(0.126).abs() < 0.002
    assert cubic(torch.tensor([0.0, 1 - 2**-24]), 1000).tolist() == [999, 0]


def test_timesteps_are_uniform_or_cubic_per_position() -> None:
    draws = Draws(0, range(300))
    assert torch.equal(draws.timesteps("uniform", 1000), draws.integers("timestep", 1000))
    assert draws.timesteps("cubic", 1000).float().mean() > 650
    assert torch.equal(Draws(0, [7]).timesteps("cubic", 1000), draws.timesteps("cubic", 1000)[7:8])


def test_neighbouring_positions_are_uncorrelated() -> None:
    rows = Draws(0, range(512)).normal("noise", 64)
    neighbours = (rows[1:] * rows[:-1]).mean()
    assert abs(neighbours) < 4 / (511 * 64) ** 0.5


def test_draws_for_a_gpu_are_pinned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pin") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_, **__: calls.append("to") or x)
    Draws(0, [1, 2], torch.device("cuda", 0)).normal("noise", 3)
    assert calls == ["pin", "to"]
    Draws(0, [1, 2], "cpu").normal("noise", 3)
    assert calls == ["pin", "to", "to"]


def test_a_dry_run_for_a_gpu_sends_tensors_without_memory() -> None:
    with FakeTensorMode():
        assert send(torch.zeros(2), "cuda").device.type == "cuda"
