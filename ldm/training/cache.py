"""Inputs of diffusion training computed once: VAE posteriors and text tokens, kept in memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.data.images import ImageData, collate
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE

ENCODE_BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Latents:
    """A batch whose images and captions are already encoded.

    Attributes:
        mean, std: b c h w, posterior of the unscaled latent, float32.
        context: b n d text tokens.
        hints: name -> b 3 h w in [0, 1].
    """

    keys: list[str]
    mean: Tensor
    std: Tensor
    context: Tensor
    hints: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Latents":
        """The same batch on `device`."""
        move = {"device": device, "non_blocking": True}
        hints = {name: h.to(**move) for name, h in self.hints.items()}
        return Latents(self.keys, self.mean.to(**move), self.std.to(**move), self.context.to(**move), hints)

    def pin_memory(self) -> "Latents":
        """The same batch in page-locked memory, from where `to` copies in the background; DataLoader calls this."""
        hints = {name: h.pin_memory() for name, h in self.hints.items()}
        return Latents(self.keys, self.mean.pin_memory(), self.std.pin_memory(), self.context.pin_memory(), hints)


class LatentData(Dataset[Any]):
    """An encoded data set. Augmentation is frozen at the unaugmented view; each caption is encoded once."""

    def __init__(self, data: ImageData, vae: VAE, text: TextEncoder, device: torch.device) -> None:
        self.keys: list[str] = []
        means: list[Tensor] = []
        stds: list[Tensor] = []
        hints: dict[str, list[Tensor]] = {}
        rows: list[int] = []
        captions: dict[str, int] = {}
        contexts: list[Tensor] = []
        loader = DataLoader(data, batch_size=ENCODE_BATCH, collate_fn=collate)
        for batch in tqdm(loader, desc="encoding latents", mininterval=1.0):
            posterior = vae.encode(batch.image.to(device))
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
            fresh = [c for c in dict.fromkeys(batch.text) if c not in captions]
            if fresh:
                captions |= {c: len(captions) + i for i, c in enumerate(fresh)}
                contexts.append(text.encode(fresh).cpu())
            rows += [captions[c] for c in batch.text]
            self.keys += batch.keys
            for name, hint in batch.hints.items():
                hints.setdefault(name, []).append(hint.mul(255).round().to(torch.uint8))
        self.mean, self.std = torch.cat(means), torch.cat(stds)
        self.context, self.rows = torch.cat(contexts), rows
        self.hints = {name: torch.cat(h) for name, h in hints.items()}

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, generator: torch.Generator | None = None) -> int:
        """Items are row numbers; `collate` gathers them in one go."""
        del generator
        return index

    def collate(self, rows: list[int]) -> Latents:
        """Rows -> batch."""
        i = torch.tensor(rows)
        context = self.context[torch.tensor([self.rows[r] for r in rows])]
        hints = {name: h[i].float() / 255 for name, h in self.hints.items()}
        return Latents([self.keys[r] for r in rows], self.mean[i], self.std[i], context, hints)
