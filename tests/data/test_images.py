"""Preparing a photograph as the authors evaluate."""

import numpy as np
import pytest
import torch
from PIL import Image

from t2t_ref import imagenet_class_names, preprocess

GREY = (torch.full((3, 1, 1), 128 / 255) - torch.tensor([[[0.485]], [[0.456]], [[0.406]]])) / torch.tensor(
    [[[0.229]], [[0.224]], [[0.225]]]
)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(300, 500), (224, 224), (31, 17)])
def test_modes_and_sizes(mode, size):
    image = Image.new("RGB", size, (128, 128, 128)).convert(mode)
    out = preprocess(image)
    assert out.shape == (1, 3, 224, 224)
    if mode != "P":  # a palette has its own nearest grey
        torch.testing.assert_close(out[0], GREY.expand(3, 224, 224), atol=0.02, rtol=0)


def test_the_crop_is_the_centre_of_the_resized_image():
    pixels = np.zeros((600, 496, 3), np.uint8)
    pixels[:, 248:] = 255
    out = preprocess(pixels)[0, 0]
    assert out[:, :108].max() < -1.9 and out[:, 116:].min() > 1.9  # the edge lies in the middle of 224
    tall = np.zeros((600, 496, 3), np.uint8)
    tall[300:] = 255
    out = preprocess(tall)[0, 0]
    assert out[:108].max() < -1.9 and out[116:].min() > 1.9


def test_sixteen_bits_of_grey():
    grey = np.full((40, 60), 128 * 257, np.uint16)
    out = preprocess(grey, 32)
    torch.testing.assert_close(out[0], GREY.expand(3, 32, 32), atol=0.02, rtol=0)


def test_exif_rotation(tmp_path):
    """A camera held upright stores a lying picture and a tag. The left half is white once it is turned."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[20:] = 255  # below: to the left after a turn by 90 degrees clockwise
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    out = preprocess(tmp_path / "turned.png", 32)[0, 0]
    assert out[:, :14].min() > 1.9 and out[:, 18:].max() < -1.9


def test_not_square_sizes():
    assert preprocess(Image.new("RGB", (640, 480)), (96, 224)).shape == (1, 3, 96, 224)


def test_paths_and_refusals(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert preprocess(tmp_path / "a.png", 32).shape == (1, 3, 32, 32)
    (tmp_path / "b.png").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="b.png is not an image file"):
        preprocess(tmp_path / "b.png")
    truncated = (tmp_path / "a.png").read_bytes()[:-40]
    (tmp_path / "d.png").write_bytes(truncated)
    with pytest.raises(ValueError, match="d.png is not an image file that Pillow can read"):
        preprocess(tmp_path / "d.png")
    with pytest.raises(ValueError, match=r"expected an array of bytes, h w or h w c, found float64 of shape \(4, 4\)"):
        preprocess(np.zeros((4, 4)))
    with pytest.raises(FileNotFoundError):
        preprocess(tmp_path / "c.png")
    with pytest.raises(ValueError, match="found list"):
        preprocess([1, 2])


def test_class_names():
    names = imagenet_class_names()
    assert len(names) == 1000
    assert names[0] == "tench" and names[207] == "golden retriever" and names[652] == "military uniform"


def test_a_long_strip_costs_no_memory():
    """Resized as a whole, a strip of one pixel's width would have a million rows. Only its middle is shown."""
    pixels = np.zeros((20_000, 1, 3), np.uint8)
    pixels[9_950:10_050] = 128
    before = Image.Image.resize
    sizes = []

    def resize(self, size, *arguments, **named):
        sizes.append(size)
        return before(self, size, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        out = preprocess(pixels)
        preprocess(np.zeros((1, 20_000, 3), np.uint8), (112, 448))
    torch.testing.assert_close(out[0], GREY.expand(3, 224, 224), atol=0.02, rtol=0)
    assert max(max(size) for size in sizes) < 10_000
