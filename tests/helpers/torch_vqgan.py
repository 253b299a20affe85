"""The tokenizers of VQGAN's family as PyTorch modules with published names and shapes, for strict loading.

Written from the structure alone (arXiv 2012.09841, 2404.02905, 2203.01941, 2412.02692). It needs PyTorch, so a test
calls `pytest.importorskip("torch")` before it imports this file. Arrays are NCHW.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tests.helpers import torch_levels
from tests.helpers.torch_reference import Attention, Resample, ResBlock, group_norm, make_bridge


class FusedAttention(nn.Module):
    """Attention whose queries, keys and values are one convolution."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, 1))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    def __init__(self, before, after, blocks, attention, resample):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(before if i == 0 else after, after) for i in range(blocks))
        self.attn = nn.ModuleList(attention(after) for _ in range(blocks if attention else 0))
        if resample:
            setattr(self, resample, Resample(after, resample == "downsample"))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Half(nn.Module):
    """The encoder, or with `up` the decoder."""

    def __init__(self, config, up):
        super().__init__()
        ch, widths = config["ch"], [config["ch"] * mult for mult in config["ch_mult"]]
        attention = FusedAttention if config.get("fused") else Attention
        last, lowest = len(widths) - 1, widths[-1]
        self.up_first = up
        self.conv_in = nn.Conv2d(config["z_channels"] if up else 3, lowest if up else ch, 3, padding=1)
        self.mid = nn.ModuleDict({"block_1": ResBlock(lowest, lowest), "attn_1": attention(lowest)})
        self.mid["block_2"] = ResBlock(lowest, lowest)
        levels = []
        for i, width in enumerate(widths):
            before = ([*widths, lowest][i + 1]) if up else [ch, *widths][i]
            resample = ("upsample" if i else None) if up else ("downsample" if i < last else None)
            chosen = attention if i in config.get("attention", [last]) else None
            levels.append(Level(before, width, config["num_res_blocks"] + up, chosen, resample))
        setattr(self, "up" if up else "down", nn.ModuleList(levels))
        outer = widths[0] if up else lowest
        self.norm_out, self.conv_out = (
            group_norm(outer),
            nn.Conv2d(outer, 3 if up else config["z_channels"], 3, padding=1),
        )

    def forward(self, x):
        x = self.conv_in(x)
        for level in () if self.up_first else self.down:
            x = level(x)
        for block in self.mid.values():
            x = block(x)
        for level in reversed(self.up) if self.up_first else ():
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Nearest(nn.Module):
    """One code per latent; with `inner_product` that of the largest product."""

    def __init__(self, config):
        super().__init__()
        self.inner_product = config["kind"] == "ibq"
        self.embedding = nn.Embedding(config["codes"], config["dim"])

    def forward(self, z):
        table = self.embedding.weight
        if self.inner_product:
            codes = torch.einsum("bdhw,kd->bhwk", z, table).argmax(-1)
        else:
            codes = torch_levels.nearest(z, table)
        return torch_levels.look_up(codes, table), codes


class Signs(nn.Module):
    """Every channel becomes 1 or -1; the first one is the lowest bit of the code."""

    def __init__(self, config):
        super().__init__()

    def forward(self, z):
        bits = (z > 0).long()
        return 2.0 * bits - 1, torch.einsum("bdhw,d->bhw", bits, 2 ** torch.arange(z.shape[1]))


class Residual(nn.Module):
    """A book for every level, all of them the same object or none, with a row of padding and moving averages.

    Of books of their own the codes are numbered in turn, as fvq_jax does: code j of level l is j depth + l.
    """

    def __init__(self, config):
        super().__init__()
        self.own = config.get("own", False)
        books = [self.book(config) for _ in range(config["depth"] if self.own else 1)]
        self.codebooks = nn.ModuleList(books if self.own else books * config["depth"])

    @staticmethod
    def book(config):
        book = nn.Embedding(config["codes"] + 1, config["dim"], padding_idx=config["codes"])
        book.register_buffer("cluster_size_ema", torch.ones(config["codes"]))
        book.register_buffer("embed_ema", book.weight[:-1].detach().clone())
        return book

    def forward(self, z):
        vectors, codes, *_ = torch_levels.residual(z, [book.weight[:-1] for book in self.codebooks])
        depth = len(self.codebooks)
        return vectors, codes * depth + torch.arange(depth) if self.own else codes


class MultiScale(nn.Module):
    def __init__(self, config):
        super().__init__()
        k, d, self.scales = config["codes"], config["dim"], config["scales"]
        self.embedding = nn.Embedding(k, d)
        self.quant_resi = nn.ModuleDict({"qresi_ls": nn.ModuleList(nn.Conv2d(d, d, 3, padding=1) for _ in range(4))})
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.scales), k))
        bridge = make_bridge(config.get("bridge", "none"), k, d)
        if bridge is not None:
            self.qbridge = bridge
            self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, z):
        table = self.qbridge(self.embedding.weight) if hasattr(self, "qbridge") else self.embedding.weight
        phi = self.quant_resi["qresi_ls"]
        kernels, biases = [layer.weight for layer in phi], [layer.bias for layer in phi]
        vectors, codes, *_ = torch_levels.multi_scale(z, table, kernels, biases, self.scales)
        return vectors, codes


class Tokenizer(nn.Module):
    """`kind` is taming, ibq, rq_vae, var or lfq; images [b, 3, H, W] in [-1, 1] to pixels and codes."""

    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = Half(config, False), Half(config, True)
        made = {"rq_vae": Residual, "var": MultiScale, "lfq": Signs}.get(config["kind"], Nearest)(config)
        self.place = "quantizer" if config["kind"] == "rq_vae" else "quantize"
        setattr(self, self.place, made)
        if config["kind"] == "lfq":
            return
        z, d, side = config["z_channels"], config["dim"], config.get("kernel", 1)
        self.quant_conv = nn.Conv2d(z, d, side, padding=side // 2)
        self.post_quant_conv = nn.Conv2d(d, z, side, padding=side // 2)

    def forward(self, images):
        vectors, codes = getattr(self, self.place)(self.latents(images))
        return self.decoder(self.post_quant_conv(vectors) if hasattr(self, "post_quant_conv") else vectors), codes

    def latents(self, images):
        features = self.encoder(images)
        return self.quant_conv(features) if hasattr(self, "quant_conv") else features
