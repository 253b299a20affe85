"""The quantizers with levels in PyTorch, written from their formulas (arXiv 2203.01941, 2404.02905). Arrays are NCHW.

It needs PyTorch, so a test calls `pytest.importorskip("torch")` before it imports this file.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812


def nearest(x, table):
    """The indices [b, h, w] of the nearest rows."""
    distance = (x.detach().permute(0, 2, 3, 1)[..., None, :] - table.detach()).square().sum(-1)
    return distance.argmin(-1)


def look_up(codes, table):
    return table[codes].permute(0, 3, 1, 2)


def outcome(z, codes, sums):
    """Vectors with the straight-through estimator, codes, codebook loss and commitment loss."""
    pull = sum(F.mse_loss(total, z.detach()) for total in sums) / len(sums)
    commitment = sum(F.mse_loss(z, total.detach()) for total in sums) / len(sums)
    return z + (sums[-1] - z).detach(), codes, pull, commitment


def residual(z, tables):
    """With a table for every level; codes are [b, h, w, depth], counted from 0 in every table."""
    rest, total, codes, sums = z.detach(), 0, [], []
    for table in tables:
        codes.append(nearest(rest, table))
        total = total + look_up(codes[-1], table)
        rest = rest - look_up(codes[-1], table).detach()
        sums.append(total)
    return outcome(z, torch.stack(codes, -1), sums)


def multi_scale(z, table, kernels, biases, scales):
    """Kernels are OIHW. Codes are [b, sum of s^2]."""
    rest, total, codes, sums, side, count = z.detach(), 0, [], [], z.shape[-1], len(kernels)
    third = 3 if count == 4 else 2
    ticks = np.linspace(1 / third / count, 1 - 1 / third / count, count)
    for i, size in enumerate(scales):
        last = i == len(scales) - 1
        small = rest if last else F.interpolate(rest, size=(size, size), mode="area")
        chosen = nearest(small, table)
        large = look_up(chosen, table)
        if not last:
            large = F.interpolate(large, size=(side, side), mode="bicubic")
        phi = np.argmin(np.abs(ticks - i / (len(scales) - 1)))
        blended = large * 0.5 + F.conv2d(large, kernels[phi], biases[phi], padding=1) * 0.5
        total, rest = total + blended, rest - blended.detach()
        codes.append(chosen.flatten(1))
        sums.append(total)
    return outcome(z, torch.cat(codes, 1), sums)
