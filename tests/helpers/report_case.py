"""A report with made-up figures: half-used codebook, blurred photographs, a few steps of training."""

import numpy as np
import skimage.data
from PIL import Image, ImageFilter

from fvq_jax.evals.examples import ExampleCollector
from fvq_jax.evals.reconstruction import NEVER, Found, Sums
from fvq_jax.ops.code_usage import code_statistics, perplexity, usage
from fvq_jax.report.tokenizer import Report, Trained


def made_up_report(codes: int = 1024, size: int = 32, images: int = 192) -> Report:
    rng = np.random.default_rng(0)
    tokens = (size // 4) ** 2 * images
    share = rng.permutation(np.where(np.arange(codes) < codes * 0.9, 1 / np.arange(1, codes + 1) ** 0.7, 0))
    counts = rng.multinomial(tokens, share / share.sum()).astype(np.int64)
    first_use = np.where(counts > 0, (images / np.maximum(counts, 1) * rng.random(codes)).astype(np.int64), NEVER)
    photograph = Image.fromarray(skimage.data.astronaut())
    collector = ExampleCollector(8, images, lambda position: f"/data/val/<b>&{position}.png")
    for position in range(0, images, max(1, images // 24)):
        left, top = rng.integers(0, 512 - size, 2)
        crop = photograph.crop((left, top, left + size, top + size))
        radius = rng.uniform(0.4, size / 60 + 1)
        pair = [np.asarray(picture) for picture in (crop, crop.filter(ImageFilter.GaussianBlur(radius)))]
        scores = {"psnr": np.array([33 - 4 * radius]), "ssim": np.array([0.95 - 0.1 * radius])}
        collector.add(np.array([position]), scores, pair[0][None], pair[1][None])
    sums = Sums(
        np.int64(images),
        np.int64(0),
        np.int64(0),
        np.int64(3),
        {},
        np.float64(0.3),
        np.float64(4),
        counts[None],
        None,
        None,
        None,
    )
    metrics = {"psnr": 27.812, "ssim": 0.7634, "l1": 0.031, "mse": 0.0017, "rfid": 1.234}
    metrics |= {"inception_score": 189.53, "inception_score_std": 2.345, "lpips_alex": 0.0871}
    metrics |= {"quantization_error": 0.3 / images, "relative_quantization_error": 0.075}
    metrics |= {"usage": float(usage(counts)), "perplexity": float(perplexity(counts))}
    rows = [
        {
            "step": step,
            "loss/total": 2 / step**0.5 + 0.05 * rng.normal() / step**0.5,
            "loss/reconstruction": 1 / step**0.5,
            "loss/codebook": 0.01 + 0.001 * rng.normal(),
            "usage/batch": 1 - np.exp(-step / 300) * 0.9,
            "usage/window": 1 - np.exp(-step / 100) * 0.5,
            "tokens/window": 40_960,
        }
        for step in range(20, 2001, 20)
    ]
    rows[-1] |= {"eval/usage": 0.9, "eval/tokens": tokens}
    points = rng.normal(size=(codes, 2)) * (3, 1) + rng.integers(0, 2, (codes, 1)) * 6
    return Report(
        tokenizer=Trained(codes, 256, 4, "bridge L/4"),
        facts={
            "path": "runs/<mine>",
            "data": "PICTURES/val",
            "pictures": "192 files",
            "protocol": "direct",
            "protocol_means": "shorter side resized, central crop",
            "size": size,
            "images": images,
            "different_pictures": 192,
            "skipped_files": 0,
            "enlarged_pictures": 3,
            "tokens": tokens,
        },
        metrics=metrics | code_statistics(counts, 16, codes),
        not_computed={"lpips_vgg": "not given: get the weights and pass --vgg16=FILE"},
        found=Found(sums, int(sums.images + sums.skipped), first_use, collector.result(size)),
        plane=(points.astype(np.float32), np.array([0.31, 0.07], np.float32)),
        rows=rows,
        batch_tokens=2048,
        config={"seed": 0, "tokenizer.quantizer.bridge": "L/4", "optim.learning_rate": 1e-4},
    )
