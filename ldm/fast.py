"""Weights laid out as oneDNN, the library behind torch's CPU kernels, wants them: once, and not at every call.

The one file that reaches beyond public torch: `torch.ops.mkldnn` is what torch.compile's own freezing calls. It is
applied to a finished model from outside, changes nothing but time, and `unpack` takes it back. For sampling alone:
these operations have no gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

_ops: Any = torch.ops.mkldnn
TYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Whether this torch and this processor have what `prepack` needs."""
    names = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(_ops, name) for name in names)


def prepack(module: nn.Module) -> None:
    """Lay out the weights of every convolution and linear map on a CPU at its first call, for the sizes of that call.

    Other sizes work too, and may be slower. A packed weight keeps its shape and type, but is no ordinary tensor: call
    `unpack` before the module is saved, moved, trained or compiled. Layers that cannot be packed stay as they are, and
    all do where `available` says no.
    """
    if not available():
        return
    for layer in _layers(module):
        layer.forward = cast("Any", _first_call(layer))  # an attribute of its own hides the class's


def unpack(module: nn.Module) -> None:
    """Take `prepack` back: ordinary weights, in contiguous memory, and ordinary calls."""
    for layer in module.modules():
        if "forward" in vars(layer) and isinstance(layer, nn.Linear | nn.Conv2d):
            del layer.forward
            if layer.weight.is_mkldnn:
                layer.weight = nn.Parameter(layer.weight.to_dense(), requires_grad=False)


def _layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    bf16 = _ops._is_mkldnn_bf16_supported()
    for layer in module.modules():
        # Exactly these: others, like attention's own output map, are read by code that does not call them.
        if type(layer) not in (nn.Linear, nn.Conv2d):
            continue
        weight = cast("nn.Linear | nn.Conv2d", layer).weight
        plain = not isinstance(layer, nn.Conv2d) or (
            layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        if plain and weight.device.type == "cpu" and weight.dtype in TYPES and (weight.dtype != TYPES[1] or bf16):
            yield cast("nn.Linear | nn.Conv2d", layer)


def _first_call(layer: nn.Linear | nn.Conv2d) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        run = _conv(layer, x) if isinstance(layer, nn.Conv2d) else _linear(layer, x)
        layer.forward = cast("Any", run)
        return run(x)

    return forward


def _linear(layer: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    packed = _ops._reorder_linear_weight(layer.weight.detach(), x.numel() // x.shape[-1])
    layer.weight = nn.Parameter(packed, requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        _refuse_gradient(x)
        return _ops._linear_pointwise(x, packed, layer.bias, "none", [], "")

    return forward


def _conv(layer: nn.Conv2d, x: Tensor) -> Callable[[Tensor], Tensor]:
    where: Any = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    plain = layer.weight.detach().contiguous().to_mkldnn()
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *where, list(x.shape))  # pyright: ignore
    layer.weight = nn.Parameter(packed, requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        _refuse_gradient(x)
        return _ops._convolution_pointwise(x, packed, layer.bias, *where, "none", [], "")

    return forward


def _refuse_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a prepacked layer has no gradient; call ldm.fast.unpack on the model before training it")
