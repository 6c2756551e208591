"""Preparing a photograph as the authors evaluate."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from t2t_ref import imagenet_class_names, preprocess
from t2t_ref.data.images import IMAGENET_MEAN, IMAGENET_STD, normalise

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


RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)  # from black to white
BYTES = (RAMP * 255).round().astype(np.uint8)
COLOUR = np.stack([BYTES, BYTES.T, BYTES[::-1]], axis=-1)


def same_picture(shown, expected, steps=1.0):
    """Within so many of 255 steps, in standard deviations of the darkest channel."""
    torch.testing.assert_close(shown, expected, atol=steps / 255 / 0.224, rtol=0)


@pytest.mark.parametrize(
    "kind", ["<u2", ">u2", "<f4", "<f8", ">f4", "<f2", "|u1"], ids=lambda kind: kind.replace("|", "")
)
@pytest.mark.parametrize("channels", ["h w", "h w 1", "h w 2", "h w 3", "h w 4"])
def test_an_array_shows_the_same_picture_in_every_kind_of_number(kind, channels):
    """White is 255 of bytes, 65535 of 16 bits, 1 of floats, in either order of bytes; the last of 2 or 4 is alpha."""
    grey, opaque = BYTES[:, :, None], np.full((32, 32, 1), 255, np.uint8)
    array = {
        "h w": BYTES,
        "h w 1": grey,
        "h w 2": np.concatenate([grey, opaque], axis=-1),
        "h w 3": COLOUR,
        "h w 4": np.concatenate([COLOUR, opaque], axis=-1),
    }[channels]
    expected = preprocess(Image.fromarray(COLOUR if channels in ("h w 3", "h w 4") else BYTES), 32)
    array = array.astype(kind) * 257 if "u2" in kind else array if "u1" in kind else (array / 255).astype(kind)
    same_picture(preprocess(array, 32), expected, steps=1.01)


def test_masks_and_views_of_arrays():
    same_picture(preprocess(RAMP > 0.5, 32), preprocess(((RAMP > 0.5) * 255).astype(np.uint8), 32))
    same_picture(preprocess(COLOUR[:, ::-1, ::-1], 32), preprocess(COLOUR[:, ::-1, ::-1].copy(), 32))  # BGR, mirrored


@pytest.mark.parametrize(
    "array, why",
    [
        (RAMP * 255, r"float64 from 0 to 255: expected floats from 0 to 1"),
        (RAMP - 0.5, r"float64 from -0.5 to 0.5: expected floats from 0 to 1"),
        (RAMP * np.nan, r"float64 from nan to nan: expected floats from 0 to 1"),
        (BYTES.astype(np.int64), r"int64 from 0 to 255 do not say what white is: expected bytes"),
        (BYTES.astype(np.uint32), r"uint32 from 0 to 255 do not say what white is"),
        (BYTES.astype(np.int8), r"int8 from -128 to 127 do not say what white is"),
        (RAMP.astype(complex), r"complex128 do not say what white is"),
        (BYTES.astype(object), r"object do not say what white is"),
        (np.array([["a"]]), r"<U1 do not say what white is"),
        (COLOUR.transpose(2, 0, 1), r"1 to 4 channels, channels last: rearrange\(array, .*; found \(3, 32, 32\)"),
        (COLOUR[None], r"expected an array of h w or h w c with 1 to 4 channels; found \(1, 32, 32, 3\)"),
        (COLOUR[:0], r"found \(0, 32, 3\)"),
        (COLOUR[:, :, :0], r"found \(32, 32, 0\)"),
        (np.ones(()), r"found \(\)"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_arrays_that_are_no_picture_are_refused(array, why):
    with pytest.raises(ValueError, match=why):
        preprocess(array)


@pytest.mark.parametrize(
    "name", ["16.png", "16.tif", "16.pgm", "10.pgm", "floats.tif", "bits.png", "alpha.png", "lab.tif"]
)
def test_files_of_other_depths_show_the_same_picture(tmp_path, name):
    path, sixteen = tmp_path / name, (RAMP * 65535).round().astype(np.uint16)
    expected = preprocess(Image.fromarray(BYTES), 32)
    if name == "floats.tif":
        Image.fromarray(RAMP.astype(np.float32)).save(path)
    elif name == "16.pgm":
        path.write_bytes(b"P5 32 32 65535\n" + sixteen.astype(">u2").tobytes())
    elif name == "10.pgm":  # its own white is 1023
        path.write_bytes(b"P5 32 32 1023\n" + (RAMP * 1023).round().astype(">u2").tobytes())
    elif name == "bits.png":
        Image.fromarray(RAMP > 0.5).save(path)
        expected = preprocess(RAMP > 0.5, 32)
    elif name == "alpha.png":
        Image.fromarray(np.stack([BYTES, np.full_like(BYTES, 255)], axis=-1)).save(path)
    elif name == "lab.tif":
        pytest.importorskip("PIL.ImageCms")
        try:
            Image.fromarray(BYTES).convert("RGB").convert("LAB").save(path)
        except ValueError:
            pytest.skip("this Pillow does not convert LAB")
    else:
        Image.fromarray(sixteen).save(path)
    same_picture(preprocess(path, 32), expected, steps=3 if name == "lab.tif" else 1.01)


def test_files_that_do_not_say_what_white_is_are_refused(tmp_path):
    """A viewer would have to guess: whole numbers of 32 bits, floats beyond 1."""
    Image.fromarray(BYTES.astype(np.int32)).save(tmp_path / "whole.tif")
    with pytest.raises(ValueError, match="whole.tif cannot be read as an image: .*int32 from 0 to 255 do not say"):
        preprocess(tmp_path / "whole.tif")
    Image.fromarray((RAMP * 4095).astype(np.float32)).save(tmp_path / "floats.tif")
    with pytest.raises(ValueError, match="floats.tif cannot be read .*float32 from 0 to 4095: expected floats from 0"):
        preprocess(tmp_path / "floats.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "gif"])
def test_what_is_transparent_shows_white(tmp_path, mode):
    """As in a viewer. The colour stored beneath, here black, is not to be seen; half transparent is half of each."""
    black = (0, 0, 0)
    if mode in ("RGBA", "LA", "PA"):
        image = Image.new("RGBA", (8, 8), (*black, 0)).convert(mode)
    else:
        image, name = Image.new("P" if mode == "gif" else mode, (8, 8), black if mode == "RGB" else 0), "clear.png"
        if image.mode == "P":
            image.putpalette([*black, 255, 0, 0])
        name = "clear.gif" if mode == "gif" else "clear.png"
        image.save(tmp_path / name, transparency=black if mode == "RGB" else 0)
        image = tmp_path / name
    same_picture(preprocess(image, 32), preprocess(Image.new("RGB", (8, 8), "white"), 32))
    half = Image.new("RGBA", (8, 8), (*black, 127))
    same_picture(preprocess(half, 32), preprocess(Image.new("L", (8, 8), 128), 32))


def test_of_an_animation_the_first_picture_is_shown(tmp_path):
    frames = [Image.new("L", (16, 16), value) for value in (200, 20)]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].convert("RGB").save(tmp_path / name, save_all=True, append_images=[frames[1].convert("RGB")])
        assert Image.open(tmp_path / name).n_frames == 2
        same_picture(preprocess(tmp_path / name, 32), preprocess(frames[0], 32), steps=3)  # webp loses some


def test_exif_rotation(tmp_path):
    """A camera held upright stores a lying picture and a tag. The left half is white once it is turned."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[20:] = 255  # below: to the left after a turn by 90 degrees clockwise
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "turned.tif", exif=exif)
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for name in ("turned.png", "turned.tif", "turned.jpg"):
        out = preprocess(tmp_path / name, 32)[0, 0]
        assert out[:, :14].min() > 1.8 and out[:, 18:].max() < -1.8, name
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)  # and a scanner of 16 bits
    deep.save(tmp_path / "deep.png", exif=exif)
    out = preprocess(tmp_path / "deep.png", 32)[0, 0]
    assert out[:, :14].min() > 1.8 and out[:, 18:].max() < -1.8


