"""What draws behind the web page: the models of one sample config, loaded once, and one picture at a time."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from PIL import Image
from torch import Tensor

from ldm import build, generate, grid, registry
from ldm import config as configs
from ldm.config import RunConfig
from ldm.data.errors import DataError
from ldm.demo import pictures
from ldm.prompts import MAX_SEED
from ldm.sampling import run
from ldm.sampling.output import Output
from ldm.sampling.sweep import expand
from ldm.training import distributed

MAX_STEPS: Final = 100
MAX_TEXT: Final = 1000  # letters of a prompt
PREVIEWS: Final = 8  # at most this many of a picture
UNUSED: Final = ("ddim_inversion", "lcm")  # samplers that turn pictures into noise, or need distilled weights
SHOWN: Final = ("device", "model", "adapters", "fuser", "sample", "out")  # groups of a config that sampling reads


@dataclasses.dataclass(frozen=True, slots=True)
class Voice:
    """An adapter that takes part: the picture that it hears, and its scale."""

    picture: Path
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """One picture that somebody asks for."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 30
    guidance: float = 4.0
    sampler: str = "ddim"
    voices: Mapping[str, Voice] = dataclasses.field(default_factory=dict[str, Voice])


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """How far a picture is."""

    done: int
    steps: int
    preview: Image.Image | None


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """A finished picture: its PNG with all that made it, and the config that draws it with `sample.py`."""

    file: Path
    config: Path


class LeftError(RuntimeError):
    """Nobody waits for the picture any more."""


