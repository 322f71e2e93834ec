"""Inputs of diffusion training computed once, kept in memory or on disk: VAE posteriors, text conditions, features.

Both keep the same parts, made by the same calls, so their batches are equal bit for bit.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.control import Control
from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample, choose, collate
from ldm.models.vae import Posterior
from ldm.training.cache_folder import PART, Folder, Make, Part, ranges
from ldm.training.distributed import Rank
from ldm.training.signals import heeding
from ldm.training.workers import NONE, Workers, read

log = logging.getLogger(__name__)
ENCODE_BATCH = 64
HINT = "hint."  # before the names of hints among the tensors of an image
EncodeImages = Callable[[Tensor], Posterior]  # images b 3 h w in [-1, 1] -> posterior of the unscaled latent
EncodeTexts = Callable[[Sequence[str], tuple[int, int]], Control]  # captions, (height, width) in pixels -> condition
EncodePrompts = Callable[[Tensor], dict[str, Any]]  # references b 3 h w in [-1, 1] -> adapter -> features b 1 ...
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Latents:
    """A batch whose images and captions are already encoded.

    Attributes:
        mean, std: b c h w, posterior of the unscaled latent, float32.
        base: condition of the captions, all tensors b ...
        hints: name -> b 3 h w in [0, 1].
        prompts: adapter name -> encoded image prompts, a tensor b ... or a tuple of such.
    """

    keys: list[str]
    mean: Tensor
    std: Tensor
    base: Control
    hints: dict[str, Tensor] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Latents":
        """The same batch on `device`."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Latents":
        """The same batch in page-locked memory, from where `to` copies in the background; DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Latents":
        mean, std = change(self.mean), change(self.std)
        base = tree_map(change, self.base)
        return Latents(self.keys, mean, std, base, tree_map(change, self.hints), tree_map(change, self.prompts))


def tree_map(change: Callable[..., Tensor], first: T, *rest: T) -> T:
    """Change every tensor of a Control, tuple or dict, given those in its place in the others, which have the same."""
    return pytree.tree_map(lambda x, *xs: change(x, *xs) if isinstance(x, Tensor) else x, first, *rest)


@dataclass(frozen=True, slots=True)
class Encoders:
    """What encodes a data set; None where nobody reads captions or image prompts. Texts give context and vector."""

    images: EncodeImages
    texts: EncodeTexts | None
    prompts: EncodePrompts | None = None


class Rows(Protocol):
    """Parts by number, in memory or mapped."""

    def __getitem__(self, number: int, /) -> Part: ...


Keep = Callable[[str, int, Make], Rows]  # what a section is, its number of rows, how they are made -> all of them


def in_memory(rank: Rank) -> Keep:
    """Parts kept as they are. Raises: signals.Stopped, when called."""

    def keep(name: str, count: int, make: Make) -> Rows:
        del name
        with closing(make(ranges(count))) as made:
            return list(heeding(made, rank, "while encoding, of which nothing is kept without stage.cache_dir"))

    return keep


class LatentData(Dataset[Any]):
    """An encoded data set. Augmentation is frozen at the unaugmented view; captions and references are encoded once.

    Which reference a sample gets is drawn anew each time, as the data itself would.
    """

    def __init__(
        self,
        data: ImageData,
        encoders: Encoders,
        rank: Rank,
        folder: Folder | None = None,
        workers: Workers = NONE,
        keep: Keep | None = None,
    ) -> None:
        """Encode, or open what is encoded.

        Args:
            data: the samples.
            encoders: for it.
            rank: this process. In memory each has everything; a folder they fill together.
            folder: where to keep it; None is in memory.
            workers: processes that read the data.
            keep: what keeps it where no folder does; None is `in_memory`.

        Raises: DataError as `data`; ConfigError as `folder`; signals.Stopped if a rank was asked to stop.
        """
        self.length = len(data)
        self.images: Rows = []
        self.texts: Rows = []
        self.prompts: Rows = []
        self.index: Mapping[str, Any] = {}
        if folder is None or not folder.complete:
            build = _Build(data, encoders, rank, workers)
            self.index = build.fill(self, folder.section if folder else keep or in_memory(rank))
            if folder is not None:
                folder.finish({name: torch.tensor(rows, dtype=torch.int64) for name, rows in self.index.items()})
        if folder is not None:
            self.images, self.texts, self.prompts = (folder.parts(name) for name in ("images", "texts", "prompts"))
            self.index = folder.index()
        self._has = encoders.texts is not None, encoders.prompts is not None

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        """Of a sample."""
        return self.images[index // PART].words["keys"][index % PART]

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[int, int]:
        """Items are row numbers of the sample and of its reference (-1: none); `collate` gathers them in one go."""
        if not self._has[1]:
            return index, -1
        first, end = (int(row) for row in self.index["starts"][index : index + 2])
        return index, int(self.index["references"][first + choose(end - first, self.key(index), generator)])

    def collate(self, items: list[tuple[int, int]]) -> Latents:
        """Rows -> batch."""
        rows, captioned, prompted = [r for r, _ in items], *self._has
        image = _gather(self.images, rows)
        text = _gather(self.texts, [int(self.index["captions"][r]) for r in rows]) if captioned else {}
        base = Control(context=text.get("context"), vector=text.get("vector"))
        hints = {name.removeprefix(HINT): x.float() / 255 for name, x in image.items() if name.startswith(HINT)}
        prompts = _nested(_gather(self.prompts, [r for _, r in items])) if prompted else {}
        return Latents([self.key(r) for r in rows], image["mean"], image["std"], base, hints, prompts)


class _Build:
    """One encoding of a data set."""

    def __init__(self, data: ImageData, encoders: Encoders, rank: Rank, workers: Workers) -> None:
        self.data, self.encoders, self.rank, self.workers = data, encoders, rank, workers
        data.once()
        self.first = data[0]

    def fill(self, target: LatentData, keep: Keep) -> dict[str, list[int]]:
        """Encode everything, as parts of `target`. Returns: which row of captions and references belongs to what."""
        target.images = keep("images", len(self.data), self._images)
        words = [target.images[number].words for number in range(len(ranges(len(self.data))))]
        captions = [caption for part in words for caption in part["captions"]]
        index: dict[str, list[int]] = {}
        if self.encoders.texts is not None:
            rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
            target.texts = keep("texts", len(rows), lambda parts: self._texts([*rows], parts))
            index["captions"] = [rows[caption] for caption in captions]
        if self.encoders.prompts is not None:
            named = [self.data.references(key) for part in words for key in part["keys"]]
            wanted = list(dict.fromkeys(name for names in named for name in names))
            target.prompts = keep("prompts", len(wanted), lambda parts: self._prompts(wanted, parts))
            read = [word for number in range(len(ranges(len(wanted)))) for word in target.prompts[number].words["read"]]
            # No sample is left without: each could be read, with a reference of its own.
            found = {name: row for row, name in enumerate(wanted) if read[row]}
            own = [[found[name] for name in names if name in found] for names in named]
            index["references"] = [row for some in own for row in some]
            index["starts"] = [0]
            for some in own:
                index["starts"].append(index["starts"][-1] + len(some))
        return index

    def _images(self, parts: Sequence[range]) -> Generator[Part]:
        """VAE posteriors, float32, and hints, 8 bit."""
        batches = [list(some) for rows in parts for some in _batches(rows)]
        with closing(read(_Tried(self.data), batches, _collate, self.workers)) as stream:
            arriving = iter(self._progress(stream, "encoding latents", len(batches)))
            for rows in parts:
                yield self._encoded(islice(arriving, len(_batches(rows))))

    def _encoded(self, batches: Iterable[Any]) -> Part:
        """The part of these images. Raises: an error that stands for one."""
        found: list[dict[str, Tensor]] = []
        words: dict[str, list[str]] = {"keys": [], "captions": []}
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            posterior = self.encoders.images(batch.image.to(self.rank.device))
            hints = {HINT + name: x.mul(255).round().to(torch.uint8) for name, x in batch.hints.items()}
            found.append({"mean": posterior.mean.float().cpu(), "std": posterior.std.float().cpu()} | hints)
            words["keys"] += batch.keys
            words["captions"] += batch.text
        return Part(_joined(found), words)

    def _texts(self, captions: Sequence[str], parts: Sequence[range]) -> Generator[Part]:
        """Conditions of captions."""
        assert self.encoders.texts is not None
        size = (self.first.image.shape[-2], self.first.image.shape[-1])
        for rows in self._progress(parts, "encoding captions", len(parts)):
            every = [self.encoders.texts([captions[i] for i in some], size) for some in _batches(rows)]
            yield Part(_joined([{name: x.cpu() for name, x in _given(base).items()} for base in every]))

    def _prompts(self, names: Sequence[str], parts: Sequence[range]) -> Generator[Part]:
        """Features of references, half precision; black pictures stand for those that cannot be read."""
        assert self.encoders.prompts is not None and self.first.reference is not None
        for rows in self._progress(parts, "encoding references", len(parts)):
            every: list[dict[str, Tensor]] = []
            could: list[str] = []
            for batch in _batches(rows):
                some = [names[i] for i in batch]
                read, blank = _read(self.data, some), torch.zeros_like(self.first.reference)
                could += ["yes" if name in read else "" for name in some]
                pictures = torch.stack([read.get(name, blank) for name in some])
                encoded = self.encoders.prompts(pictures.to(self.rank.device))
                every.append(_flat(tree_map(lambda f: f.half().cpu(), encoded)))
            yield Part(_joined(every), {"read": could})

    def _progress(self, what: Iterable[Any], doing: str, total: int) -> Any:
        return tqdm(what, desc=doing, total=total, mininterval=1.0, disable=not self.rank.main or not total)


def _batches(rows: range) -> list[range]:
    """Rows that are encoded at a time."""
    return [rows[i : i + ENCODE_BATCH] for i in range(0, len(rows), ENCODE_BATCH)]


class _Tried(Dataset[Any]):
    """Samples, or the error that the user has to see: see `stream.Positions`."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Sample | Exception:
        try:
            return self.data[index]
        except (ValueError, OSError) as error:
            return error


