"""Optimizers for weights of which a step touches few rows: what :class:`sst_fast.nn.PartialFC` samples.

PyTorch's SGD takes sparse gradients, but refuses weight decay for them and moves no row by its momentum; its SparseAdam has
no weight decay. The two below are PyTorch's SGD and AdamW for every parameter with a dense gradient, so that one optimizer serves
network and head. A parameter with a sparse gradient is treated as if each of its rows were a parameter of its own, and the
gradient of the rows that were not sampled None: they, their momentum and their count of steps stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 512  # rows that are copied out of the weights and their state at a time
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class _Rows(torch.optim.Optimizer):
    """``step`` of both: sparse gradients row by row, all others as the optimizer of PyTorch that comes next in the MRO does."""

    # Of a parameter group that PyTorch's optimizer has written; rows have no rule for them.
    unknown = ("dampening", "maximize", "amsgrad")

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Fills the parameter's state where its rows have none yet: tensors with as many rows."""
        raise NotImplementedError

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Updates rows [R, ...] and their state in place."""
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    grad = parameter.grad
                    if grad is not None and (grad.is_sparse or "rows" in self.state[parameter]):
                        self._step_rows(parameter, grad, group)
                        done.append((parameter, grad))
                        parameter.grad = None
            try:
                # Without what Optimizer has wrapped around it: hooks of this step have been called already.
                inspect.unwrap(super(_Rows, type(self)).step)(self)
            finally:
                for parameter, grad in done:
                    parameter.grad = grad
        return loss

    def _step_rows(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        for name in self.unknown:
            if group.get(name):
                raise ValueError(f"{name} must be 0 or False for sparse gradients, got {group[name]!r}")
        if grad.is_sparse:
            if not bool(
                (grad._indices()[0].diff() > 0).all()
            ):  # accumulated; autograd forgets of the others that they are coalesced
                grad = grad.coalesce()
            index, values = grad._indices()[0], grad._values()
        else:  # a step with all rows, after others
            index, values = torch.arange(len(parameter), device=parameter.device), grad
        state = self.state[parameter]
        state["rows"] = True
        self.begin(parameter, group)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for some, part in zip(index.split(BLOCK), values.split(BLOCK), strict=True):
            rows = parameter[some]
            taken = {name: value[some] for name, value in tensors.items()}
            self.update(rows, part, taken, group)
            parameter.index_copy_(0, some, rows)
            for name, value in tensors.items():
                value.index_copy_(0, some, taken[name])


class RowSGD(_Rows, torch.optim.SGD):
    """:class:`torch.optim.SGD` that updates, of a parameter with a sparse gradient, only the rows in it.

    Args:
        params, lr, momentum, weight_decay, nesterov: as of :class:`torch.optim.SGD`.
    """

    def __init__(
        self, params: Parameters, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, *,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The momentum, if there is any."""
        if group["momentum"] and self.state[parameter].get("momentum_buffer") is None:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """As PyTorch's."""
        grad = grad.add(rows, alpha=group["weight_decay"]) if group["weight_decay"] else grad
        if group["momentum"]:
            buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
            grad = grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        rows.add_(grad, alpha=-float(group["lr"]))


class RowAdamW(_Rows, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` that updates, of a parameter with a sparse gradient, only the rows in it.

    Each row counts its own steps, for the correction of its moments.

    Args:
        params, lr, betas, eps, weight_decay: as of :class:`torch.optim.AdamW`.
    """

    def __init__(
        self, params: Parameters, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Moments, and a number of steps for each row."""
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        steps = state.get("step", torch.zeros(()))  # 0-d: of all rows, before one was left out
        state["step"] = steps.to(parameter.device).expand(len(parameter)).contiguous()

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """As PyTorch's."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        steps = state["step"].add_(1)
        first, second = (
            (1 - beta ** steps.double()).to(rows.dtype).view(-1, *[1] * (rows.dim() - 1)) for beta in (beta1, beta2)
        )
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        rows.mul_(1 - lr * group["weight_decay"])
        rows.sub_(lr * (mean / first) / ((square / second).sqrt() + group["eps"]))
