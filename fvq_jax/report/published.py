"""What others have reported on ImageNet at 256 x 256, for tokenizers and generators: the rows beside a run's own."""

import dataclasses

from fvq_jax.report.page import TIMES

FVQ = "FVQ paper, arXiv 2509.10140"
STABLE_VQ = "StableVQ paper (2026)"
SOURCES = {
    FVQ: "Centre crop without resizing, crops and reconstructions stored as JPEG of quality 75 (protocol published).",
    STABLE_VQ: "An independent replication, scored directly (protocol direct); which network LPIPS used is not stated.",
}


@dataclasses.dataclass(frozen=True)
class Published:
    """One reported result; None where nothing was reported. `usage` in [0, 1], `ssim` with data range 1.

    `lpips_network` is the network that LPIPS used; empty where that is not stated.
    """

    name: str
    codes: int
    code_dim: int | None
    downsampling: int
    epochs: int | None
    rfid: float | None
    source: str
    usage: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    lpips_network: str = ""


RESULTS = (
    Published("FVQ", 16_384, 256, 16, 40, 1.30, FVQ, usage=1.0),
    Published("FVQ", 16_384, 256, 16, 120, 1.17, FVQ, usage=1.0),
    Published("FVQ", 65_536, 512, 16, 120, 1.00, FVQ, usage=1.0),
    Published("FVQ", 262_144, 256, 16, 40, 0.95, FVQ, usage=1.0),
    Published("FVQ", 262_144, 256, 16, 120, 0.88, FVQ, usage=1.0),
    Published("FVQ", 16_384, 256, 8, None, 0.39, FVQ, usage=1.0),
    Published("VQGAN", 16_384, 256, 16, None, 4.98, FVQ, usage=0.059),
    Published("LlamaGen", 16_384, 256, 16, None, 9.21, FVQ, usage=0.0029),
    Published("VQGAN-LC", 100_000, 8, 16, None, 2.62, FVQ, usage=0.99),
    Published("IBQ", 16_384, 256, 16, None, 1.55, FVQ, usage=0.97),
    Published("FVQ", 16_384, 256, 16, 40, 1.70, STABLE_VQ, psnr=21.85, ssim=0.589, lpips=0.218),
    Published("FVQ", 16_384, 256, 16, 120, 1.46, STABLE_VQ),
    Published("FVQ", 262_144, 256, 16, 40, 1.29, STABLE_VQ, psnr=22.50, ssim=0.615, lpips=0.200),
    Published("FVQ", 262_144, 256, 16, 120, 1.07, STABLE_VQ),
    Published("SimVQ", 16_384, None, 16, None, 2.89, STABLE_VQ),
    Published("SimVQ", 262_144, None, 16, None, 3.16, STABLE_VQ),
)


LLAMAGEN = "LlamaGen paper, arXiv 2406.06525"
VAR = "VAR paper, arXiv 2404.02905"
RAR = "RAR paper, arXiv 2411.00776"
OTHERS = "Other generators"
_ADM = "Scored by ADM's evaluation suite (float16 distances) against the statistics of its training set"
GENERATOR_SOURCES = {
    FVQ: f"LlamaGen's network on FVQ's codes, sampled at 256. {_ADM}.",
    LLAMAGEN: f"With guidance. {_ADM}. Rows of 384 are sampled at 384 {TIMES} 384 and resized to 256 {TIMES} 256.",
    VAR: f"{_ADM}; the repository of VAR reports higher FIDs for the same checkpoints: 3.55, 2.95, 2.33 and 1.97.",
    RAR: f"{_ADM}.",
    OTHERS: f"DiT: arXiv 2212.09748, MaskGIT: arXiv 2202.04200. {_ADM}.",
}


@dataclasses.dataclass(frozen=True)
class PublishedGenerator:
    """Scores of one generator, of 50,000 samples of ImageNet's classes; None where nothing was reported.

    `parameters` in millions; `size` is the side of the samples in pixels, before any resizing.
    """

    name: str
    parameters: int
    size: int
    fid: float
    inception_score: float
    source: str
    precision: float | None = None
    recall: float | None = None


GENERATORS = (
    PublishedGenerator("FVQ-L", 343, 256, 2.39, 276.6, FVQ),
    PublishedGenerator("FVQ-XL", 775, 256, 2.07, 287.0, FVQ),
    PublishedGenerator("LlamaGen-B", 111, 256, 5.46, 193.6, LLAMAGEN, 0.83, 0.45),
    PublishedGenerator("LlamaGen-L", 343, 256, 3.80, 248.3, LLAMAGEN, 0.83, 0.51),
    PublishedGenerator("LlamaGen-XL", 775, 256, 3.39, 227.1, LLAMAGEN, 0.81, 0.54),
    PublishedGenerator("LlamaGen-XXL", 1411, 256, 3.09, 253.6, LLAMAGEN, 0.83, 0.53),
    PublishedGenerator("LlamaGen-3B", 3097, 256, 3.05, 222.3, LLAMAGEN, 0.80, 0.58),
    PublishedGenerator("LlamaGen-B", 111, 384, 6.09, 182.5, LLAMAGEN),
    PublishedGenerator("LlamaGen-L", 343, 384, 3.07, 256.1, LLAMAGEN, 0.83, 0.52),
    PublishedGenerator("LlamaGen-XL", 775, 384, 2.62, 244.1, LLAMAGEN, 0.80, 0.57),
    PublishedGenerator("LlamaGen-XXL", 1411, 384, 2.34, 253.9, LLAMAGEN, 0.80, 0.59),
    PublishedGenerator("LlamaGen-3B", 3097, 384, 2.18, 263.3, LLAMAGEN, 0.81, 0.58),
    PublishedGenerator("LlamaGen-3B, no guidance", 3097, 384, 9.38, 112.9, LLAMAGEN),
    PublishedGenerator("VAR-d16", 310, 256, 3.30, 274.4, VAR, 0.84, 0.51),
    PublishedGenerator("VAR-d20", 600, 256, 2.57, 302.6, VAR, 0.83, 0.56),
    PublishedGenerator("VAR-d24", 1000, 256, 2.09, 312.9, VAR, 0.82, 0.59),
    PublishedGenerator("VAR-d30", 2000, 256, 1.92, 323.1, VAR, 0.82, 0.59),
    PublishedGenerator("RAR-B", 261, 256, 1.95, 290.5, RAR, 0.82, 0.58),
    PublishedGenerator("RAR-L", 461, 256, 1.70, 299.5, RAR, 0.81, 0.60),
    PublishedGenerator("RAR-XL", 955, 256, 1.50, 306.9, RAR, 0.80, 0.62),
    PublishedGenerator("RAR-XXL", 1500, 256, 1.48, 326.0, RAR, 0.80, 0.63),
    PublishedGenerator("DiT-XL/2", 675, 256, 2.27, 278.2, OTHERS, 0.83, 0.57),
    PublishedGenerator("MaskGIT", 227, 256, 6.18, 182.1, OTHERS, 0.80, 0.51),
)
