"""Weighted least squares from sums over batches, its ridge chosen by batches held out."""

from __future__ import annotations

import math

import torch

from prunekit import ops

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # times each neuron's own second moment
FLOOR = 1e-6  # times the mean second moment: a neuron that is always 0 stays solvable


class Regression:
    """Accumulates Σ w·h hᵀ and Σ w·e hᵀ, then solves e ≈ ΔW·h (+ δ).

    The ridge is in each neuron's own units, λ·diag(C): what shrinks is the correlation between
    neurons, which too few tokens overstate, and never one neuron because another is large. Both
    halves (fitted, held out) are summed apart, every ridge is fitted on the first and measured on
    the second, and the best one solves for both together; where none is better on the second than
    no change at all, there is no change.

    Args:
        outputs, inputs: D, F'.
        device: where the sums are kept.
        intercept: also fit a constant δ.

    Cost:
        w·h hᵀ: T·F'² FLOP, w·e hᵀ: 2·T·D·F'. To solve: (R + 1)·(F'³/3 + 2·D·F'²) in fp64 for R
        ridges, 40·F'² bytes.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device, *, intercept: bool):
        self.intercept = intercept
        extra = int(intercept)
        self.gram = torch.zeros(2, inputs + extra, inputs + extra, device=device)
        self.cross = torch.zeros(2, outputs, inputs + extra, device=device)
        self.weight = [0.0, 0.0]

    def add(
        self, h: torch.Tensor, error: torch.Tensor, weights: torch.Tensor, *, held_out: bool
    ) -> None:
        """Fold in h: [T, F'] fp32, error: [T, D] fp32 and weights: [T] of some tokens."""
        half = int(held_out)
        if self.intercept:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        h = h * weights.sqrt()[:, None]
        ops.gram_update(self.gram[half], h)
        self.cross[half].addmm_((error * weights.sqrt()[:, None]).T, h)
        self.weight[half] += float(weights.sum())

    def solve(self, *, whole: bool = True) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """ΔW: [D, F'] and δ: [D] or None, fp64 on the CPU; None where every h was 0.

        With ``whole`` what was held out is fitted too, once the ridge is chosen.
        """
        grams = [ops.symmetrize_(g).double() for g in self.gram]
        crosses = list(self.cross.double())
        if self.gram.device.type != "cuda":  # not every device has fp64
            grams, crosses = [g.cpu() for g in grams], [c.cpu() for c in crosses]
        total, cross = grams[0], crosses[0]
        if whole:
            total, cross = total + grams[1], cross + crosses[1]
        inputs = total.shape[0] - self.intercept
        if not total.diagonal()[:inputs].any():
            return None
        ridge = self._choose(grams, crosses) if min(self.weight) > 0 else RIDGES[-1]
        solution = self._fit(total, cross, ridge).cpu()
        return solution[:, :inputs], solution[:, inputs] if self.intercept else None

    def _choose(self, grams: list[torch.Tensor], crosses: list[torch.Tensor]) -> float:
        def held_out_error(ridge: float) -> float:
            x = self._fit(grams[0], crosses[0], ridge)
            return float(((x @ grams[1]) * x).sum() - 2 * (x * crosses[1]).sum())

        best, ridge = min((held_out_error(ridge), ridge) for ridge in RIDGES)
        return ridge if best < 0 else math.inf  # 0 is what no change at all gives

    def _fit(self, gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
        if ridge == math.inf:
            return torch.zeros_like(cross)
        inputs = gram.shape[0] - self.intercept
        floor = FLOOR * gram.diagonal()[:inputs].mean()
        for _ in range(8):
            matrix = gram.clone()
            matrix.diagonal()[:inputs].mul_(1 + ridge).add_(floor)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                return torch.cholesky_solve(cross.T, factor).T
            ridge, floor = 10 * ridge, 10 * floor
        return torch.zeros_like(cross)
