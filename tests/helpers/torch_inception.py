"""InceptionV3 of FID ("2015-12-05") as a PyTorch program, written from the structure alone.

It reads the published tensors by their names and keeps BatchNorm, so that folding it is tested too. Arrays are NCHW.
It needs PyTorch, so a test calls `pytest.importorskip("torch")` before it imports this file.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

# Branches of the blocks at 17 x 17 pixels: names and windows of their convolutions.
BRANCHES_17 = (
    (("branch1x1", (1, 1)),),
    (("branch7x7_1", (1, 1)), ("branch7x7_2", (1, 7)), ("branch7x7_3", (7, 1))),
    (
        ("branch7x7dbl_1", (1, 1)),
        ("branch7x7dbl_2", (7, 1)),
        ("branch7x7dbl_3", (1, 7)),
        ("branch7x7dbl_4", (7, 1)),
        ("branch7x7dbl_5", (1, 7)),
    ),
)


class Network:
    """`Network(tensors, dtype)(images)` with uint8 images [b, H, W, 3] gives a dict of named features [b, ...]."""

    def __init__(self, tensors, dtype=torch.float32):
        self.dtype = dtype
        self.tensors = {name: torch.from_numpy(np.asarray(value)).to(dtype) for name, value in tensors.items()}

    def conv(self, name, x, stride=1, padding=0):
        t = self.tensors
        x = F.conv2d(x, t[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, variance = t[f"{name}.bn.running_mean"], t[f"{name}.bn.running_var"]
        return F.relu(F.batch_norm(x, mean, variance, t[f"{name}.bn.weight"], t[f"{name}.bn.bias"], eps=1e-3))

    def chain(self, block, names_windows, x):
        for name, (height, width) in names_windows:
            x = self.conv(f"{block}.{name}", x, padding=(height // 2, width // 2))
        return x

    def resized(self, images):
        """TensorFlow 1's bilinear resize: pixel i of the result lies at i * side / 299, between whole pixels."""
        x = torch.from_numpy(images).to(self.dtype).permute(0, 3, 1, 2)
        for dim in (2, 3):
            side = x.shape[dim]
            at = torch.arange(299, dtype=torch.float64) * side / 299
            low = at.floor().long()
            high = (low + 1).clamp(max=side - 1)
            share = (at - low).to(self.dtype).reshape(-1, *[1] * (3 - dim))
            x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
        return (x - 128) / 128

    def block_35(self, name, x):
        return torch.cat(
            [
                self.chain(name, [("branch1x1", (1, 1))], x),
                self.chain(name, [("branch5x5_1", (1, 1)), ("branch5x5_2", (5, 5))], x),
                self.chain(
                    name, [("branch3x3dbl_1", (1, 1)), ("branch3x3dbl_2", (3, 3)), ("branch3x3dbl_3", (3, 3))], x
                ),
                self.chain(name, [("branch_pool", (1, 1))], F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
            ],
            dim=1,
        )

    def __call__(self, images):
        found = {}
        x = self.resized(images)
        x = self.conv("Conv2d_1a_3x3", x, stride=2)
        x = self.conv("Conv2d_2a_3x3", x)
        x = self.conv("Conv2d_2b_3x3", x, padding=1)
        x = F.max_pool2d(x, 3, 2)
        x = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x))
        x = F.max_pool2d(x, 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_35(name, x)
        small = self.chain("Mixed_6a", [("branch3x3dbl_1", (1, 1)), ("branch3x3dbl_2", (3, 3))], x)
        x = torch.cat(
            [
                self.conv("Mixed_6a.branch3x3", x, stride=2),
                self.conv("Mixed_6a.branch3x3dbl_3", small, stride=2),
                F.max_pool2d(x, 3, 2),
            ],
            dim=1,
        )
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            branches = [self.chain(name, windows, x) for windows in BRANCHES_17]
            if name == "Mixed_6d":
                # ADM's "mixed_6/conv:0", its channels last and the first seven of them.
                found["spatial"] = branches[0].permute(0, 2, 3, 1)[..., :7].flatten(1)
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            x = torch.cat([*branches, self.chain(name, [("branch_pool", (1, 1))], pooled)], dim=1)
        three = self.conv("Mixed_7a.branch3x3_2", self.conv("Mixed_7a.branch3x3_1", x), stride=2)
        seven = [("branch7x7x3_1", (1, 1)), ("branch7x7x3_2", (1, 7)), ("branch7x7x3_3", (7, 1))]
        seven = self.conv("Mixed_7a.branch7x7x3_4", self.chain("Mixed_7a", seven, x), stride=2)
        x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], dim=1)
        for name in ("Mixed_7b", "Mixed_7c"):
            three = self.conv(f"{name}.branch3x3_1", x)
            double = self.chain(name, [("branch3x3dbl_1", (1, 1)), ("branch3x3dbl_2", (3, 3))], x)
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            if name == "Mixed_7c":
                pooled = F.max_pool2d(x, 3, 1, 1)
            x = torch.cat(
                [
                    self.conv(f"{name}.branch1x1", x),
                    self.conv(f"{name}.branch3x3_2a", three, padding=(0, 1)),
                    self.conv(f"{name}.branch3x3_2b", three, padding=(1, 0)),
                    self.conv(f"{name}.branch3x3dbl_3a", double, padding=(0, 1)),
                    self.conv(f"{name}.branch3x3dbl_3b", double, padding=(1, 0)),
                    self.conv(f"{name}.branch_pool", pooled),
                ],
                dim=1,
            )
        found["2048"] = x.mean(dim=(2, 3))
        found["logits_unbiased"] = found["2048"] @ self.tensors["fc.weight"].T
        return {name: value.numpy() for name, value in found.items()}
