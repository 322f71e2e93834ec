"""Weights laid out as oneDNN, the library behind torch's CPU kernels, wants them: once, and not at every call.

The one file that reaches beyond public torch: `torch.ops.mkldnn` is what torch.compile's own freezing calls. It is
applied to a finished model from outside (`sample.prepack`) and changes nothing but time, and in float32 the last bits.
For sampling alone: these operations have no gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn

_ops: Any = torch.ops.mkldnn
_reorder_conv: Any = getattr(getattr(torch._C, "_nn"), "mkldnn_reorder_conv2d_weight", None)  # noqa: B009
NEEDED = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")


def available() -> bool:
    """Whether this torch and this processor have what `prepack` needs, and oneDNN is not switched off."""
    on = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return on and _reorder_conv is not None and all(hasattr(_ops, name) for name in NEEDED)


def prepack(module: nn.Module) -> None:
    """Put packing layers in place of a CPU model's convolutions and linear maps, in place.

    Each lays out its weight at its first call, for the size of that call; other sizes work too, and may be slower. A
    packed weight keeps its name, shape and type but is no ordinary tensor: such a model cannot be saved, moved, trained
    or compiled. Layers that cannot be packed stay as they are, and all do where `available` says no.
    """
    if not available():
        return
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            # Exactly these: others, like attention's own output map, are read by code that does not call them.
            if type(layer) is nn.Linear and _fits(layer.weight):
                setattr(parent, name, PackedLinear(layer))
            elif type(layer) is nn.Conv2d and _fits(layer.weight) and _plain_padding(layer):
                setattr(parent, name, PackedConv2d(layer))


def _fits(weight: Tensor) -> bool:
    bf16 = weight.dtype == torch.bfloat16 and _ops._is_mkldnn_bf16_supported()
    return weight.device.type == "cpu" and (bf16 or weight.dtype == torch.float32)


def _plain_padding(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class PackedLinear(nn.Linear):
    """A linear map whose weight is packed at the first call."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, device="meta")
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, input: Tensor) -> Tensor:
        """... in_features -> ... out_features. Raises: RuntimeError if a gradient is wanted."""
        _refuse_gradient(input)
        if not self.weight.is_mkldnn:
            packed = _ops._reorder_linear_weight(self.weight.detach(), input.numel() // input.shape[-1])
            self.weight = nn.Parameter(packed, requires_grad=False)
        return _ops._linear_pointwise(input, self.weight, self.bias, "none", [], "")


class PackedConv2d(nn.Conv2d):
    """A convolution whose weight is packed at the first call."""

    def __init__(self, plain: nn.Conv2d) -> None:
        kernel: Any = plain.kernel_size
        super().__init__(plain.in_channels, plain.out_channels, kernel, groups=plain.groups, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self._where = ([int(p) for p in plain.padding], list(plain.stride), list(plain.dilation), plain.groups)

    def forward(self, input: Tensor) -> Tensor:
        """Map b c h w to b c' h' w'. Raises: RuntimeError if a gradient is wanted."""
        _refuse_gradient(input)
        if not self.weight.is_mkldnn:
            plain = self.weight.detach().contiguous().to_mkldnn()
            self.weight = nn.Parameter(_reorder_conv(plain, *self._where, list(input.shape)), requires_grad=False)
        return _ops._convolution_pointwise(input, self.weight, self.bias, *self._where, "none", [], "")


def _refuse_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a prepacked layer has no gradient; train a model that ldm.fast.prepack was not applied to")
