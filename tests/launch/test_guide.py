"""docs/launch.md says what is so."""

import importlib
import math
import re

from tests.helpers.launch_flags import check_flags
from tests.helpers.stand_ins import LAUNCH, ROOT

GUIDE = (ROOT / "docs" / "launch.md").read_text()
IMAGES = 1281167  # of ImageNet's training set


def table(text, title):
    """The rows, as lists of cells, of the table whose first heading is `title`."""
    (block,) = re.findall(rf"^\| {title} \|.*\n(?:\|.*\n)+", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if "---" not in line]


def test_the_job_of_the_guide_can_work():
    """Step 5: on 256 chips, with a discriminator that acts."""
    (flags,) = re.findall(r"launch/tpu_pod.sh run .*--type=v5litepod-256.* -- (.*?)\n\n", GUIDE, flags=re.DOTALL)
    config = check_flags(flags.replace("\\\n", " ").split(), 256)
    assert config.adversarial.start < config.epochs * IMAGES / config.batch_size / 10


def test_the_costs_follow_from_the_plans():
    """Steps from the config, seconds from docs/scaling.md, and the rest from both; all of them named estimates."""
    (_, *plans) = table((ROOT / "docs" / "scaling.md").read_text(), "config")
    planned = {(name, place.split()[0], batch): row[-2] for name, place, batch, *row in plans}
    (heads, *rows) = table(GUIDE, "config, epochs")
    assert heads[-3:] == ["step, s (estimate)", "hours, at least", "chip-hours, at least"]
    for config, place, chips, batch, steps, seconds, hours, cost in rows:
        name, epochs = config.split(", ")
        assert importlib.import_module(f"configs.{name.strip('`')}").get_config().epochs == int(epochs)
        count = math.ceil(int(epochs) * IMAGES / int(batch.replace(",", "")))
        assert steps == f"{count:,}"
        plan = planned.get((name, place, batch), "not planned yet")
        assert seconds == plan, config
        if plan != "not planned yet":
            exact = count * float(seconds) / 3600
            assert float(hours) == float(f"{exact:.2g}")
            assert cost == f"{int(chips) * exact:.0f} x PRICE"


def test_errors_are_quoted_as_they_are_written():
    files = [*(ROOT / "fvq_jax").rglob("*.py"), LAUNCH / "tpu_pod.sh"]
    source = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in files))  # lines of one string, joined
    quotes = [quote for row in table(GUIDE, "what")[1:] for quote in re.findall(r"`([^`]*)`", row[1]) if " " in quote]
    assert len(quotes) >= 8
    for quote in quotes:
        for part in re.split(r"\.\.\.|\b(?:[NM]|nan|\d+)\b", quote):  # what is between changing words
            assert part.strip(" ,;:") in source, quote
