"""Adam that visits only the rows with a gradient: what is left of the optimiser when most curves rest."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.flash import dispatch

NOT_HERE = ("weight_decay", "amsgrad", "maximize")  # of Adam, and would be lost in silence if its state is loaded


class LazyAdam(torch.optim.Optimizer):
    """Adam on the rows (last dimension) whose gradient is not zero; weights and moments of all others stay as they are.

    A batch touches at most ``B (k + 1)`` of the ``G + k`` rows of a feature of
    :class:`~layers.FlashKAN.FlashKAN`, and on MNIST a tenth of them at G = 1000. Of an untouched row only the gradient is
    read, a quarter of what Adam reads and none of what it writes. Nothing waits for the GPU and all shapes are fixed:
    it can be captured in a CUDA graph. It is made for GPUs; on a CPU it is right, and slower than Adam in its fused form.

    It is *another* optimiser than Adam. Adam lets the moments of every weight decay in every step and goes on moving a
    weight for a while after its last gradient; here a resting row keeps both until it is touched again. The bias
    correction counts the steps of the optimiser, also those that a row did not see. Where every row has a gradient in
    every step the two agree. The same choice as ``torch.optim.SparseAdam``, for dense gradients.

    Args:
        params: as for ``torch.optim.Adam``; float32 or float64.
        lr: learning rate, at least 0, default 1e-3.
        betas: decay of the two moments a step, each in [0, 1), default (0.9, 0.999).
        eps: added to the root of the second moment, at least 0, default 1e-8.

    The state of a ``torch.optim.Adam`` can be loaded, if it was made without weight decay and the like.

    Raises ``TypeError`` or ``ValueError`` naming the argument. Source: Kingma and Ba, arXiv 1412.6980, algorithm 1.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr!r}")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        found = {weight.dtype for weight in self.param_groups[-1]["params"]} - {torch.float32, torch.float64}
        if found:
            self.param_groups.pop()
            raise TypeError(f"params must be float32 or float64, got {found.pop()}")

    def __setstate__(self, state: dict) -> None:
        for group in state["param_groups"]:
            if found := [name for name in NOT_HERE if group.get(name)]:
                raise ValueError(f"LazyAdam has no {found[0]}, and the state to be loaded was made with it")
        super().__setstate__(state)
        # PyTorch moves what it loads to the weights, but for a step count, which the kernel reads on their device. That of
        # torch.optim.Adam is a float32, and on the CPU.
        for weight, kept in self.state.items():
            kept["step"] = torch.as_tensor(kept["step"], dtype=torch.float64, device=weight.device)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; ``closure`` as for every optimiser of PyTorch, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    # On the device, so that a captured step counts on.
                    state["step"] = torch.zeros((), dtype=torch.float64, device=weight.device)
                    state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
                    state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
                state["step"] += 1
                moments = state["exp_avg"], state["exp_avg_sq"]
                grad = weight.grad.contiguous()
                _update(weight, grad, state["step"], *moments, group["lr"], group["betas"], group["eps"])
        return loss


def _rows(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.view(1, -1)


def _update(weight: Tensor, grad: Tensor, steps: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr, betas, eps) -> None:
    if weight.numel() == 0:
        return
    plain = weight.dtype == grad.dtype and weight.dtype in (torch.float32, torch.float64)
    if weight.is_cuda and weight.is_contiguous() and plain and dispatch.gpu_kernels() is not None:
        from layers.flash import triton_adam

        triton_adam.update(*map(_rows, (weight, grad, exp_avg, exp_avg_sq)), steps, lr, betas, eps)
        return
    g, m, v = _rows(grad), _rows(exp_avg), _rows(exp_avg_sq)
    touched = g.ne(0).any(1, keepdim=True)  # Shape: (rows, 1)
    root = (1 - betas[1] ** steps).sqrt()
    rate, floor = (lr * root / (1 - betas[0] ** steps)).to(weight.dtype), (eps * root).to(weight.dtype)
    # Masks instead of indices: how many rows there are is not known here, and asking a GPU would wait for it.
    m.copy_(torch.where(touched, betas[0] * m + (1 - betas[0]) * g, m))
    v.copy_(torch.where(touched, betas[1] * v + (1 - betas[1]) * g * g, v))
    weight -= torch.where(touched, rate * m / (v.sqrt() + floor), 0).view(weight.shape)
