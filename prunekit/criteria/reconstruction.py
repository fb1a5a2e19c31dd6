"""Reconstruction: which neurons the others can stand in for, found by eliminating one by one.

Removing neuron i and repairing the other columns of the down projection W by least squares on the
Gram matrix C costs ‖W e_i‖² / [C⁻¹]_ii, with W and C⁻¹ as earlier removals and repairs left them.
"""

from __future__ import annotations

import logging

import torch

from prunekit import ops
from prunekit.criteria.registry import Evidence, criterion
from prunekit.errors import InputError

logger = logging.getLogger(__name__)

FISHER = "reconstruction_fisher"
RIDGE = 1e-3  # times the mean of a Gram matrix's diagonal
BLOCK = 128  # neurons eliminated between two updates of the whole matrices


@criterion("reconstruction", gathers=("gram",))
def reconstruction(evidence: Evidence) -> torch.Tensor:
    """What greedy elimination with least-squares repair costs up to and with the neuron.

    The sum so far of the squared errors of the output, over all tokens: to remove the k neurons of
    the lowest scores costs the k-th lowest.

    C = HᵀH/T + 1e-3·mean(diag)·I; where the down projection has a bias, which takes the mean, C is
    centred. A neuron whose error the others repair for nothing goes before one that is small but
    irreplaceable, and of two equal ones the second goes late.

    Cost:
        About 5/3·F³ + D·F² FLOP in fp64 an MLP, and 16·F² bytes: 1.3e12 FLOP and 1.3 GB at
        D = 1536, F = 8960. Computed where the weights lie.

    Source:
        Optimal Brain Surgeon (Hassibi and Stork, 1993) for structures: ZipLM, Kurtić et al.,
        arXiv 2302.04089.
    """
    return _costs(evidence, None)


@criterion(FISHER, gathers=("gram", "gradient_gram"))
def reconstruction_fisher(evidence: Evidence) -> torch.Tensor:
    """As `reconstruction`, with errors measured by their effect on the loss, in nats.

    The error of the output is weighted by the second moment of the loss gradient there,
    M = Σ g gᵀ/T + 1e-3·mean(diag)·I: T·trace(ΔW C ΔWᵀ M)/2 is what the loss of all T tokens rises
    to second order, so that the scores of all layers are of one unit (`prunekit.sensitivity`).

    Cost:
        That of `reconstruction`, and about 10·D³ FLOP for the root of M.
    """
    return _costs(evidence, evidence.target.gradient_gram)


def _costs(evidence: Evidence, metric: torch.Tensor | None) -> torch.Tensor:
    target, down = evidence.target, evidence.view.down
    if not target.gram.any() or (metric is not None and not metric.any()):
        return torch.zeros(evidence.view.width)  # nothing fired, or nothing mattered: all are equal
    device = down.device if down.is_cuda else torch.device("cpu")  # not every device has fp64
    if metric is not None:
        metric = metric.to(device, torch.float64) / target.tokens
        metric.diagonal().add_(RIDGE * metric.diagonal().mean())
    down = down.to(device, torch.float64, copy=True)
    order, costs = eliminate(down, _inverse(evidence, device), metric)
    scores = torch.empty_like(costs)
    scores[order] = costs.cumsum(0) * (target.tokens if metric is None else target.tokens / 2)
    return scores


def _inverse(evidence: Evidence, device: torch.device) -> torch.Tensor:
    """C⁻¹ in fp64. Summed in fp32, C may need more than the usual ridge."""
    target, name = evidence.target, evidence.view.name
    gram = target.second_moment(centred=evidence.view.down_bias is not None, device=device)
    ridge = RIDGE * gram.diagonal().mean()
    for _ in range(4):
        gram.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            del gram  # as large as what follows
            return torch.cholesky_inverse(factor)
        logger.warning("%s: its Gram matrix is not positive definite; widening the ridge", name)
        ridge = 10 * ridge
    raise InputError(f"{name}: its Gram matrix cannot be inverted; calibrate in fp32 on more text")


