"""Inputs of diffusion training computed once: VAE posteriors and text conditions, kept in memory."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.control import Control
from ldm.data.errors import DataError
from ldm.data.images import ImageData, choose, collate
from ldm.models.vae import Posterior

log = logging.getLogger(__name__)
ENCODE_BATCH = 64
EncodeImages = Callable[[Tensor], Posterior]  # images b 3 h w in [-1, 1] -> posterior of the unscaled latent
EncodePrompts = Callable[[Tensor], dict[str, Any]]  # references b 3 h w in [-1, 1] -> adapter -> features b 1 ...
T = TypeVar("T")
Encode = Callable[[Sequence[str], tuple[int, int]], Control]  # captions and (height, width) in pixels -> condition


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


class LatentData(Dataset[Any]):
    """An encoded data set. Augmentation is frozen at the unaugmented view; captions and references are encoded once.

    Which reference a sample gets is drawn anew each time, as the data itself would.
    """

    def __init__(
        self,
        data: ImageData,
        encode_images: EncodeImages,
        encode: Encode,
        device: torch.device,
        encode_prompts: EncodePrompts | None = None,
    ) -> None:
        self.keys: list[str] = []
        means: list[Tensor] = []
        stds: list[Tensor] = []
        hints: dict[str, list[Tensor]] = {}
        rows: list[int] = []
        captions: dict[str, int] = {}
        bases: list[Control] = []
        loader = DataLoader(data, batch_size=ENCODE_BATCH, collate_fn=collate)
        for batch in tqdm(loader, desc="encoding latents", mininterval=1.0):
            posterior = encode_images(batch.image.to(device))
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
            fresh = [c for c in dict.fromkeys(batch.text) if c not in captions]
            if fresh:
                captions |= {c: len(captions) + i for i, c in enumerate(fresh)}
                size = (batch.image.shape[-2], batch.image.shape[-1])
                bases.append(tree_map(Tensor.cpu, encode(fresh, size)))
            rows += [captions[c] for c in batch.text]
            self.keys += batch.keys
            for name, hint in batch.hints.items():
                hints.setdefault(name, []).append(hint.mul(255).round().to(torch.uint8))
        self.mean, self.std = torch.cat(means), torch.cat(stds)
        self.base = tree_map(lambda *xs: torch.cat(xs), bases[0], *bases[1:])
        self.rows = rows
        self.hints = {name: torch.cat(h) for name, h in hints.items()}
        self.prompts: dict[str, Any] = {}
        if encode_prompts is not None:
            self._encode_references(data, encode_prompts, device)

    def _encode_references(self, data: ImageData, encode: EncodePrompts, device: torch.device) -> None:
        wanted = list(dict.fromkeys(name for key in self.keys for name in data.references(key)))
        rows: dict[str, int] = {}
        parts: list[dict[str, Any]] = []
        for start in tqdm(range(0, len(wanted), ENCODE_BATCH), desc="encoding references", mininterval=1.0):
            if pictures := _read(data, wanted[start : start + ENCODE_BATCH]):
                rows |= {name: len(rows) + i for i, name in enumerate(pictures)}
                encoded = encode(torch.stack(list(pictures.values())).to(device))
                parts.append(tree_map(lambda f: f.half().cpu(), encoded))
        with torch.autocast("cpu", enabled=False):  # under bf16 it cannot join halves
            self.prompts = tree_map(lambda *fs: torch.cat(fs), parts[0], *parts[1:])
        # None is left empty: each sample could be read above, with a reference of its own.
        self.references = [tuple(rows[name] for name in data.references(key) if name in rows) for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[int, int]:
        """Items are row numbers of the sample and of its reference (-1: none); `collate` gathers them in one go."""
        if not self.prompts:
            return index, -1
        some = self.references[index]
        return index, some[choose(len(some), self.keys[index], generator)]

    def collate(self, items: list[tuple[int, int]]) -> Latents:
        """Rows -> batch."""
        rows = [r for r, _ in items]
        i, j = torch.tensor(rows), torch.tensor([r for _, r in items])
        row = torch.tensor([self.rows[r] for r in rows])
        base = tree_map(lambda x: x[row], self.base)
        hints = {name: h[i].float() / 255 for name, h in self.hints.items()}
        prompts = tree_map(lambda f: f[j].float(), self.prompts)
        return Latents([self.keys[r] for r in rows], self.mean[i], self.std[i], base, hints, prompts)


def _read(data: ImageData, names: Sequence[str]) -> dict[str, Tensor]:
    """References that can be read, 3 h w in [-1, 1]."""
    found: dict[str, Tensor] = {}
    for name in names:
        try:
            found[name] = data.reference(name)
        except DataError as error:
            log.warning("left out of the references: %s", error)
    return found
