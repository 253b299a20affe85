"""The tokenizer as a PyTorch module whose `state_dict` has the published names and shapes, for strict loading.

A second implementation, written from the structure alone: tests compare `fvq_jax` and its exported checkpoints with
it. It needs PyTorch, so a test calls `pytest.importorskip("torch")` before it imports this file. Arrays are NCHW;
every module also runs in float64 (`.double()`), which shows what float32 rounds away.
"""

import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

BRIDGE_WIDTH = {"XS": 32, "S": 64, "B": 128, "L": 256, "XL": 512}
BRIDGE_HEADS = 4
BRIDGE_DEPTH = 2


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = group_norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = group_norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Halves with padding at the right and the bottom only, or doubles each pixel and convolves."""

    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The blocks of one resolution; attention after each residual block at the lowest one."""

    def __init__(self, before, after, blocks, attention, resample):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(before if i == 0 else after, after) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(after) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample:
            setattr(self, resample, Resample(after, resample == "downsample"))

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if self.resample else x


class ConvNet(nn.Module):
    """The encoder, which starts from `ch` channels, or with `ch` None the decoder, lowest resolution first."""

    def __init__(self, channels_in, channels_out, widths, blocks, ch=None):
        super().__init__()
        self.down = ch is not None
        outer, lowest = [ch, *widths] if self.down else [widths[-1], *widths[::-1]], widths[-1]
        self.conv_in = nn.Conv2d(channels_in, outer[0], 3, padding=1)
        self.mid = nn.Sequential(ResBlock(lowest, lowest), Attention(lowest), ResBlock(lowest, lowest))
        last, low = len(widths) - 1, len(widths) - 1 if self.down else 0
        names = ["downsample" if self.down else "upsample"] * last + [None]
        self.conv_blocks = nn.Sequential(
            *(Stage(outer[i], outer[i + 1], blocks, i == low, names[i]) for i in range(len(widths)))
        )
        self.norm_out = group_norm(outer[-1])
        self.conv_out = nn.Conv2d(outer[-1], channels_out, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for part in (self.conv_blocks, self.mid) if self.down else (self.mid, self.conv_blocks):
            h = part(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class LinearBridge(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, codebook):
        return self.linear(codebook)


class BridgeBlock(nn.Module):
    """A ViT block; with `condition` a vector shifts, scales and gates both halves (adaLN)."""

    def __init__(self, width, condition):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})
        if condition:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = 0, 0, 1, 0, 0, 1
        if condition is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        qkv = self.attn["qkv"](layer_norm(x) * (1 + scale1) + shift1)
        q, k, v = qkv.reshape(len(x), 3, BRIDGE_HEADS, -1).permute(1, 2, 0, 3)
        h = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(x.shape)
        x = x + gate1 * self.attn["proj"](h)
        h = self.mlp["fc1"](layer_norm(x) * (1 + scale2) + shift2)
        return x + gate2 * self.mlp["fc2"](F.gelu(h, approximate="tanh"))


class PatchBridge(nn.Module):
    """Patches of the square raster of codes to tokens, blocks, and back; `kind` is vit or dit.

    A dit with `classes` has a vector for each of them and one for no class.
    """

    def __init__(self, kind, codes, dim, width, patch, classes=0):
        super().__init__()
        self.side, self.patch = round(codes**0.5), patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(dim, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(BridgeBlock(width, kind == "dit") for _ in range(BRIDGE_DEPTH))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, patch * patch * dim)})
        if kind == "dit":
            self.pos_embed = nn.Parameter(torch.zeros(1, codes // patch**2, width), requires_grad=False)
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
            self.final_layer["adaLN_modulation"] = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, codebook, label=0):
        raster = codebook.T.reshape(1, -1, self.side, self.side)
        x = self.x_embedder["proj"](raster)[0].flatten(1).T
        condition, shift, scale = None, 0, 0
        if hasattr(self, "y_embedder"):
            x = x + self.pos_embed[0]
            condition = self.y_embedder["embedding_table"](torch.tensor([label]))
            shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=-1)
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer["linear"](layer_norm(x) * (1 + scale) + shift)
        rows = self.side // self.patch
        return x.reshape(rows, rows, self.patch, self.patch, -1).transpose(1, 2).reshape(codebook.shape)


def make_bridge(name, codes, dim, classes=0):
    """None for `none`; `linear`; or `vit:QBridge-SIZE/P`, `dit:QBridge-SIZE/P`."""
    if name in ("none", "linear"):
        return LinearBridge(dim) if name == "linear" else None
    kind, _, size = name.partition(":QBridge-")
    size, patch = size.split("/")
    return PatchBridge(kind, codes, dim, BRIDGE_WIDTH[size], int(patch), classes)


class Quantizer(nn.Module):
    def __init__(self, codes, dim, bridge, l2_norm, classes=0):
        super().__init__()
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(codes, dim)
        self.register_buffer("codebook_used", torch.zeros(65536))
        if (bridge := make_bridge(bridge, codes, dim, classes)) is not None:
            self.qbridge = bridge

    def table(self, *label):
        """The codes that are searched, [k, d]; for a bridge with classes, those of a label."""
        table = self.qbridge(self.embedding.weight, *label) if hasattr(self, "qbridge") else self.embedding.weight
        return F.normalize(table, dim=-1) if self.l2_norm else table


@dataclasses.dataclass
class Output:
    """Tensors of one forward pass; `indices` [b, h*w], losses unweighted scalars, `entropy` with temperature only."""

    latent: torch.Tensor
    table: torch.Tensor
    indices: torch.Tensor
    quantized: torch.Tensor
    reconstruction: torch.Tensor
    vq: torch.Tensor
    commit: torch.Tensor
    entropy: torch.Tensor | None


class Tokenizer(nn.Module):
    """The whole network of a golden case: `Tokenizer(case.config)`, then `load_state_dict`."""

    def __init__(self, config):
        super().__init__()
        widths = [config["ch"] * mult for mult in config["ch_mult"]]
        blocks, z, dim = config["num_res_blocks"], config["z_channels"], config["codebook_dim"]
        self.encoder = ConvNet(3, z, widths, blocks, config["ch"])
        self.decoder = ConvNet(z, 3, widths, blocks + 1)
        options = config["bridge"], config.get("l2_norm", False), config.get("classes", 0)
        self.quantize = Quantizer(config["codebook_size"], dim, *options)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)

    def forward(self, images, temperature=None, label=()):
        """Encodes, quantizes and decodes images [b, 3, H, W] in [-1, 1]; `label` is empty or (the class of all,)."""
        latent, table = self.quant_conv(self.encoder(images)), self.quantize.table(*label)
        z = latent.permute(0, 2, 3, 1)
        z = F.normalize(z, dim=-1) if self.quantize.l2_norm else z
        flat = z.flatten(0, 2)
        distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
        indices = distance.argmin(1)
        chosen = table[indices].reshape(z.shape)
        quantized = (z + (chosen - z).detach()).permute(0, 3, 1, 2)
        return Output(
            latent=latent,
            table=table,
            indices=indices.reshape(len(images), -1),
            quantized=quantized,
            reconstruction=self.decoder(self.post_quant_conv(quantized)),
            vq=F.mse_loss(chosen, z.detach()),
            commit=F.mse_loss(z, chosen.detach()),
            entropy=None if temperature is None else entropy_loss(distance, temperature),
        )


def entropy_loss(distance, temperature):
    """Mean entropy of the tokens' soft assignments less the entropy of their mean."""
    log_p = (-distance / temperature).log_softmax(1)
    mean_p = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(1).mean() + (mean_p * (mean_p + 1e-5).log()).sum()
