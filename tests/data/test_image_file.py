"""One image: every mode and format to RGB, and one kind of error for what is no image."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from data_files import encoded, noise_image
from PIL import Image

from adm_rt.data import open_dataset
from adm_rt.data.image_file import read_image
from adm_rt.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
PLAIN = noise_image(20, 14)


def read(data, **options):
    return np.asarray(read_image(io.BytesIO(data), **options))


def test_formats_and_colour_modes():
    rgb = np.asarray(PLAIN)
    assert np.array_equal(read(encoded(PLAIN, "png")), rgb)
    assert np.array_equal(read(encoded(PLAIN, "bmp")), rgb)
    assert np.array_equal(read(encoded(PLAIN, "tiff")), rgb)
    assert np.array_equal(read(encoded(PLAIN, "webp", lossless=True)), rgb)
    grey = PLAIN.convert("L")
    assert np.array_equal(read(encoded(grey)), np.repeat(np.asarray(grey)[..., None], 3, 2))
    assert set(np.unique(read(encoded(grey.convert("1"))))) == {0, 255}
    palette = PLAIN.quantize(16)
    assert np.array_equal(read(encoded(palette)), np.asarray(palette.convert("RGB")))
    alpha = PLAIN.copy()
    alpha.putalpha(77)
    assert np.array_equal(read(encoded(alpha)), rgb)  # dropped, as published
    cmyk = encoded(PLAIN.convert("CMYK"), "tiff")
    assert np.abs(read(cmyk).astype(int) - rgb).max() <= 1
    assert read(encoded(PLAIN.convert("CMYK"), "jpeg")).shape == (14, 20, 3)
    frames = [PLAIN.quantize(64), noise_image(20, 14, 1).quantize(64)]
    film = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read(film), np.asarray(frames[0].convert("RGB")))  # the first frame


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 20 * 14).astype(np.uint16).reshape(14, 20)
    found = read(encoded(Image.fromarray(values), kind))
    assert found.dtype == np.uint8 and (found[..., 0] == found[..., 2]).all()
    assert np.array_equal(found[..., 0], np.round(values / 257))
    for mode, words in (("F", "floats"), ("I", "32-bit integers")):
        with pytest.raises(DataError, match=words):
            read(encoded(PLAIN.convert("L").convert(mode), "tiff"))


def test_exif_rotation_is_ignored_as_published_unless_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    photo = encoded(PLAIN, "png", exif=exif)
    assert np.array_equal(read(photo), np.asarray(PLAIN))
    assert np.array_equal(read(photo, exif_rotation=True), np.rot90(np.asarray(PLAIN), -1))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_a_cut_off_image_is_never_taken(kind):
    data = encoded(noise_image(64, 48), kind)
    assert read(data).shape == (48, 64, 3)
    for part in (0, 0.01, 0.1, 0.5, 0.9):
        with pytest.raises(DataError):
            read(data[: int(part * len(data))])


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_damaged_bytes_give_an_image_or_the_error(kind):
    data = encoded(noise_image(24, 18), kind)
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 3):
            damaged[place] = rng.integers(256)
        try:
            read(bytes(damaged))
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 0


def test_what_is_no_image():
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\0" * 5000, b"PK\x03\x04" * 99):
        with pytest.raises(DataError, match="not an image|damaged"):
            read(data)


def test_images_of_too_many_pixels_are_refused(monkeypatch, tmp_path):
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("1", (400, 300))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(DataError, match=r"bomb.png.*120000 pixels.*MAX_IMAGE_PIXELS"):
        open_dataset(tmp_path, 8).get(0)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's VmHWM")
def test_a_large_photo_is_held_once(tmp_path):
    (tmp_path / "large.png").write_bytes(encoded(Image.new("RGB", (7000, 5000), (9, 8, 7))))
    code = (
        "import sys; from adm_rt.data import open_dataset; data = open_dataset(sys.argv[1], 16)\n"
        "from PIL import Image; Image.new('RGB', (9, 9)).resize((3, 3), Image.BOX)\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status')"
        " if l.startswith('VmHWM'))\n"
        "before = peak(); image, _ = data.get(0); assert (image == (9, 8, 7)).all()\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # Pillow keeps 4 bytes a pixel: 137 MiB, a first halving of 34 and the rows between its passes.
    assert int(done.stdout) / 1024 < 260


def test_the_disks_errors_are_not_the_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_image(tmp_path / "gone.png")