def eliminate(
    down: torch.Tensor,
    inverse: torch.Tensor,
    metric: torch.Tensor | None = None,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order neurons by greedy elimination, the least missed first, and say what each one cost.

    Each round takes the 2·block neurons that would cost least, eliminates half of them one by one,
    exactly, in the matrices of those 2·block alone, and then updates the whole matrices by the
    block. Where 2·block neurons or fewer are left this is the greedy order itself.

    Args:
        down: [D, F], fp64, W. inverse: [F, F], fp64, C⁻¹; the work is done in both, and leaves
            nothing of them.
        metric: [D, D], fp64, M: an error ΔW costs trace(ΔW C ΔWᵀ M); None for the identity.
        block: neurons a round.

    Returns:
        The order and, in that order, by how much each elimination raised the error of a token: [F],
        int64 and fp64, on the CPU.

    Cost:
        About 2/3·F³ + D·F² FLOP, and 8·(2·block)·(D + F) bytes more than its arguments.
    """
    if metric is not None:
        values, vectors = torch.linalg.eigh(metric)
        down = values.clamp_min(0).sqrt()[:, None] * (vectors.T @ down)
    if not inverse.is_contiguous():  # it is symmetric, and LAPACK's lies by columns
        inverse = inverse.T
    alive = torch.arange(inverse.shape[0], device=inverse.device)
    order, costs = [], []
    while True:
        saliency = down.square().sum(0) / inverse.diagonal()
        pool = saliency.argsort(stable=True)[: 2 * block]
        last = pool.numel() == alive.numel()
        columns = down[:, pool]
        count = pool.numel() if last else block
        found, cost = _within(columns.T @ columns, inverse[pool[:, None], pool], count)
        removed = pool[found]
        order.append(alive[removed])
        costs.append(cost)
        if last:
            return torch.cat(order).cpu(), torch.cat(costs)
        stays = torch.ones(alive.numel(), dtype=torch.bool, device=alive.device)
        stays[removed] = False
        kept = stays.nonzero().flatten()
        # Schur complement: W[:,S] - W[:,R]·A and C⁻¹[S,S] - C⁻¹[S,R]·A, A = C⁻¹[R,R]⁻¹·C⁻¹[R,S]
        cross = inverse[removed[:, None], kept]
        factor = torch.linalg.cholesky(inverse[removed[:, None], removed])
        repair = torch.cholesky_solve(cross, factor)
        lost = down[:, removed]
        down = ops.compact_cols_(down, kept).addmm_(lost, repair, alpha=-1)
        inverse = ops.compact_cols_(ops.compact_rows_(inverse, kept), kept)
        inverse.addmm_(cross.T, repair, alpha=-1)
        alive = alive[kept]


def _within(
    products: torch.Tensor, inverse: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eliminate ``count`` of a pool's neurons one by one: their positions in it, and the costs.

    What the steps change in both matrices is kept as the vectors it is made of; a step computes the
    row it needs and the diagonals.

    Args:
        products: [P, P], WᵀMW of the pool. inverse: [P, P], its part of C⁻¹.

    Cost:
        6·P·count² FLOP.
    """
    # On the CPU: each step is small, and picks a minimum that the next one waits for.
    device, products, inverse = products.device, products.cpu(), inverse.cpu()
    size = products.shape[0]
    costs, spread = products.diagonal().clone(), inverse.diagonal().clone()
    # C⁻¹ is inverse - rootsᵀ·roots now, and WᵀMW is products - pullsᵀ·shares - sharesᵀ·pulls
    roots, pulls, shares = (products.new_zeros(count, size) for _ in range(3))
    gone = torch.zeros(size, dtype=torch.bool)
    order, paid = [], torch.empty(count, dtype=torch.float64)
    for step in range(count):
        saliency = costs / spread
        i = int(saliency.masked_fill(gone, torch.inf).argmin())
        order.append(i)
        paid[step] = saliency[i].clamp_min(0)
        gone[i] = True
        row = inverse[i] - roots[:step, i] @ roots[:step]
        # What the pool's columns become when they repair the loss of w_i: W - w_i·shareᵀ
        share = row / row[i]
        pull = products[i] - shares[:step, i] @ pulls[:step] - pulls[:step, i] @ shares[:step]
        pull -= pull[i].clone() / 2 * share
        roots[step], pulls[step], shares[step] = row / row[i].sqrt(), pull, share
        costs -= 2 * pull * share
        spread -= row * share
    return torch.tensor(order, device=device), paid
