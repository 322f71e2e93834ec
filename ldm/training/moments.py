"""AdamW with moments of half the size.

Stochastic rounding keeps them honest: in bfloat16 a second moment that decays by 0.999 a step would, rounded to the
nearest, never decay (Zamirai et al. 2021, arXiv:2010.06192, on weights).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.training.distributed import local

MOMENTS = ("exp_avg", "exp_avg_sq")


class BFloat16AdamW(torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) whose two moments are kept in bfloat16; its arithmetic is float32.

    The update itself reads the moments before they are rounded. Like torch's fused AdamW it skips a step without
    waiting for the device where `found_inf` (set by GradScaler or `optim.guarded_step`) is not zero.

    Attributes:
        noise: generator on the weights' device for the rounding, set anew for each step; None: torch's own.
    """

    noise: torch.Generator | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient. `closure` must be None."""
        assert closure is None
        found: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, None if found is None else found.to(p.device) == 0)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As torch's, which gives moments the weights' type; here they become bfloat16, without loss if they were."""
        super().load_state_dict(dict(state_dict))
        for state in self.state.values():
            state.update({name: state[name].to(torch.bfloat16) for name in MOMENTS})

    def _update(self, p: Tensor, group: Mapping[str, Any], taken: Tensor | None) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state.update({name: torch.zeros_like(p, dtype=torch.bfloat16) for name in MOMENTS})
        assert p.grad is not None
        (beta1, beta2), lr = group["betas"], group["lr"]
        weight, grad = local(p), local(p.grad).float()
        state["step"] += 1 if taken is None else taken
        mean = local(state["exp_avg"]).float().lerp_(grad, 1 - beta1)
        square = local(state["exp_avg_sq"]).float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        change = mean / size * (lr / (1 - beta1 ** state["step"]))
        new = {weight: weight * (1 - lr * group["weight_decay"]) - change}
        new |= {local(state[name]): rounded(x, self.noise) for name, x in zip(MOMENTS, (mean, square), strict=True)}
        for old, value in new.items():
            old.copy_(value if taken is None else torch.where(taken, value, old))


def rounded(x: Tensor, noise: torch.Generator | None) -> Tensor:
    """Float32 to bfloat16, up or down at random so that the mean is x; what bfloat16 can hold stays."""
    draws = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=noise)
    return ((x.view(torch.int32) + draws) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
