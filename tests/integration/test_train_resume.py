"""Every trainer stopped midway goes on bit for bit, on one rank and on two; to rounding, with another number of ranks.

All two-rank runs share two processes, since starting those takes longest. The quick ones are in `make test-long` and
`make test-ranks`; `pytest -m slow tests/integration/test_train_resume.py` is every trainer.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import adapters  # noqa: F401
from ldm import config
from ldm.training import checkpoint, run
from tests.integration.test_train_ranks import ADAPTERS
from tests.integration.test_train_ranks import SMALL as ADAPTER
from tests.ranks import ROOT, finish, launch_two_ranks, start_ranks
from tests.small import figures, unlike

pytestmark = pytest.mark.long

TINY = ROOT / "configs" / "train" / "tiny"
STOP, END = 3, 6  # steps
SMALL = ["device=cpu", "train.threads=1", "train.precision=fp32", "train.batch=4", "train.ema=0.9", "log.every=1"]
SMALL += ["train.warmup=2", "train.decay=constant", "data.length=16", "data.size=16", "validation.data=null"]
VAE = ["model.vae.channels=[8,16]", "stage.disc_weight=0.5", "stage.disc_start=1", "stage.disc_width=8"]
VAE += ["stage.disc_layers=1", "stage.disc_norm=batch"]  # the adversary has an optimizer of its own
LDM = ["model.vae.weights=null", "model.text.weights=null", "model.unet.channels=[16,32]", "stage.cache=false"]
CLIP = ["model.clip.image.image_size=16"]
TRAINERS = {"vae": ("vae", [*SMALL, *VAE]), "clip": ("clip", [*SMALL, *CLIP]), "ldm": ("ldm", [*SMALL, *LDM])}
TRAINERS |= {name: ("ldm", [*ADAPTER, "data.length=16", *more]) for name, more in ADAPTERS.items()}
QUICK = ("clip", "seecoder")  # tests/integration/test_train.py has others on one rank
QUICK_RANKS = ("vae", "seecoder")
MOVED = ("ldm", "seecoder")  # go on with another number of ranks


def words(name: str, folder: Path, steps: int, *more: str) -> list[str]:
    """Arguments of scripts/train.py."""
    file, own = TRAINERS[name]
    every = [f"run.dir={folder}", *own, f"train.steps={steps}", "checkpoint.every=100", "checkpoint.keep_last=2", *more]
    return ["--config", str(TINY / f"{file}.yaml"), *every]


def start(name: str, folder: Path, steps: int, *more: str) -> Path:
    _, file, *overrides = words(name, folder, steps, *more)
    return run.train(config.load(file, overrides))


def last(folder: Path) -> Path:
    return folder / "checkpoints" / f"step-{END:08d}"


def check(whole: Path, parts: Path) -> None:
    """Both are done; the second one was stopped midway, and is the same for all that."""
    assert [folder.name for folder in checkpoint.complete(parts)] == [f"step-{n:08d}" for n in (STOP, END)]
    assert unlike(last(whole), last(parts)) == []
    assert figures(whole) == figures(parts)
    assert unlike(parts / "checkpoints" / f"step-{STOP:08d}", last(parts))  # it trained, and the comparison sees it


def resume_alone(name: str, folder: Path) -> None:
    start(name, folder / "whole", END)
    start(name, folder / "parts", STOP)
    start(name, folder / "parts", END)
    check(folder / "whole", folder / "parts")


@pytest.mark.parametrize("name", QUICK)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    resume_alone(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_stopped_run_of_every_trainer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    resume_alone(name, tmp_path)


def test_the_loss_scale_of_fp16_and_its_count_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that starts anew skips other steps."""
    seen: list[float] = []  # the loss scale behind each update

    class Noted(torch.amp.GradScaler):
        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=2.0**22, growth_interval=2, enabled=enabled)

        def update(self, new_scale: float | torch.Tensor | None = None) -> None:
            super().update(new_scale)
            seen.append(self.get_scale())

    monkeypatch.setattr(torch.amp, "GradScaler", Noted)
    half = ["train.precision=fp16", "stage.disc_weight=0"]
    whole = start("vae", tmp_path / "whole", 12, *half)
    undisturbed, seen[:] = [*seen], []
    stopped = checkpoint.read_state(start("vae", tmp_path / "parts", 6, *half))["scaler"]
    end = start("vae", tmp_path / "parts", 12, *half)
    assert seen == undisturbed and len(seen) == 12
    assert seen[0] < 2.0**22 and {b / a for a, b in pairwise(seen[5:])} == {0.5, 1.0, 2.0}
    assert stopped["_growth_tracker"] > 0 and stopped["scale"] == seen[5]
    assert unlike(whole, end) == [] and figures(tmp_path / "whole") == figures(tmp_path / "parts")


