"""The training step of the tokenizer in PyTorch, as its users write it: the peer of `train_step.py`.

The network is the one of `tests/helpers/torch_reference.py`, which loads the weights that `fvq_jax` exports; here are
LPIPS, PatchGAN, the losses and both updates. The whole distance matrix is built, in float32. On a GPU encoder, decoder,
bridge, LPIPS and discriminator run under bfloat16 autocast and, unless told otherwise, are compiled, and cuDNN tries
its algorithms first; on a CPU everything is float32.
"""

from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from ml_collections import ConfigDict
from torch import nn

from fvq_jax.models.frozen.lpips import STAGES, WIDTHS
from fvq_jax.models.quantizers.bridge import parse_bridge
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import dotted
from tests.helpers.torch_reference import Tokenizer

# Settings that this step does not support, with the only value that it takes.
FIXED = {
    "tokenizer.quantizer.name": "vector",
    "tokenizer.quantizer.entropy_weight": 0.0,
    "adversarial.discriminator": "patchgan",
    "adversarial.loss": "hinge",
    "adversarial.adaptive": False,
    "tokenizer.quantizer.bridge_groups": "2d",
    "optim.train_only": "",
    "optim.accumulate": 1,
    "optim.ema_decay": 0.0,
}


def published_network(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `torch_reference.Tokenizer`. InputError if this step does not support the config."""
    for name, value in FIXED.items():
        given = dotted(config)[name]
        if given != value:
            raise InputError(f"the PyTorch step has no {name}={given!r}: set it to {value!r}")
    model, quantizer = config.tokenizer, config.tokenizer.quantizer
    spec = parse_bridge(quantizer.bridge)
    if spec.kind == "mlp5" or spec.depth not in (0, 2):
        raise InputError(f"the PyTorch step has no bridge {quantizer.bridge}: take none, linear or SIZE/P")
    size = quantizer.bridge.removeprefix("dit-")
    return {name: model[name] for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")} | {
        "codebook_size": quantizer.codebook_size,
        "codebook_dim": quantizer.code_dim,
        "bridge": f"{spec.kind}:QBridge-{size}" if spec.patch else spec.kind,
        "l2_norm": quantizer.l2_normalize,
    }


class Lpips(nn.Module):
    """LPIPS of VGG16 with fixed weights, from tensors in the published layout."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length activations of the five stages."""
        x, found = (x - self.shift) / self.scale, []
        for stage, (_, indices) in enumerate(zip(WIDTHS, STAGES, strict=True)):
            x = F.max_pool2d(x, 2) if stage else x
            for index in indices:
                key = f"net_slice{stage + 1}_{index}"
                x = F.relu(F.conv2d(x, getattr(self, f"{key}_weight"), getattr(self, f"{key}_bias"), padding=1))
            found.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return found

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The mean distance of the pairs."""
        with torch.no_grad():
            of_a = self.features(a)
        distance = 0
        for stage, (x, y) in enumerate(zip(of_a, self.features(b), strict=True)):
            weights = getattr(self, f"lin{stage}_model_1_weight")
            distance = distance + ((x - y).square() * weights).sum(1).mean()
        return distance


class PatchGAN(nn.Sequential):
    """The patch discriminator with BatchNorm, as published with pix2pix."""

    def __init__(self, ndf: int, layers: int):
        parts, before = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)], ndf
        for i in range(1, layers + 1):
            after = ndf * min(2**i, 8)
            parts += [nn.Conv2d(before, after, 4, 2 if i < layers else 1, 1, bias=False), nn.BatchNorm2d(after)]
            parts, before = [*parts, nn.LeakyReLU(0.2)], after
        super().__init__(*parts, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)


class TorchStep:
    """Networks, optimizers and one training step; `step` takes uint8 images [b, H, W, 3] on the device."""

    def __init__(self, config: ConfigDict, folder: str, device: str, compiled: bool):
        torch.backends.cudnn.benchmark = True
        self.loss, self.settings = config.loss, config.tokenizer.quantizer
        self.weight, self.clip = config.adversarial.weight, config.optim.clip_norm
        self.device, self.codes, self.usage = device, self.settings.codebook_size, None
        self.net = Tokenizer(published_network(config))
        self.net.load_state_dict(safetensors.torch.load_file(f"{folder}/tokenizer.safetensors"))
        self.net.to(device, memory_format=torch.channels_last).train()
        self.lpips = self.discriminator = None
        if self.loss.perceptual_weight > 0:
            self.lpips = Lpips(safetensors.torch.load_file(f"{folder}/lpips.safetensors"))
            self.lpips.to(device, memory_format=torch.channels_last)
        networks = [self.net]
        if self.weight > 0:
            self.discriminator = PatchGAN(config.adversarial.ndf, config.adversarial.layers)
            networks.append(self.discriminator.to(device, memory_format=torch.channels_last))
        rate, betas = config.optim.learning_rate, (config.optim.b1, config.optim.b2)
        self.optimizers = [
            torch.optim.Adam([p for p in network.parameters() if p.requires_grad], rate, betas, fused=True)
            for network in networks
        ]
        self.tokenizer_loss, self.critic_loss = self._tokenizer_loss, self._critic_loss
        if compiled and device == "cuda":
            self.tokenizer_loss, self.critic_loss = (
                torch.compile(self._tokenizer_loss),
                torch.compile(self._critic_loss),
            )

    def parameters(self) -> dict[str, int]:
        """How many parameters each network has."""
        networks = {"tokenizer": self.net, "discriminator": self.discriminator}
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items() if net is not None}
        if self.lpips is not None:
            counts["lpips"] = sum(b.numel() for b in self.lpips.buffers()) - 6  # shift and scale
        return counts

    def step(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both updates from one forward pass; returns the named losses."""
        images = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        total, terms, reconstruction, codes = self.tokenizer_loss(images)
        self._update(self.optimizers[0], total)
        self.usage = (torch.bincount(codes, minlength=self.codes) > 0).float().mean()
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
            self._update(self.optimizers[1], self.critic_loss(images, reconstruction))
        return terms

    def quantizer(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of bridge, search, look-up and losses alone, for latents [b, d, h, w]."""
        vectors, _, codebook, commitment = self._quantize(latent)
        loss = self.settings.codebook_weight * codebook + self.settings.commitment_weight * commitment + vectors.sum()
        return torch.autograd.grad(loss, [latent, *self.net.quantize.parameters()], allow_unused=True)

    def _half(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def _quantize(self, latent):
        with self._half():
            table = self.net.quantize.table()
        z, table = latent.permute(0, 2, 3, 1), table.float()
        z = F.normalize(z, dim=-1) if self.net.quantize.l2_norm else z
        with torch.no_grad():
            flat = z.flatten(0, 2)
            distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
            codes = distance.argmin(1)
        chosen = table[codes].view(z.shape)
        vectors = (z + (chosen - z).detach()).permute(0, 3, 1, 2)
        return vectors, codes, F.mse_loss(chosen, z.detach()), F.mse_loss(z, chosen.detach())

    def _tokenizer_loss(self, images):
        with self._half():
            features = self.net.encoder(images)
        vectors, codes, codebook, commitment = self._quantize(self.net.quant_conv(features.float()))
        features = self.net.post_quant_conv(vectors)
        with self._half():
            reconstruction = self.net.decoder(features)
            reconstruction = reconstruction.float()
            distance = F.mse_loss if self.loss.reconstruction == "l2" else F.l1_loss
            terms = {"reconstruction": distance(reconstruction, images), "codebook": codebook, "commitment": commitment}
            total = self.loss.reconstruction_weight * terms["reconstruction"]
            total = total + self.settings.codebook_weight * codebook + self.settings.commitment_weight * commitment
            if self.lpips is not None:
                terms["perceptual"] = self.lpips(images, reconstruction)
                total = total + self.loss.perceptual_weight * terms["perceptual"]
            if self.discriminator is not None:
                total = total - self.weight * self.discriminator(reconstruction).float().mean()
        return total, terms, reconstruction.detach(), codes

    def _critic_loss(self, images, reconstruction):
        with self._half():
            real, fake = self.discriminator(images).float(), self.discriminator(reconstruction).float()
        return self.weight * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def _update(self, optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip > 0:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.clip)
        optimizer.step()


def load(config: ConfigDict, folder: str, images: np.ndarray, latent: np.ndarray, compiled: bool) -> Any:
    """The program for `train_step.py`, which says what the arrays are; see `processes.py` for what is returned.

    `compiled` is for a GPU; on a CPU the step is never compiled.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.from_numpy(images).to(device)
    latent = torch.from_numpy(latent).permute(0, 3, 1, 2).to(device).requires_grad_()

    def build():
        trainer, first = TorchStep(config, folder, device, compiled), {}

        def finished():
            if device == "cuda":
                torch.cuda.synchronize()

        def step():
            for name, value in trainer.step(images).items():
                first.setdefault(name, float(value.detach()))
            finished()

        def quantizer():
            trainer.quantizer(latent)
            finished()

        return {
            "step": step,
            "quantizer": quantizer,
            "losses": lambda: first,
            "parameters": trainer.parameters,
            "device": lambda: torch.cuda.get_device_name() if device == "cuda" else "cpu",
        }

    return build
