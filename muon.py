"""Muon, the optimizer of convolutions, and SGD for all other weights."""

import torch
from torch import Tensor


class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), and SGD.

    In a group with the key "muon" (the momentum), the gradient of each convolution (out, in, k, k)
    becomes a nearly orthogonal matrix (out, in k k), with no factor for its shape. All other groups
    are plain SGD. The orthogonalisation computes in `dtype`, and unlike torch.optim.Muon for many
    matrices at once: all of one shape, or with `pad` all that have the same number of rows, the
    narrower ones padded with zeros (more arithmetic in fewer kernels, faster only on a GPU).
    `iterations` are those of `orthogonalize`.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, pad: bool = False,
                 iterations: int = 5):
        super().__init__(groups)
        self.dtype, self.pad, self.iterations = dtype, pad, iterations
        self.zeros: dict[tuple[int, int], Tensor] = {}  # (widest, out)

    @torch.no_grad()
    def step(self) -> None:
        """Put orthogonal matrices in place of the convolutions' gradients; take SGD's step.

        SGD's own momentum is 0 in these groups: it adds the weight decay and steps.
        """
        for group in self.param_groups:
            if "muon" in group:
                weights = [weight for weight in group["params"]
                           if weight.grad is not None and weight.numel()]
                if weights:
                    self._orthogonalize_gradients(weights, group["muon"])
        super().step()

    def _orthogonalize_gradients(self, weights: list[Tensor], momentum: float) -> None:
        batches = {}
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            batches.setdefault(len(weight) if self.pad else weight.shape, []).append(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        grads = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        torch._foreach_lerp_(grads, averages, momentum)  # Nesterov's form
        orthogonal = self._padded if self.pad else self._of_one_shape
        for batch in batches.values():
            for weight, grad in zip(batch, orthogonal([w.grad for w in batch]), strict=True):
                grad = grad.to(weight.dtype, memory_format=torch.channels_last)
                # SGD wants dense gradients. This copies the slices of padded matrices alone.
                weight.grad = grad.contiguous(memory_format=torch.channels_last)

    def _of_one_shape(self, grads: list[Tensor]) -> Tensor:
        stacked = torch.stack(grads)  # (N, out, in, k, k)
        matrices = orthogonalize(stacked.flatten(2), self.dtype, self.iterations)
        return matrices.view(stacked.shape)

    def _padded(self, grads: list[Tensor]) -> list[Tensor]:
        # The columns are in the order of k, k, in, which is that of channels-last memory.
        parts = [grad.permute(2, 3, 1, 0).flatten(0, 2) for grad in grads]  # (k k in, out)
        rows, widest = len(grads[0]), max(map(len, parts))
        if (widest, rows) not in self.zeros:
            self.zeros[widest, rows] = parts[0].new_zeros(widest, rows)
        zeros = self.zeros[widest, rows]
        pieces = [piece for part in parts for piece in (part, zeros[: widest - len(part)])]
        matrices = torch.cat(pieces).view(-1, widest, rows).mT  # (N, out, widest)
        matrices = orthogonalize(matrices, self.dtype, self.iterations).to(grads[0].dtype)
        return [matrix[:, : len(part)].view(grad.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
                for matrix, part, grad in zip(matrices, parts, grads, strict=True)]


def orthogonalize(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """Bring the singular values of (N, rows, columns) near 1, and keep the singular vectors.

    By five Newton-Schulz iterations U S V' becomes about U V'. With fewer, small singular values
    end further below 1. Columns of zeros stay zeros. The coefficients of x -> a x + b x^3 + c x^5
    are Jordan's.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, dtype, iterations).mT
    x = torch.empty_like(matrices, dtype=dtype)
    torch.div(matrices, matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7), out=x)
    for _ in range(iterations):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x
