"""What checkpoints, figures and averages take of a training's time at their default intervals; prints a table.

In processor time of this process, which other work on the machine leaves alone; waiting for a disk is not in it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import adapters  # noqa: F401
from ldm import config
from ldm.config import CheckpointConfig, LogConfig
from ldm.training import loop, run, stream
from ldm.training.ema import EMA
from ldm.training.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS, LOGGED, SAVED = 24, 4, 8  # steps measured, and between lines and checkpoints meanwhile
DEFAULTS = {"averages": 1, "figures": LogConfig().every, "checkpoint": CheckpointConfig().every}


class Clock:
    """Processor seconds by name, and how often each was entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.times: dict[str, int] = defaultdict(int)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.process_time() - begun
                self.times[name] += 1

        return timed

    def each(self, name: str) -> float:
        return self.seconds[name] / self.times[name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_checkpoints_figures_and_averages_take_less_than_3_percent_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / "data" / "emoji").is_dir():
        pytest.skip("data/emoji is not there: see docs/emoji.md")
    monkeypatch.chdir(ROOT)
    clock, batches = Clock(), stream.batches
    parts = {"averages": (EMA, "update"), "figures": (loop, "_read_window"), "checkpoint": (loop.state_module, "save")}
    parts |= {"of the step": (loop, "step_figures"), "line": (Metrics, "scalars"), "step": (loop, "_step")}
    for name, (owner, function) in parts.items():
        monkeypatch.setattr(owner, function, clock.around(name, getattr(owner, function)))

    def read(*args: Any) -> Iterator[Any]:
        source = iter(batches(*args))
        following = clock.around("data", lambda: next(source, None))
        while (found := following()) is not None:
            yield found

    monkeypatch.setattr(stream, "batches", read)
    words = [f"run.dir={tmp_path}", f"train.steps={STEPS}", "train.threads=1", "validation.data=null"]
    words += [f"log.every={LOGGED}", f"checkpoint.every={SAVED}", "device=cpu"]
    run.train(config.load(ROOT / "configs" / "train" / "emoji" / "controlnet.yaml", words))
    seconds = {name: clock.each(name) for name in ("averages", "figures", "checkpoint")}
    seconds["figures"] += clock.each("of the step") + clock.each("line")
    step = clock.each("step") - seconds["averages"] + clock.each("data")
    print(f"step {step:.3f} s of processor time, of which {clock.each('data') / step:.2%} for its data")
    shares = {name: each / DEFAULTS[name] / step for name, each in seconds.items()}
    for name, share in shares.items():
        print(f"{name}: {seconds[name]:.4f} s every {DEFAULTS[name]} steps = {share:.2%} of a step")
    assert sum(shares.values()) < 0.03 and clock.each("data") / step < 0.03