def test_a_damaged_tag_turns_nothing(tmp_path):
    """Viewers show the picture; so does this."""
    Image.fromarray(BYTES).save(tmp_path / "a.png", exif=b"Exif\0\0no tags at all")
    same_picture(preprocess(tmp_path / "a.png", 32), preprocess(BYTES, 32))


def test_not_square_sizes():
    assert preprocess(Image.new("RGB", (640, 480)), (96, 224)).shape == (1, 3, 96, 224)


def test_paths_and_refusals(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert preprocess(tmp_path / "a.png", 32).shape == (1, 3, 32, 32)
    truncated = (tmp_path / "a.png").read_bytes()[:-40]
    (tmp_path / "d.png").write_bytes(truncated)
    with pytest.raises(ValueError, match="d.png cannot be read as an image: OSError: .*truncated"):
        preprocess(tmp_path / "d.png")
    with pytest.raises(ValueError, match="OSError: .*truncated"):
        preprocess(Image.open(tmp_path / "d.png"))  # not read yet
    with pytest.raises(FileNotFoundError):
        preprocess(tmp_path / "c.png")
    with pytest.raises(ValueError, match="cannot be read as an image: .*(directory|denied)"):
        preprocess(tmp_path)
    with pytest.raises(ValueError, match="expected a path, a PIL image or an array, found list$"):
        preprocess([1, 2])
    with pytest.raises(ValueError, match=r"found Tensor: normalise\(\) is for tensors"):
        preprocess(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="0 x 5 pixels is empty"):
        preprocess(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    "start, looks",
    [
        (b"", "the file is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it looks like HEIC: save it as JPEG or PNG"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "it looks like SVG, a drawing"),
        (b"<!DOCTYPE html><title>404</title>", "it looks like a page of the web"),
        (b"%PDF-1.7\n", "it looks like PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of git LFS"),
        (bytes(range(64)), "it is of no kind that Pillow knows"),
    ],
)
def test_a_file_that_is_no_image_is_called_what_it_looks_like(tmp_path, start, looks):
    (tmp_path / "a.jpg").write_bytes(start)
    with pytest.raises(ValueError, match=f"a.jpg cannot be read as an image: UnidentifiedImageError: {looks}"):
        preprocess(tmp_path / "a.jpg")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb.png cannot be read as an image: DecompressionBombError: .*10000 pixels"):
        preprocess(tmp_path / "bomb.png")


@pytest.mark.parametrize("module, package", [("PIL", "pillow"), ("numpy", "numpy")])
def test_a_missing_package_is_named_as_pip_knows_it(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}$"):
        preprocess("a.png")


def test_normalise_takes_bytes_and_floats_of_any_batch():
    images = torch.randint(256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    out = normalise(images)
    assert out.dtype == torch.float32 and out.shape == images.shape
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        torch.testing.assert_close(out[:, :, channel], (images[:, :, channel] / 255 - mean) / std)
    torch.testing.assert_close(normalise(images / 255), out)
    assert normalise(images[0, 0].double() / 255).dtype == torch.float64
    torch.testing.assert_close(normalise(images[0, 0], torch.tensor([0.5] * 3), (0.25,) * 3), images[0, 0] / 63.75 - 2)
    with pytest.raises(ValueError, match="images have 4 channels, the mean 3"):
        normalise(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match="expected images of bytes .* found torch.int64"):
        normalise.__wrapped__(torch.zeros(3, 8, 8, dtype=torch.int64))  # before the check of types that the tests add


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
