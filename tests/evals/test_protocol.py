import io

import numpy as np
from PIL import Image

from fvq_jax.evals.protocol import as_scored


def test_scored_pixels():
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert as_scored(image, "direct") is image
    file = io.BytesIO()
    Image.fromarray(image[1]).save(file, "JPEG", quality=75)
    published = as_scored(image, "published")
    np.testing.assert_array_equal(published[1], np.asarray(Image.open(file)))
    assert published.shape == image.shape
