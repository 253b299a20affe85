"""What an independent PyTorch implementation computes for the golden cases, in float32 or float64.

In float64 it says what exact arithmetic gives; in float32 beside it, how much rounding is to be expected of a float32
network. It needs PyTorch, so a test calls `pytest.importorskip("torch")` before it imports this file. Results have the
keys and the layout of `tests/helpers/golden64.py`.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tests.helpers.golden_case import load_case
from tests.helpers.torch_reference import Tokenizer

# VGG16's convolutions by the stage of LPIPS that they belong to; every stage but the first starts with a pooling.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


class LeakyReLU(nn.Module):
    """Slope 0.2 below `kink`, which is 0 unless a test says what a rounded run took for positive.

    `between` counts the units seen so far whose slope this changes.
    """

    kink, between = 0.0, 0

    def forward(self, x):
        positive = x > self.kink
        self.between += int((positive & (x <= 0)).sum())
        return torch.where(positive, x, 0.2 * x)


class PatchGAN(nn.Module):
    """Three convolutions of stride 2, one of stride 1, and the projection to a logit."""

    def __init__(self, ndf):
        super().__init__()
        layers = [nn.Conv2d(3, ndf, 4, 2, 1), LeakyReLU()]
        for i in range(3):
            before, after, stride = ndf * 2**i, ndf * 2 ** (i + 1), 2 if i < 2 else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.BatchNorm2d(after), LeakyReLU()]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 1))

    def forward(self, images):
        return self.main(images)


def compute(name, dtype, noise_seed=None, **options):
    """The results of a case; with `noise_seed` after a relative change of all weights by less than float32 rounding.

    `options` are those of the case's own function below.
    """
    case = load_case(name)
    program = {"lpips_vgg16": lpips, "training_run": training_run}.get(name, tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a machine that does other things too
    try:
        results = program(case, _weights(case, dtype, noise_seed), dtype, **options)
    finally:
        torch.set_num_threads(threads)
    return {key: np.asarray(value) for key, value in results.items()}


def rounding(name, errors):
    """Root mean square, over five roundings, of what `errors` finds between float32 and float64; a dict as it gives."""
    exact = compute(name, torch.float64)
    found = [errors(compute(name, torch.float32, seed), exact) for seed in (None, 0, 1, 2, 3)]
    return {key: float(np.sqrt(np.mean([np.square(error[key]) for error in found]))) for key in found[0]}


def _weights(case, dtype, noise_seed):
    weights = {key: torch.from_numpy(value) for key, value in case.weights.items()}
    generator = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
    for key, value in weights.items():
        if value.dtype == torch.float32:
            weights[key] = value.to(dtype)
            if generator is not None:
                weights[key] *= 1 + 2**-24 * torch.randn(value.shape, dtype=dtype, generator=generator)
    return weights


def _pictures(case, dtype, name="image"):
    return torch.from_numpy(np.array(np.moveaxis(np.asarray(case.images(name)), -1, -3))).to(dtype)


def tokenizer(case, weights, dtype):
    config, images = case.config, _pictures(case, dtype)
    net = Tokenizer(config).to(dtype)
    net.load_state_dict(weights)
    output = net(images, config["entropy_temperature"])
    losses = {
        "vq_loss": output.vq,
        "commit_loss": config["commit_loss_beta"] * output.commit,
        "entropy_loss": config["entropy_loss_ratio"] * output.entropy,
    }
    losses["loss"] = F.mse_loss(output.reconstruction, images) + sum(losses.values())
    losses["loss"].backward()
    return {
        "latent": output.latent.detach(),
        "codebook": output.table.detach(),
        "indices": output.indices,
        "quantized": output.quantized.detach(),
        "reconstruction": output.reconstruction.detach(),
        **{key: value.detach() for key, value in losses.items()},
        **{f"grad/{key}": value.grad for key, value in net.named_parameters() if value.requires_grad},
    }


def lpips(case, weights, dtype, kink=0.0):
    """`kink`: where the slope of every ReLU changes, in multiples of its layer's root mean square."""
    a, b = _pictures(case, dtype, "a"), _pictures(case, dtype, "b").requires_grad_()
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).to(dtype)[:, None, :, None, None]

    def relu(x):
        return F.relu(x) if kink == 0 else torch.where(x > kink * x.detach().square().mean().sqrt(), x, 0 * x)

    def features(x):
        x = (x - shift) / scale
        for stage, convolutions in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if stage else x
            for index in convolutions:
                key = f"net.slice{stage + 1}.{index}"
                x = relu(F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], padding=1))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    distance = sum(
        ((x - y).square() * weights[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2))
        for stage, (x, y) in enumerate(zip(features(a), features(b), strict=True))
    )
    distance.sum().backward()
    return {"distance": distance.detach(), "grad_b": b.grad}


def training_run(case, weights, dtype, kinks=()):
    """`kinks`: {step: kink of the discriminator's leaky ReLU in it}, counted from 1; `between` is what they change."""
    config, kinks = case.config, dict(kinks)
    net = Tokenizer(config["model"]).to(dtype)
    net.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    critic = PatchGAN(config["disc_ndf"]).to(dtype)
    critic.load_state_dict(
        {k.removeprefix("discriminator."): v for k, v in weights.items() if k.startswith("discriminator.")}
    )
    relus = [module for module in critic.modules() if isinstance(module, LeakyReLU)]
    optimizers = [torch.optim.Adam(module.parameters(), betas=tuple(config["betas"])) for module in (net, critic)]
    average = {key: value.detach().clone() for key, value in net.named_parameters()}
    rows = []
    for step, images in enumerate(_pictures(case, dtype, "images"), 1):
        # Before its first step the adversary weighs nothing, but its optimizer already counts steps.
        rate = case.outputs["rows"][step - 1, 0]
        weight = config["disc_weight"] if step >= config["disc_start"] else 0.0
        for relu in relus:
            relu.kink = kinks.get(step, 0.0)
        output = net(images)
        rec = F.mse_loss(output.reconstruction, images)
        commit = config["model"]["commit_loss_beta"] * output.commit
        fooled = -critic(output.reconstruction).mean()
        total = rec + output.vq + commit + weight * fooled
        gen_norm = _update(net, optimizers[0], total, rate, config["max_grad_norm"])
        real, fake = critic(images), critic(output.reconstruction.detach())
        disc_total = weight * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        disc_norm = _update(critic, optimizers[1], disc_total, rate, config["max_grad_norm"])
        for key, value in net.named_parameters():
            average[key].lerp_(value.detach(), 1 - config["ema_decay"])
        terms = (rec, output.vq, commit, fooled, total)
        rows.append([rate, *(x.item() for x in terms), gen_norm, disc_total.item(), disc_norm])
    first = _pictures(case, dtype, "images")[0, :1]
    with torch.no_grad():
        final = net(first).reconstruction
        net.load_state_dict(average, strict=False)
        averaged = net(first).reconstruction
    return {
        "rows": np.array(rows),
        "final_reconstruction": final,
        "ema_reconstruction": averaged,
        "between": sum(relu.between for relu in relus),
    }


def _update(module, optimizer, loss, rate, max_norm):
    """One step of Adam after clipping; the norm of the gradient before it."""
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    norm = torch.sqrt(sum(value.grad.square().sum() for value in module.parameters()))
    for value in module.parameters():
        value.grad *= torch.clamp(max_norm / (norm + 1e-30), max=1.0)
    optimizer.step()
    return norm.item()
