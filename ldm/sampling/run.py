"""Draw what a config says: every prompt with every seed, in every combination of its grid.

Images are dealt out to the ranks in whole batches, and each depends on its own prompt, seed and hints only, so the
files are the same for any number of ranks, and up to rounding for any `sample.batch`. With `sample.prepack` both are up
to rounding: each rank's first batch decides its layout.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm import build, fast, generate, registry
from ldm.conditioning import TextUse, check_rows, count_cut
from ldm.config import RunConfig
from ldm.data.reading import image_size
from ldm.denoiser import check_use
from ldm.models.text import Text
from ldm.models.unet import num_parameters
from ldm.registry import ConfigError
from ldm.samplers import Sampler
from ldm.samplers.base import OnStep
from ldm.sampling.output import Output, needed
from ldm.sampling.plan import PRECISIONS, Item, Plan, check_pair, load_hint, load_image, load_mask, load_reference
from ldm.sampling.sweep import Sweep, expand, naming
from ldm.source import Source, first_step, for_inpainting
from ldm.training import distributed

log = logging.getLogger(__name__)


def sample(config: RunConfig) -> Path:
    """Draw on all ranks of the current process group. Returns the output folder.

    Raises: ConfigError, DataError or ValueError, in one line, on anything that does not fit.
    """
    with distributed.session(config.device) as rank:
        sweep = expand(config)
        check_images(sweep)
        samplers = build_samplers(sweep)
        output = Output(sweep)
        output.check()
        models = ready_models(sweep, rank.device)
        cuts = _report(sweep, models)
        rank.barrier()  # every rank has checked the folder before its first file is written
        if rank.main:
            output.begin()
        rank.barrier()
        batches = [(job, s, b) for job, s in zip(sweep.plans, samplers, strict=True) for b in job.batches()]
        mine = batches[rank.index :: rank.world]
        with tqdm(total=sum(len(b) for *_, b in mine), desc="drawing", unit="image", disable=not rank.main) as bar:
            for job, sampler, batch in mine:
                output.write(job, batch, draw(job, models, sampler, batch))
                bar.update(len(batch))
        rank.barrier()
        if rank.main:
            output.finish(cuts)
            log.info("%s and grid.png in %s", sweep.describe(), output.folder)
        return output.folder


def dry_run(config: RunConfig) -> str:
    """Check the config, build everything without memory or weights, and say what would be drawn.

    Raises: ConfigError.
    """
    sweep = expand(config)
    job = sweep.plans[0]
    with torch.device("meta"):
        models = generate.Models(
            denoiser=build.denoiser(job.config),
            vae=build.component("vae", job.config.model.vae),
            text=build.text(job.config),
            schedule=build.schedule(job.config),
            objective=job.config.model.objective,
        )
    steps = sorted({len(sampler.timesteps) for sampler in build_samplers(sweep)})
    _check_build(sweep, models)
    h, w = job.size
    parts = {
        "unet": models.denoiser.unet,
        "vae": models.vae,
        "text": models.text,
        **dict(models.denoiser.adapters.items()),
        "fuser": models.denoiser.fuser,
    }
    files = [*job.weights.values(), *sweep.masks, *(path for prompt in job.prompts for path in prompt.files)]
    absent = [str(path) for path in dict.fromkeys(files) if not path.exists()]
    lines = [
        f"{sweep.describe()} of {h}x{w} in batches of {job.config.sample.batch}, "
        f"{' or '.join(map(str, steps))} steps each, to {job.config.out.dir}",
        *(f"{name}: {num_parameters(module):,} parameters" for name, module in parts.items() if module is not None),
        *(f"not there yet: {path}" for path in absent),
    ]
    return "\n".join(lines)


def load_models(config: RunConfig, device: torch.device) -> generate.Models:
    """Build the models once, with their weights, frozen, in `sample.precision`.

    Under fp16 the VAE stays float32: published ones overflow (SDXL's gives black images).

    Raises: ConfigError as `build.component`.
    """
    dtype = PRECISIONS[config.sample.precision]

    def ready(module: nn.Module, dtype: torch.dtype = dtype) -> Any:
        moved = build.frozen(module).to(device, dtype)
        moved.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
        return moved

    return generate.Models(
        denoiser=ready(build.denoiser(config)),
        vae=ready(build.component("vae", config.model.vae), torch.float32 if dtype == torch.float16 else dtype),
        text=None if (text := build.text(config)) is None else ready(text),
        schedule=build.schedule(config),
        objective=config.model.objective,
    )


def ready_models(sweep: Sweep, device: torch.device) -> generate.Models:
    """`load_models` for these plans, checked and packed. Raises: ConfigError or ValueError on what does not fit."""
    models = load_models(sweep.plans[0].config, device)
    check_models(sweep, models)
    if sweep.config.sample.prepack:  # after the rehearsal: layouts are for the sizes of the first call
        _prepack(models)
    return models


def _prepack(models: generate.Models) -> None:
    for module in (models.denoiser, models.vae, models.text):
        if module is not None:
            fast.prepack(module)


def draw(
    job: Plan, models: generate.Models, sampler: Sampler, items: Sequence[Item], on_step: OnStep | None = None
) -> Tensor:
    """One batch: b 3 h w in [0, 1]; `on_step` sees its latents. Raises: ValueError where a hint does not fit."""
    return generate.images(models, _request(job, items), sampler, on_step=on_step)


def _request(job: Plan, items: Sequence[Item]) -> generate.Request:
    names = list(items[0].prompt.hints)
    return generate.Request(
        [item.prompt.text for item in items],
        [item.seed for item in items],
        job.size,
        negative=[item.prompt.negative or "" for item in items],
        text=job.text,
        guidance=job.guidance,
        hints={name: torch.stack([job.hint(item.prompt, name) for item in items]) for name in names},
        uses=job.uses,
        masks={name: mask.expand(len(items), -1, -1, -1) for name, mask in job.masks().items()},
        source=_source(job, items),
        tile=job.config.sample.tile,
        sliced=job.config.sample.sliced,
    )


def _source(job: Plan, items: Sequence[Item]) -> Source | None:
    images = [load_image(path, job.size) for item in items if (path := item.prompt.image) is not None]
    masks = [load_mask(path, job.size) for item in items if (path := item.prompt.mask) is not None]
    if job.strength is None or not images:
        return None
    return Source(torch.stack(images), job.strength, torch.stack(masks) if masks else None)


def build_samplers(sweep: Sweep) -> list[Sampler]:
    """One for each plan. Raises: ConfigError, also where `sample.strength` leaves no step of it."""
    samplers: list[Sampler] = []
    for job in sweep.plans:
        with naming(job.combination):
            node, schedule = job.config.sample.sampler, build.schedule(job.config)
            samplers.append(registry.build("sampler", node, schedule=schedule))
            if job.strength is not None:
                first_step(len(samplers[-1].timesteps), job.strength)
    return samplers


def check_models(sweep: Sweep, models: generate.Models) -> None:
    """Refuse what these models cannot draw, or what their adapters do not take. Raises: ConfigError or ValueError."""
    _check_build(sweep, models)
    _rehearse(sweep, models)


def _check_build(sweep: Sweep, models: generate.Models) -> None:
    """What shows before there are weights. Raises: ConfigError."""
    size, masked, unet = sweep.plans[0].size, sweep.plans[0].prompts[0].mask is not None, models.denoiser.unet
    for_inpainting(unet, models.vae, masked=masked)
    multiple = generate.multiple_of(models)
    if any(side % multiple for side in size):
        h, w = size
        near = ", ".join(str(max(round(side / multiple), 1) * multiple) for side in size)
        raise ConfigError(
            f"sample.height, width are {h}, {w}; must be multiples of {multiple} for these models, e.g. {near}"
        )
    for job in sweep.plans:
        with naming(job.combination):
            job.text.check(models.text)
            for name, use in job.uses.items():
                check_use(name, use, models.denoiser.adapter(name), unet.spec)
    if models.text is not None:
        _check_texts(sweep, models.text)
    else:
        _check_textless(sweep, models)


def _check_textless(sweep: Sweep, models: generate.Models) -> None:
    """Refuse texts that nothing reads, and pictures that nothing gives a context. Raises: ConfigError."""
    givers = [name for name in models.denoiser.adapters if models.denoiser.adapter(name).gives_context]
    for job in sweep.plans:
        with naming(job.combination):
            if text := next((text for p in job.prompts for text in (p.text, p.negative) if text), None):
                raise ConfigError(
                    f"a prompt is {text!r:.60}, but model.text is null, so nothing reads it; drop the text, or include "
                    "a text encoder"
                )
            if not any(name in job.prompts[0].hints and job.uses[name].scale for name in givers):
                raise ConfigError(
                    f"model.text is null, and adapter {givers[0]!r}, which stands for the text, has no picture or "
                    f"scale 0; set sample.hints.{givers[0]}, and scale 1"
                )


def _check_texts(sweep: Sweep, text: Text) -> None:
    """Refuse prompts that cannot share their batch. Raises: ConfigError."""
    seen: set[tuple[Any, ...]] = set()
    for job in sweep.plans:
        for batch in job.batches():
            prompts = tuple(item.prompt.text for item in batch)
            negatives = tuple(item.prompt.negative or "" for item in batch) if job.guidance.on else None
            if (key := (job.text, prompts, negatives)) not in seen:
                seen.add(key)
                with naming(job.combination):
                    check_rows(text, prompts, job.text, negatives)


def _rehearse(sweep: Sweep, models: generate.Models) -> None:
    """Find what only an adapter's own answer shows: a hint, skip_scales or blocks that do not fit it.

    Once for all plans that ask the same of texts and adapters.
    """
    different: dict[str, Plan] = {}
    for job in sweep.plans:
        asked = (job.uses, job.text, job.prompts[0], job.guidance.on, job.guidance.image is None)
        different.setdefault(repr(asked), job)
    for job in different.values():
        with naming(job.combination):
            generate.rehearse(models, _request(job, job.batches()[0][:1]))


def check_images(sweep: Sweep) -> None:
    """Decode every image file once, so that a bad one stops the run at once. Raises: DataError, ConfigError."""
    for load in (load_hint, load_reference, load_image, load_mask):
        load.cache_clear()  # files may have changed since an earlier run of this process
    different = {str([(use.mask, use.extractor) for use in job.uses.values()]): job for job in sweep.plans}
    for job in different.values():
        with naming(job.combination):
            _check_files(job)


def _check_files(job: Plan) -> None:
    _check_there(job)
    job.masks()
    for name in job.prompts[0].hints:
        counts = {job.hint(prompt, name).shape[:-3].numel() for prompt in job.prompts}
        if len(counts) > 1:
            raise ConfigError(f"prompts have {sorted(counts)} references for {name!r}; give each prompt as many")
    for image, mask in dict.fromkeys((prompt.image, prompt.mask) for prompt in job.prompts):
        if image is not None and mask is not None:
            check_pair(image, mask)
        if image is not None:
            load_image(image, job.size)
        if mask is not None:
            load_mask(mask, job.size)


def _check_there(job: Plan) -> None:
    """Raises: ConfigError if an image file does not exist, with the key that names it."""
    s, keys = job.config.sample, dict[Path, str]()
    for name, use in job.uses.items():
        own = {"image": use.image, "mask": use.mask}
        keys |= {Path(file): f"adapters.{name}.{key}" for key, file in own.items() if file is not None}
    keys |= {Path(str(file)): f"sample.hints.{name}" for name, file in s.hints.items()}
    keys |= {Path(file): f"sample.{key}" for key, file in (("image", s.image), ("mask", s.mask)) if file is not None}
    for path in needed(job, job.prompts):
        if not path.exists():
            key = keys.get(path, "a file of sample.prompts")
            raise ConfigError(f"{key} is {path}, which does not exist; correct the path")


def _report_resized(sweep: Sweep) -> None:
    """Log, in a line for each adapter, that its maps are resized: lines that are shrunk turn thin and grey."""
    told: set[str] = set()
    for job in sweep.plans:
        for name in job.prompts[0].hints.keys() - told:
            if (
                job.uses[name].extractor is not None
                or build.reference_size(name, job.config.adapters[name]) is not None
            ):
                continue
            sizes = {prompt.hints[name]: image_size(prompt.hints[name]) for prompt in job.prompts}
            (h, w), other = job.size, {file: size for file, size in sizes.items() if size != job.size[::-1]}
            if other:
                told.add(name)
                (file, size), more = next(iter(other.items())), f" and {len(other) - 1} more" if len(other) > 1 else ""
                log.info(
                    "hint %s of %r is %dx%d (w x h)%s: resized to %dx%d, that of the drawing; lines that fade are "
                    "better drawn at that size",
                    *(file, name, *size, more, w, h),
                )


def _report(sweep: Sweep, models: generate.Models) -> dict[TextUse, dict[str, int]]:
    """Log silent adapters, resized hints, and texts longer than the text encoder's context.

    Returns: text -> tokens cut, by its use.
    """
    first = sweep.plans[0]
    for name in first.uses.keys() - first.prompts[0].hints.keys():
        log.warning("adapter %r has no hint and stays silent; set adapters.%s.image or sample.hints.%s", *[name] * 3)
    _report_resized(sweep)
    if models.text is None:
        return {}
    texts: dict[TextUse, dict[str, int]] = {}
    for job in sweep.plans:
        negatives = [p.negative for p in job.prompts if p.negative and job.guidance.on]
        texts.setdefault(job.text, {}).update(dict.fromkeys([*(p.text for p in job.prompts), *negatives], 0))
    for use, counts in texts.items():
        counts.update({text: count_cut(models.text, text, use) for text in counts})
        for text, lost in counts.items():
            if lost:
                room = models.text.towers[0].tokenizer.room
                log.warning("prompt cut: its last %d tokens do not fit into %d: %.60r", lost, room, text)
    return texts
