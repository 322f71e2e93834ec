"""A folder of finished pictures, measured alone, or beside a folder of real ones."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.config import RunConfig
from ldm.data.images import Batch, ImageData, Sample
from ldm.data.reading import image_size, pictures
from ldm.data.subset import held_out
from ldm.data.transforms import to_hint, to_image
from ldm.denoiser import AdapterUse
from ldm.evaluation import sets
from ldm.evaluation.arms import Plan, plan_without
from ldm.evaluation.obedience import obedience
from ldm.evaluation.references import centred
from ldm.evaluation.report import Evaluation
from ldm.evaluation.run import PICTURES, compare, output, write
from ldm.evaluation.sets import Truth
from ldm.registry import ConfigError
from ldm.training import distributed

ARM = "pictures"
SAMPLES = "samples.jsonl"  # what sample.py writes: its folders have a grid too, which is no sample
LISTS = {SAMPLES: ("file", "prompt"), "metadata.jsonl": ("file", "text")}  # name -> keys of a picture and its caption


class Pictures(ImageData):
    """Square pictures of one size, each with a caption and a real picture where there are any.

    The picture is the hint "pictures"; the sample's image is the real one, or else the picture too.
    """

    def __init__(self, files: Sequence[Path], captions: Mapping[str, str], real: Sequence[Path]) -> None:
        """Args: files: the pictures. captions: name of a file -> its caption. real: of each file, or none of all."""
        self._files, self._captions, self._real = files, captions, real
        found = {image_size(file): file for file in files}
        if len(found) > 1 or any(w != h for w, h in found):
            said = ", ".join(f"{file.name} {w}x{h}" for (w, h), file in list(found.items())[:3])
            raise ConfigError(f"pictures in {files[0].parent} are not square or not of one size: {said}; resize them")
        self._side = next(iter(found))[0]

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Picture `index`. See ImageData.load."""
        file = self._files[index]
        pixels = centred(file, self._side)
        image = to_image(centred(self._real[index], self._side) if self._real else pixels)
        return Sample(file.name, image, self._captions.get(file.name, ""), {ARM: to_hint(pixels)})


def evaluate_folder(config: RunConfig, folder: Path, reference: Path | None = None) -> Evaluation:
    """Measure the pictures of a folder as `evaluation.pictures` and `evaluation.sets` say; written to `<folder>/eval/`.

    Captions are those of sample.py's samples.jsonl, of a metadata.jsonl, or of a .txt beside each picture. Under
    torchrun the pictures are shared out.

    Args:
        config: `evaluation:`, `sample.batch`, `device` and `train.threads` are read.
        folder: square pictures of one size, not in folders below it.
        reference: folder of real pictures: the reference of sets that name none, and, where they have the same names,
            what measures of single pictures compare with.

    Raises: ConfigError if nothing is to be measured, or pictures, captions or real pictures are lacking.
    """
    with distributed.session(config.device, config.train.threads, config.train.rank_timeout) as rank:
        measured = plan_without(ARM, config, paired=reference is not None)
        if measured is None:
            raise ConfigError("neither evaluation.pictures nor evaluation.sets is set: say what to measure")
        data, measured = _pictures(measured, folder, reference)
        for measure in measured.sets.values():
            measure.check(len(data), str(folder))
        out = output(folder / "eval")
        batch, cache = config.sample.batch, Path(config.evaluation.cache)
        truths = {
            name: Truth(sets.reference(measure, data, len(data), batch, cache, rank), None)
            for name, measure in measured.sets.items()
        }
        first = rank.part(-(-len(data) // batch)).start * batch
        batches = held_out(data, len(data), batch, rank.device, rank.part)
        found = obedience(measured, batches, _no_hints, _given, seed=0, pictures=PICTURES, rank=rank, first=first)
        result = Evaluation(config, {}, measured, found, [], compare(measured, found, truths, rank), folder)
        if rank.main:
            write(result, found.columns, out)
        rank.barrier()
    return result


def _no_hints(batch: Batch) -> dict[str, Tensor]:
    del batch
    return {}


def _given(batch: Batch, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse], seed: int) -> Tensor:
    """Instead of drawing: the pictures that are there."""
    del hints, uses, seed
    return batch.hints[ARM]


def _pictures(measured: Plan, folder: Path, reference: Path | None) -> tuple[Pictures, Plan]:
    """The data, and the plan with the reference of the sets that name none; unpaired where nothing asks for pairs."""
    if not folder.is_dir():
        raise ConfigError(f"images is {folder}, must be a folder of pictures")
    captions = _captions(folder)
    listed = [folder / name for name in captions] if (folder / SAMPLES).is_file() else pictures(folder)
    if not listed:
        raise ConfigError(f"{folder} has no pictures; subfolders are not read")
    for name, measure in measured.pictures.items():
        if measure.reads == "caption" and (bare := [file.name for file in listed if file.name not in captions]):
            raise ConfigError(
                f"evaluation.pictures: {name} reads captions, but {bare[0]} of {folder} has none: add {SAMPLES}, "
                "metadata.jsonl or .txt files"
            )
    pairing = [name for name, measure in measured.pictures.items() if measure.reads != "caption"]
    real = _real(listed, reference, f"evaluation.pictures: {pairing[0]}") if pairing else []
    entries = {name: _with(measure, reference) for name, measure in measured.sets.items()}
    return Pictures(listed, captions, real), dataclasses.replace(measured, sets=entries, paired=bool(real))


def _real(files: Sequence[Path], reference: Path | None, where: str) -> list[Path]:
    """The real picture of each, by its name without the suffix."""
    if reference is None:
        raise ConfigError(f"{where} compares with real pictures: give --reference a folder with the same names")
    known = {file.stem: file for file in pictures(reference)} if reference.is_dir() else {}
    if lacking := [file.name for file in files if file.stem not in known]:
        raise ConfigError(f"{where} compares with real pictures, but {reference} has none named like {lacking[0]}")
    return [known[file.stem] for file in files]


def _with(measure: sets.SetMeasure, reference: Path | None) -> sets.SetMeasure:
    if measure.options.reference is not None:
        return measure
    if reference is None:
        raise ConfigError(f"{measure.where}.reference is null: set it, or give --reference a folder of real pictures")
    return dataclasses.replace(measure, options=dataclasses.replace(measure.options, reference=str(reference)))


def _captions(folder: Path) -> dict[str, str]:
    """File name -> caption; empty without any. Raises: ConfigError on a list that cannot be read."""
    for name, (key, text) in LISTS.items():
        if (path := folder / name).is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            try:
                rows = [json.loads(line) for line in lines if line.strip()]
                return {str(row[key] if key in row else row["file_name"]): str(row[text]) for row in rows}
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} must have {key} and {text} in every line, a JSON object each") from error
    beside = ((file, file.with_suffix(".txt")) for file in pictures(folder))
    return {file.name: text.read_text(encoding="utf-8").strip() for file, text in beside if text.is_file()}
