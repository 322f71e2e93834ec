"""How well two sets of embeddings find each other."""

from torch import Tensor


def recall_at(queries: Tensor, keys: Tensor, k: int) -> float:
    """Share of queries whose own key (same row) is among the k nearest by inner product.

    Args:
        queries: n d.
        keys: n d, row i belongs to query i.
        k: at least 1.
    """
    similarity = queries.float() @ keys.float().T
    own = similarity.diagonal()[:, None]
    rank = (~(similarity < own)).sum(dim=1) - 1  # keys not farther than the right one: ties and NaN count against it
    return (rank < k).float().mean().item()