def _collate(samples: list[Any]) -> Any:
    if errors := [s for s in samples if isinstance(s, Exception)]:
        return errors[0]
    try:
        return collate(samples)
    except ValueError as error:
        return error


def _joined(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    with torch.autocast("cpu", enabled=False):  # under bf16 it cannot join halves
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _gather(parts: Rows, rows: Sequence[int]) -> dict[str, Tensor]:
    """Tensors of these rows, stacked."""
    found = [parts[row // PART].row(row % PART) for row in rows]
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}


def _given(base: Control) -> dict[str, Tensor]:
    """What a condition of captions says."""
    both = {"context": base.context, "vector": base.vector}
    return {name: x for name, x in both.items() if x is not None}


def _flat(prompts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Adapter -> a tensor, or a tuple of such, by names with a number."""
    flat: dict[str, Tensor] = {}
    for name, x in prompts.items():
        flat |= {name: x} if isinstance(x, Tensor) else {f"{name}.{i}": part for i, part in enumerate(x)}
    return flat


def _nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """`_flat` undone, in float32."""
    nested: dict[str, Any] = {}
    for name, x in flat.items():
        stem, numbered, _ = name.partition(".")
        nested[stem] = (*nested.get(stem, ()), x.float()) if numbered else x.float()
    return nested


def _read(data: ImageData, names: Sequence[str]) -> dict[str, Tensor]:
    """References that can be read, 3 h w in [-1, 1]."""
    found: dict[str, Tensor] = {}
    for name in names:
        try:
            found[name] = data.reference(name)
        except DataError as error:
            log.warning("left out of the references: %s", error)
    return found
