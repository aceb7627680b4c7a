"""Schedule-free AdamW: an optimizer that averages the weights instead of decaying the learning rate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW without a learning rate decay (Defazio et al., arXiv:2405.15682, algorithm 1).

    The parameters are y, where gradients are taken; z is the sequence that AdamW updates; x is their average, the
    result: y = (1 - beta1)·z + beta1·x. Outside `averaged_weights` the parameters are y.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._training_weights: dict[Tensor, Tensor] = {}  # y, while the parameters are x

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step from the gradients of the parameters."""
        assert closure is None, "no caller has one"
        assert not self._training_weights, "steps are taken outside of averaged_weights"
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float64)
                    state["weight_sum"] = torch.zeros((), dtype=torch.float64)  # of squared learning rates
                    state["z"], state["exp_avg_sq"] = y.detach().clone(), torch.zeros_like(y)
                state["step"] += 1
                state["exp_avg_sq"].mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
                correction = 1 - beta2 ** float(state["step"])
                update = y.grad / (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"])
                update.add_(y, alpha=group["weight_decay"])
                # Steps of the warmup count less in the average: with the square of their learning rate.
                state["weight_sum"] += rate**2
                share = rate**2 / float(state["weight_sum"])
                # y in terms of z, without x: x' = (1 - c)·x + c·z', and x = (y - (1 - beta1)·z) / beta1.
                y.lerp_(state["z"], share)
                y.add_(update, alpha=rate * (beta1 * (1 - share) - 1))
                state["z"].add_(update, alpha=-rate)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block, the parameters are the average x; afterwards they are y again, bit for bit."""
        with torch.no_grad():
            self._training_weights = {y: y.detach().clone() for y in self._parameters_with_state()}
            for y in self._training_weights:
                beta1 = self._beta1(y)
                y.lerp_(self.state[y]["z"], 1 - 1 / beta1)
        try:
            yield
        finally:
            with torch.no_grad():
                for y, value in self._training_weights.items():
                    y.copy_(value)
            self._training_weights = {}

    def training_weights(self, parameter: Tensor) -> Tensor:
        """Return y of a parameter that has a state, in its shape, also within `averaged_weights`."""
        return self._training_weights.get(parameter, parameter).detach()

    def _parameters_with_state(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from (p for p in group["params"] if self.state.get(p))

    def _beta1(self, parameter: Tensor) -> float:
        betas = [group["betas"][0] for group in self.param_groups if any(p is parameter for p in group["params"])]
        return float(betas[0])
