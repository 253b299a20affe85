"""A generator's report with made-up figures: crops of photographs stand for samples."""

import numpy as np

from fvq_jax.data.photos import PhotoSource
from fvq_jax.report.generator import GeneratorReport, SampleSet


def made_up_generator_report(guidances=(1.0, 1.5, 2.0, 3.0), size: int = 32) -> GeneratorReport:
    source = PhotoSource(size, "eval", 60)
    names = list(dict.fromkeys(source.name(index) for index in range(60)))
    order = np.argsort([source[index]["label"] for index in range(60)], kind="stable")
    pictures = np.stack([source[int(index)]["image"] for index in order])
    captions = tuple(source.name(int(index)) for index in order)
    samples = [
        SampleSet(
            f"guidance {guidance:g}",
            {
                "fid": 12 + 6 * (guidance - 1.8) ** 2,
                "sfid": 9 + 2 * (guidance - 1.5) ** 2,
                "inception_score": 80 + 60 * guidance,
                "inception_score_std": 2.5,
                "precision": 0.6 + 0.1 * guidance,
                "recall": 0.7 - 0.1 * guidance,
                "class_accuracy": 0.8 + 0.05 * guidance,
            },
            images=2000,
            guidance=guidance,
            pictures=pictures,
            captions=captions,
        )
        for guidance in guidances
    ]
    rng = np.random.default_rng(0)
    rows = [{"step": step, "nll_bits": 5 + 4 / step**0.3 + 0.1 * rng.normal()} for step in range(20, 2001, 20)]
    for row in rows[19::20]:
        row |= {"eval/nll_bits": 5.1 + 4 / row["step"] ** 0.3, "eval/unigram_bits": 8.7, "eval/bigram_bits": 6.9}
    return GeneratorReport(
        title=f"Generator: 6 layers of width 192, 1,024 codes, {len(names)} classes",
        facts={
            "reference": "photos <held out>",
            "size": size,
            "protocol": "adm, float32 distances, uint8 round",
            "protocol_means": "as ADM's evaluation suite: pixels converted to 8 bits (round)",
        },
        metrics={"nll_bits": 5.514, "unigram_bits": 8.7, "bigram_bits": 6.9, "class_accuracy_of_real": 0.96},
        samples=samples,
        not_computed={"sfid": "no <statistics>"},
        rows=rows,
        config={"generator.layers": 6},
    )
