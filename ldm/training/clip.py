"""Training a small CLIP from scratch: symmetric contrastive loss over the global batch.

Radford et al. 2021 (arXiv:2103.00020), section 2.3; the loss is open_clip's, with features gathered over ranks.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.data.images import Batch
from ldm.evaluation.retrieval import recall_at
from ldm.models.clip import CLIP
from ldm.registry import ConfigError, register
from ldm.training.draws import Draws
from ldm.training.stage import Loss, Report, Stage


@register("stage", "clip")
class CLIPStage(Stage):
    """Contrastive training; the batch is the set of negatives, so it is never accumulated in parts."""

    whole_batch = True

    def __init__(self, *, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    @property
    def trained(self) -> nn.Module:
        """The CLIP."""
        return self.clip

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Raises: ConfigError if the images are of a size that the image tower does not take."""
        try:
            self.clip.encode_image(batch.image)
        except ValueError as error:
            raise ConfigError(f"{error}: change data.size, drop data.buckets") from error

    def forward(self, batch: Batch, draws: Draws, player: str, step: int) -> Loss:
        """Mean of image-to-text and text-to-image cross-entropy. See Stage.forward."""
        from open_clip.loss import ClipLoss  # slow to import

        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=ranks)
        image, text, scale = self.clip(batch.image, self._ids(batch))
        total = loss(image.float(), text.float(), scale.float())
        return Loss(cast("Tensor", total), {"logit_scale": scale})

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch], images: int, seed: int) -> Report:
        """Recall at 1 and 5 in both directions over all held-out pairs at once."""
        image: list[Tensor] = []
        text: list[Tensor] = []
        for batch in batches:
            image.append(self.clip.encode_image(batch.image))
            text.append(self.clip.encode_text(self._ids(batch)))
        x, y = torch.cat(image), torch.cat(text)
        figures = {"pairs": float(len(x))}
        for k in (1, 5):
            figures |= {f"image_to_text_r{k}": recall_at(x, y, k), f"text_to_image_r{k}": recall_at(y, x, k)}
        return Report(figures)

    def _ids(self, batch: Batch) -> Tensor:
        return self.clip.text.ids(batch.text)
