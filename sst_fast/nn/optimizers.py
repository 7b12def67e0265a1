"""Optimizers for weights of which a step touches few rows, such as those that :class:`sst_fast.nn.PartialFC` samples.

PyTorch's SGD takes sparse gradients, but refuses weight decay for them. Its SparseAdam has no weight decay. The two optimizers below
are PyTorch's SGD and AdamW for every parameter with a dense gradient. So one optimizer serves network and head. In a parameter with a
sparse gradient each row is treated like a parameter of its own. Rows that are not in the gradient stay as they are. So do their
momentum, moments and count of steps.
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
    """The ``step`` of both: sparse gradients row by row, all others by PyTorch's optimizer, the class that comes next in the MRO."""

    # Options of a parameter group (PyTorch's optimizers have them) that are not implemented for rows.
    unknown = ("dampening", "maximize", "amsgrad")

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Fills the parameter's state where its rows have none yet: tensors with as many rows."""
        raise NotImplementedError

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Updates rows [R, ...] and their state in place."""
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss; None: nothing is evaluated.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: a parameter with a sparse gradient is in a group with ``dampening``, ``maximize`` or ``amsgrad``.
        """
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
    """:class:`torch.optim.SGD`. Of a parameter with a sparse gradient it updates only the rows that are in the gradient.

    Weight decay and momentum act on these rows alone.

    Args:
        params, lr, momentum, weight_decay, nesterov: as of :class:`torch.optim.SGD`.
    """

    def __init__(
        self, params: Parameters, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, *,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Adds the momentum buffer, if the group has momentum."""
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
    """:class:`torch.optim.AdamW`. Of a parameter with a sparse gradient it updates only the rows that are in the gradient.

    Weight decay acts on these rows alone. Each row counts its own steps, for the bias correction of its moments.

    Args:
        params, lr, betas, eps, weight_decay: as of :class:`torch.optim.AdamW`.
    """

    def __init__(
        self, params: Parameters, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Adds both moments, and a number of steps for each row."""
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
