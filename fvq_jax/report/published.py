"""What others have reported for comparable tokenizers, on ImageNet at 256 x 256: the rows beside a run's own."""

import dataclasses

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
