"""Every figure that is shown to people, in one place: its heading, format and unit, and which direction is better."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """How one figure is shown.

    Attributes:
      name: what people call it.
      format: how the value is written, in its unit.
      unit: what stands behind the value; empty for none.
      larger_is_better: None where neither direction is.
      network: the network that the metric uses, where it could be one of several.
      divisor: the stored value divided by this is the value in the unit.
    """

    name: str
    format: str
    unit: str = ""
    larger_is_better: bool | None = None
    network: str = ""
    divisor: float = 1.0

    @property
    def heading(self) -> str:
        """The name, with the network if that matters."""
        return f"{self.name} ({self.network})" if self.network else self.name

    @property
    def heading_with_unit(self) -> str:
        """The heading of a column or an axis, with the unit, so that the values need none."""
        return f"{self.heading} ({self.unit})" if self.unit else self.heading

    def text(self, value: float | int | None, missing: str = "") -> str:
        """The value as people read it, without its unit; `missing` if there is none."""
        return missing if value is None else f"{value / self.divisor if self.divisor != 1 else value:{self.format}}"


METRICS: dict[str, Metric] = {
    "step": Metric("Step", ",.0f"),
    "rfid": Metric("rFID", ".2f", larger_is_better=False),
    "fid": Metric("FID", ".2f", larger_is_better=False),
    "sfid": Metric("sFID", ".2f", larger_is_better=False),
    "inception_score": Metric("Inception Score", ".1f", larger_is_better=True),
    "inception_score_std": Metric("Deviation of the Inception Score", ".1f"),
    "precision": Metric("Precision", ".3f", larger_is_better=True),
    "recall": Metric("Recall", ".3f", larger_is_better=True),
    "nll_bits": Metric("Bits per code", ".3f", larger_is_better=False),
    "unigram_bits": Metric("Unigram, bits per code", ".3f", larger_is_better=False),
    "bigram_bits": Metric("Bigram, bits per code", ".3f", larger_is_better=False),
    "nll": Metric("Nats per code", ".4f", larger_is_better=False),
    "nll_perplexity": Metric("Perplexity of the generator", ",.1f", larger_is_better=False),
    "accuracy": Metric("Likeliest code right", ".1%", larger_is_better=True),
    "class_accuracy": Metric("Class accuracy", ".1%", larger_is_better=True),
    "class_accuracy_unguided": Metric("Class accuracy, guidance 1", ".1%", larger_is_better=True),
    "class_accuracy_of_real": Metric("Class accuracy of real pictures", ".1%", larger_is_better=True),
    "best_guidance": Metric("Best guidance", ".3g"),
    "samples_per_second": Metric("Samples/s", ",.1f", larger_is_better=True),
    "psnr": Metric("PSNR", ".2f", "dB", larger_is_better=True),
    "ssim": Metric("SSIM", ".3f", larger_is_better=True),
    "lpips_vgg": Metric("LPIPS", ".3f", larger_is_better=False, network="VGG16"),
    "lpips_alex": Metric("LPIPS", ".3f", larger_is_better=False, network="AlexNet"),
    "l1": Metric("L1", ".4f", larger_is_better=False),
    "mse": Metric("MSE", ".5f", larger_is_better=False),
    "usage": Metric("Codes used", ".1%", larger_is_better=True),
    "mean_usage": Metric("Mean usage of the windows in training", ".1%", larger_is_better=True),
    "dead_codes": Metric("Dead codes", ",", larger_is_better=False),
    "positions/usage_min": Metric("Codes used at the worst position in a group", ".1%", larger_is_better=True),
    "positions/dead": Metric("Positions in a group without a used code", ",", larger_is_better=False),
    "perplexity": Metric("Perplexity", ",.0f", larger_is_better=True),
    "quantization_error": Metric("Quantization error", ".4g", larger_is_better=False),
    "relative_quantization_error": Metric("Quantization error, share of |z|^2", ".1%", larger_is_better=False),
    "bits_per_pixel": Metric("Bits per pixel", ".3g"),
    "parameters": Metric("Parameters", ",.0f"),
    "seconds": Metric("Time", ",.0f", "s", larger_is_better=False),
    "images_per_second": Metric("Images/s", ",.1f", larger_is_better=True),
    "peak_memory_bytes": Metric("Peak memory", ".2f", "GiB", larger_is_better=False, divisor=2.0**30),
}
