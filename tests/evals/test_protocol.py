import io

import numpy as np
import pytest
from PIL import Image

from fvq_jax.evals.protocol import Unresized, as_scored, center_crop_unresized


def marked(height, width):
    """Every pixel says where it is."""
    rows, columns = np.meshgrid(np.arange(1, height + 1), np.arange(1, width + 1), indexing="ij")
    return np.stack([rows, columns, rows * 0], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),  # of the first pixel that is kept, counted from 1; 0: one black pixel before it
    [(8, 8, 3, 3), (9, 7, 3, 3), (11, 4, 5, 1), (4, 4, 1, 1), (3, 2, 1, 0)],
)
def test_the_middle_is_kept_as_it_is(height, width, top, left):
    crop = center_crop_unresized(marked(height, width), 4)
    assert crop.shape == (4, 4, 3)
    inside = crop[..., 0] > 0
    assert inside.sum() == min(4, height) * min(4, width)
    assert tuple(crop[0, max(0, 1 - left), :2]) == (top, max(left, 1))
    rows, columns = np.nonzero(inside)
    np.testing.assert_array_equal(crop[inside][:, 0] - rows, top)
    np.testing.assert_array_equal(crop[inside][:, 1] - columns, left)


def test_scored_pixels():
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert as_scored(image, "direct") is image
    file = io.BytesIO()
    Image.fromarray(image[1]).save(file, "JPEG", quality=75)
    published = as_scored(image, "published")
    np.testing.assert_array_equal(published[1], np.asarray(Image.open(file)))
    assert published.shape == image.shape


def test_a_source_is_only_cropped():
    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": marked(6, 6), "label": np.int32(index), "corrupt": np.int64(-1)}

        def name(self, index):
            return f"picture {index}"

        def fingerprint(self):
            return "three"

    source = Unresized(Source(), 4)
    assert (len(source), source.name(1), source.fingerprint()) == (3, "picture 1", "three")
    assert source[2]["label"] == 2
    np.testing.assert_array_equal(source[2]["image"], marked(6, 6)[1:5, 1:5])