class Studio:
    """The models of a config with all its adapters; `draw` uses those that a wish names."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Load everything, which takes seconds.

        Args:
            config: a sample config; its prompts and their hints are the examples of the page.
            folder: where pictures go, those of the visitors too.

        Raises: ConfigError, DataError or ValueError as `run.sample`.
        """
        self.config, self.folder = config, folder
        sweep = expand(dataclasses.replace(config, grid={}))
        self.examples = sweep.plans[0].prompts
        run.check_images(sweep)
        with distributed.session(config.device) as rank:
            self._models = run.ready_models(sweep, rank.device)
        self._one = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drawing")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return self.config.sample.height, self.config.sample.width

    @property
    def samplers(self) -> list[str]:
        """Names to choose from."""
        return [name for name in registry.names("sampler") if name not in UNUSED]

    def hears(self, name: str) -> str:
        """What adapter `name` wants: a "reference", a "drawing", or a "picture" that its extractor makes a hint of."""
        node = self.config.adapters[name]
        if build.reference_size(name, node) is not None:
            return "reference"
        return "drawing" if node.get("extractor") is None else "picture"

    def speaks_for_text(self, name: str) -> bool:
        """Whether the adapter stands for the prompt."""
        return self._models.denoiser.adapter(name).gives_context

    def weighable(self, name: str) -> bool:
        """Whether it has a scale between nothing and all."""
        return "scale" in self._models.denoiser.adapter(name).weighable

    def config_of(self, wish: Wish) -> RunConfig:
        """The config of one picture, without adapters that are silent. Raises: DataError on a wish out of bounds."""
        _check(wish, self.samplers)
        textless = any(self.speaks_for_text(name) for name in wish.voices)
        prompt, negative = ("", "") if textless else (wish.prompt, wish.negative)
        hints = {name: str(voice.picture) for name, voice in wish.voices.items()}
        record = {"prompt": prompt, "negative": negative, "hints": hints}
        s, nodes = self.config.sample, self.config.adapters
        kept = nodes if self.config.fuser is not None else {name: nodes[name] for name in nodes if name in wish.voices}
        scales = {name: {"scale": wish.voices[name].scale} for name in kept if name in wish.voices}
        same = s.sampler if s.sampler["name"] == wish.sampler else {}
        heard = any(self.hears(name) == "reference" for name in wish.voices)
        settings = dataclasses.replace(
            s,
            **{"prompts": [record], "negative": "", "seeds": str(wish.seed), "hints": {}, "batch": 1},
            **dict.fromkeys(("image", "mask", "strength")),
            sampler=same | {"name": wish.sampler, "steps": wish.steps},
            guidance=dataclasses.replace(s.guidance, scale=wish.guidance, **({} if heard else {"image": None})),
        )
        whole = dataclasses.replace(
            self.config,
            adapters={
                name: {k: v for k, v in node.items() if k != "image"} | scales.get(name, {})
                for name, node in kept.items()
            },
            model=dataclasses.replace(self.config.model, text=None if textless else self.config.model.text),
            sample=settings,
            grid={},
        )
        return configs.from_mapping(dataclasses.asdict(whole), "demo")

    def draw(self, wish: Wish) -> Iterator[Step | Drawn]:
        """Draw one picture; pictures of several callers wait for each other.

        Yields: `Step`s, at last the `Drawn` picture.
        Raises: ConfigError, DataError or ValueError, in one line, on a wish that does not fit.
        """
        sweep = expand(self.config_of(wish))
        job = sweep.plans[0]
        models = self._models if job.config.model.text else dataclasses.replace(self._models, text=None)

        def work(tell: Callable[[Step], None]) -> bytes:
            run.check_images(sweep)
            (sampler,) = run.build_samplers(sweep)
            run.check_models(sweep, models)
            items, steps = job.batches()[0], len(sampler.timesteps)
            every = max(-(-steps // PREVIEWS), 1)

            def on_step(i: int, x: Tensor) -> None:
                due = (i + 1) % every == 0 and i + 1 < steps
                tell(Step(i + 1, steps, _preview(models, x) if due else None))

            image = run.draw(job, models, sampler, items, on_step)[0]
            return Output(sweep).png(job, items, 0, image)

        png = yield from _streamed(self._one, work)
        yield self._kept(png, sweep.config)

    def busy(self, until: Callable[[], Any]) -> None:
        """Let every picture wait until that call returns."""
        self._one.submit(until)

    def _kept(self, png: bytes, config: RunConfig) -> Drawn:
        whole = dataclasses.asdict(config)
        node = {key: whole[key] for key in SHOWN if whole[key] is not None}
        text = "# Draws the picture of the same name: python scripts/sample.py --config FILE\n"
        file = pictures.keep(self.folder / "drawn", png)
        node["out"] = {"dir": str(self.folder / "again" / file.stem)}
        again = file.with_suffix(".yaml")
        again.write_text(text + yaml.safe_dump(node, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return Drawn(file, again)


def _check(wish: Wish, samplers: list[str]) -> None:
    """Refuse what the page's own controls would not send. Raises: DataError."""
    for what, value, least, most in (("seed", wish.seed, 0, MAX_SEED), ("steps", wish.steps, 1, MAX_STEPS)):
        if not least <= value <= most:
            raise DataError(f"{what} is {value}; allowed: {least} to {most}")
    if not 0 <= wish.guidance <= 30:
        raise DataError(f"guidance is {wish.guidance:g}; allowed: 0 to 30")
    if wish.sampler not in samplers:
        raise DataError(f"sampler is {wish.sampler!r:.40}; allowed: {', '.join(samplers)}")
    if max(len(wish.prompt), len(wish.negative)) > MAX_TEXT:
        raise DataError(
            f"a prompt has {max(len(wish.prompt), len(wish.negative)):,} letters; allowed: up to {MAX_TEXT:,}"
        )


@torch.no_grad()
def _preview(models: generate.Models, x: Tensor) -> Image.Image:
    """What a latent of one picture looks like so far."""
    with torch.autocast(x.device.type, enabled=False):
        return grid.to_pil(models.vae.from_latent(x[:1])[0].float().add(1).div(2))


def _streamed(one: ThreadPoolExecutor, work: Callable[[Callable[[Any], None]], Any]) -> Generator[Any, None, Any]:
    """Yield what work tells from its thread, and return its result. A caller who leaves makes it raise `LeftError`."""
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = threading.Event()

    def tell(value: Any) -> None:
        if left.is_set():
            raise LeftError
        told.put(value)

    future = one.submit(work, tell)
    try:
        while not (future.done() and told.empty()):
            try:
                yield told.get(timeout=0.05)
            except queue.Empty:
                continue
        return future.result()
    finally:
        left.set()
        future.cancel()
