import io
import random
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from processes import in_child

from torch_s3 import DecodeError
from torch_s3.data import decode
from torch_s3.data.decode import SUFFIXES, decode_image

URI = "s3://bucket/a picture"
ROWS, COLUMNS = np.mgrid[0:37, 0:53]
PIXELS = np.stack([4 * COLUMNS, 6 * ROWS, 2 * (ROWS + COLUMNS)], axis=-1).astype(np.uint8)
RGB = Image.fromarray(PIXELS)
TURNED = RGB.rotate(180)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8))
DEEP = Image.fromarray((1000 * COLUMNS).astype(np.uint16))  # 16 bits, up to 52,000


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def frames(kind, **options):
    return encoded(RGB.quantize(64), kind, save_all=True, append_images=[TURNED.quantize(64)] * 3, **options)


FILES = {
    "JPEG": encoded(RGB, "JPEG"),
    "JPEG, progressive": encoded(RGB, "JPEG", progressive=True),
    "JPEG, 4:4:4": encoded(RGB, "JPEG", subsampling=0),
    "JPEG, gray": encoded(RGB.convert("L"), "JPEG"),
    "JPEG, CMYK": encoded(RGB.convert("CMYK"), "JPEG"),
    "PNG": encoded(RGB, "PNG"),
    "PNG, noise": encoded(NOISE, "PNG"),
    "PNG, gray": encoded(RGB.convert("L"), "PNG"),
    "PNG, 1 bit": encoded(RGB.convert("1"), "PNG"),
    "PNG, gray and alpha": encoded(RGB.convert("LA"), "PNG"),
    "PNG, RGBA": encoded(Image.fromarray(np.dstack([PIXELS, 4 * COLUMNS.astype(np.uint8)])), "PNG"),
    "PNG, palette": encoded(RGB.quantize(16), "PNG"),
    "PNG, palette with transparency": encoded(RGB.quantize(16), "PNG", transparency=bytes(range(16))),
    "PNG, animated": encoded(RGB, "PNG", save_all=True, append_images=[TURNED]),
    "GIF": encoded(RGB.quantize(64), "GIF"),
    "GIF, transparent": encoded(RGB.quantize(64), "GIF", transparency=3),
    "GIF, animated": frames("GIF"),
    "WEBP": encoded(RGB, "WEBP"),
    "WEBP, lossless": encoded(RGB, "WEBP", lossless=True),
    "WEBP, RGBA": encoded(RGB.convert("RGBA"), "WEBP", lossless=True),
    "WEBP, animated": encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[TURNED]),
    "BMP": encoded(RGB, "BMP"),
    "BMP, 1 bit": encoded(RGB.convert("1"), "BMP"),
    "TIFF": encoded(RGB, "TIFF"),
    "TIFF, LZW": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "TIFF, CMYK": encoded(RGB.convert("CMYK"), "TIFF"),
    "TIFF, many pages": encoded(RGB, "TIFF", save_all=True, append_images=[TURNED]),
    "AVIF": encoded(RGB, "AVIF"),
    "AVIF, animated": encoded(RGB, "AVIF", save_all=True, append_images=[TURNED]),
    "PPM": encoded(RGB, "PPM"),
    "PGM": encoded(RGB.convert("L"), "PPM"),
}
SIXTEEN_BITS = {"PNG, 16 bits": encoded(DEEP, "PNG"), "TIFF, 16 bits": encoded(DEEP, "TIFF")}
EVERY = FILES | SIXTEEN_BITS
BROKEN = {
    "empty": b"",
    "one byte": b"\xff",
    "garbage": b"garbage" * 100,
    "an error page": b"<html><body>502 Bad Gateway</body></html>\n",
    "zeros": bytes(10_000),
    "half a JPEG": FILES["JPEG"][: len(FILES["JPEG"]) // 2],
    "a JPEG without its last byte": FILES["JPEG"][:-1],
    "a JPEG's first bytes": FILES["JPEG"][:20],
    "half a PNG": FILES["PNG"][: len(FILES["PNG"]) // 2],
    "a PNG's signature": FILES["PNG"][:8],
    "half a GIF": FILES["GIF"][: len(FILES["GIF"]) // 2],
    "half a WEBP": FILES["WEBP"][: len(FILES["WEBP"]) // 2],
    "half a BMP": FILES["BMP"][: len(FILES["BMP"]) // 2],
    "half a TIFF": FILES["TIFF"][: len(FILES["TIFF"]) // 2],
}


JPEGS = [kind for kind in FILES if kind.startswith("JPEG")]


@pytest.fixture(params=["simplejpeg", "torchvision"])
def jpeg_decoder(request, monkeypatch):
    """Either of the decoders of JPEG."""
    if request.param == "torchvision":
        monkeypatch.setattr(decode, "simplejpeg", None)


def with_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        opaque = image.convert("RGBA") if image.mode == "P" else image  # or Pillow warns of transparency
        return np.array(opaque.convert("RGB")).transpose(2, 0, 1)


def check(image):
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == 3


def check_outcome(data):
    """Broken data are an image or a DecodeError, whatever the decoder makes of them."""
    try:
        image = decode_image(data, URI)
    except DecodeError as error:
        assert error.uri == URI  # noqa: PT017 - an image is right too
    else:
        check(image)


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_pillows(kind, jpeg_decoder):
    image = decode_image(FILES[kind], URI)

    check(image)
    expected = with_pillow(FILES[kind])
    assert image.shape == expected.shape
    assert np.abs(image.numpy().astype(int) - expected).max() <= 1  # JPEG decoders round differently


@pytest.mark.parametrize("kind", JPEGS)
def test_decoders_of_jpeg_give_the_same_pixels(kind, monkeypatch):
    by_simplejpeg = decode_image(FILES[kind], URI)
    monkeypatch.setattr(decode, "simplejpeg", None)

    assert torch.equal(by_simplejpeg, decode_image(FILES[kind], URI))


@pytest.mark.parametrize("kind", EVERY)
def test_gray_is_one_channel(kind, jpeg_decoder):
    image = decode_image(EVERY[kind], URI, mode="GRAY")

    luma = decode_image(EVERY[kind], URI).numpy().transpose(1, 2, 0)
    expected = np.array(Image.fromarray(luma).convert("L"))[None]
    assert image.dtype == torch.uint8
    assert image.shape == expected.shape
    assert np.abs(image.numpy().astype(int) - expected).max() <= (2 if "JPEG" in kind else 1)  # JPEG has its own gray


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="use 'RGB' or 'GRAY'"):
        decode_image(FILES["JPEG"], URI, mode="CMYK")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_image_is_turned_upright(kind, orientation, jpeg_decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker"
    data = encoded(RGB, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.array(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)

    image = decode_image(data, URI)

    assert image.shape == upright.shape
    assert np.abs(image.numpy().astype(int) - upright).max() <= 1


@pytest.mark.parametrize("order", ["II", "MM"])
def test_orientation_is_found_in_either_byte_order(order, jpeg_decoder):
    shape = ">HHIHH" if order == "MM" else "<HHIHH"
    tiff = order.encode() + struct.pack(shape[0] + "HIH", 42, 8, 1) + struct.pack(shape, 0x0112, 3, 1, 6, 0)
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0" + tiff)

    assert decode_image(data, URI).shape == (3, 53, 37)


@pytest.mark.parametrize(
    "exif", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(30), b"\xff" * 40]
)
def test_nonsense_in_the_exif_costs_no_image(exif, jpeg_decoder):
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0" + exif)

    assert torch.equal(decode_image(data, URI), decode_image(FILES["JPEG"], URI))


def test_heic_is_decoded_where_pillow_heif_is_installed():
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(RGB, "HEIF", quality=100)

    image = decode_image(data, URI)

    check(image)
    assert np.abs(image.numpy().astype(int) - PIXELS.transpose(2, 0, 1)).mean() < 3


def test_heic_without_pillow_heif_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(decode, "formats", lambda: ["PNG"])

    with pytest.raises(DecodeError, match="pillow-heif"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(100), URI)


def _claim(kind, size):
    """A picture's file whose head says that it has ``size`` pixels a side."""
    data = bytearray(FILES[kind])
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", size, size)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", size, size)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", size, size)
    elif kind == "PPM":
        data = bytearray(b"P6 %d %d 255\n" % (size, size)) + bytes(100)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", size, size)
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "size"), [("JPEG", 65_500), ("PNG", 100_000), ("BMP", 100_000), ("PPM", 100_000), ("GIF", 65_500)]
)
def test_claim_of_billions_of_pixels_costs_no_memory(kind, size):
    data = _claim(kind, size)

    def decode_it():
        resource.setrlimit(
            resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (8 << 30),) * 2
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DecodeError, match=URI):
            decode_image(data, URI)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 64 * 1024  # KiB

    assert in_child(decode_it) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF, animated", "WEBP", "AVIF", "TIFF"])
def test_image_of_more_pixels_than_allowed_is_not_decoded(kind):
    check(decode_image(FILES[kind], URI, max_pixels=37 * 53))

    with pytest.raises(DecodeError, match=r"53 x 37 pixels; raise max_pixels=1960") as caught:
        decode_image(FILES[kind], URI, max_pixels=37 * 53 - 1)

    assert caught.value.uri == URI


def test_jpeg_that_ends_in_its_middle_is_damaged_though_it_says_that_it_ends(monkeypatch):
    """libjpeg fills the rest with gray, and only warns."""
    data = encoded(NOISE, "JPEG")
    data = data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 :]

    with pytest.raises(DecodeError, match="premature end"):
        decode_image(data, URI)


def test_bytes_that_do_not_belong_there_cost_no_jpeg(jpeg_decoder):
    """libjpeg warns of them too, but every pixel is there; ImageNet has such files."""
    data = FILES["JPEG"]

    image = decode_image(data[:-2] + bytes(3) + data[-2:], URI)

    assert torch.equal(image, decode_image(data, URI))


@pytest.mark.parametrize("kind", EVERY)
def test_image_may_be_written_to_channel_by_channel(kind):
    image = decode_image(EVERY[kind], URI)
    before = image.clone()

    image[0] = 255 - image[0]

    assert torch.equal(image[0], 255 - before[0])
    assert torch.equal(image[1:], before[1:])


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_sixteen_bits_keep_their_upper_eight(kind):
    """Cut off at 255, as Pillow converts them, a photograph would be white."""
    image = decode_image(SIXTEEN_BITS[kind], URI)

    check(image)
    assert np.array_equal(image.numpy(), np.stack([1000 * COLUMNS >> 8] * 3))


def test_first_frame_of_animation_is_decoded():
    assert np.array_equal(decode_image(FILES["GIF, animated"], URI), decode_image(FILES["GIF"], URI))


def test_animation_keeps_memory_of_one_frame():
    image = decode_image(FILES["GIF, animated"], URI)

    assert image.untyped_storage().nbytes() == image.numel()


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".pgm"])
def test_every_suffix_that_is_listed_can_be_decoded(suffix):
    data = encoded(RGB, Image.registered_extensions()[suffix])

    check(decode_image(data, URI))


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_any_buffer_is_decoded(kind, buffer):
    check(decode_image(buffer(FILES[kind]), URI))


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_image_is_a_decode_error_that_names_it(kind, jpeg_decoder):
    with pytest.raises(DecodeError, match=r"^'s3://bucket/a picture': ") as caught:
        decode_image(BROKEN[kind], URI)

    assert caught.value.uri == URI
    assert f"{len(BROKEN[kind])} bytes" in str(caught.value)


def test_decode_error_is_one_short_line():
    with pytest.raises(DecodeError) as caught:
        decode_image(b"\n" * 100_000, URI)

    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # addresses of Python's objects help nobody


@pytest.mark.parametrize("kind", EVERY)
def test_flipped_bytes_kill_nobody(kind):
    def decode_all():
        original, rng = EVERY[kind], random.Random(kind)
        for _ in range(30):
            data = bytearray(original)  # beyond the head, which may say that the picture has gigabytes
            data[rng.randrange(48, len(data))] ^= rng.randrange(1, 256)
            check_outcome(data)

    assert in_child(decode_all) == 0


@pytest.mark.parametrize("kind", EVERY)
def test_lost_ends_kill_nobody(kind):
    def decode_all():
        data, rng = EVERY[kind], random.Random(kind)
        for _ in range(20):
            check_outcome(data[: rng.randrange(len(data))])

    assert in_child(decode_all) == 0