def resume_on_two_ranks(names: Iterable[str], folder: Path, more: Sequence[list[str]] = ()) -> None:
    """Train these on two ranks, undisturbed (`whole`) and stopped midway (`parts`); `more` are runs besides."""
    planned = [(name, kind, n) for name in names for kind, n in (("whole", END), ("parts", STOP), ("parts", END))]
    launch_two_ranks([*(words(name, folder / name / kind, n) for name, kind, n in planned), *more], folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, alone or before and after one rank's: `one` is undisturbed, the others change at STOP."""
    folder = tmp_path_factory.mktemp("quick")
    for name in MOVED:
        start(name, folder / name / "one", END)
        start(name, folder / name / "1 to 2", STOP)
    more = [words(name, folder / name / kind, n) for name in MOVED for kind, n in (("1 to 2", END), ("2 to 1", STOP))]
    resume_on_two_ranks(QUICK_RANKS, folder, more)
    for name in MOVED:
        start(name, folder / name / "2 to 1", END)
    return folder


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every")
    resume_on_two_ranks(TRAINERS, folder)
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize("name", QUICK_RANKS)
def test_a_stopped_run_of_two_ranks_goes_on_bit_for_bit(name: str, quick: Path) -> None:
    check(quick / name / "whole", quick / name / "parts")


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_stopped_run_of_every_trainer_on_two_ranks_goes_on_bit_for_bit(name: str, every: Path) -> None:
    check(every / name / "whole", every / name / "parts")


@pytest.mark.ranks
@pytest.mark.slow
def test_a_stopped_run_of_three_ranks_goes_on_bit_for_bit_where_it_is_deterministic(tmp_path: Path) -> None:
    """Sums of three depend on their order, which DDP changes behind a process's first step unless it is told not to."""
    for kind, steps in (("whole", END), ("parts", STOP), ("parts", END)):
        more = ["train.batch=6", "deterministic=true"]
        finish(start_ranks(["scripts/train.py", *words("ldm", tmp_path / kind, steps, *more)], 3))
    check(tmp_path / "whole", tmp_path / "parts")


def parameters(folder: Path) -> torch.Tensor:
    """All that a run has trained in one vector, but for key biases of attention.

    Softmax ignores those: their gradient is rounding, which Adam blows up to whole steps.
    """
    state = checkpoint.read_state(last(folder))
    found: list[torch.Tensor] = []
    for name, p in zip(state["names"]["model"], state["parameters"]["model"], strict=True):
        query, _, value = p.chunk(3) if name.endswith("in_proj_bias") else (p, p, p[:0])
        found += [query.flatten(), value.flatten()]
    return torch.cat(found)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["1 to 2", "2 to 1"])
@pytest.mark.parametrize("name", MOVED)
def test_a_stopped_run_goes_on_with_another_number_of_ranks_to_rounding(name: str, kind: str, quick: Path) -> None:
    one, moved = (quick / name / which for which in ("one", kind))
    losses = [{key: x for key, x in figures(run).items() if key.endswith(" loss")} for run in (one, moved)]
    assert len(losses[0]) == END and losses[1] == pytest.approx(losses[0], abs=1e-6, rel=0)
    a, b = parameters(one), parameters(moved)
    print(f"weights differ by {(a - b).norm() / a.norm():.1e} of themselves")
    assert 0 < (a - b).norm() < 1e-6 * a.norm()  # 0: nothing was added up in another order, so two ranks were none
