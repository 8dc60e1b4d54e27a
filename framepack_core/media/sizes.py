"""Chooses a video's size: the published models were trained for fourteen shapes of about 640 x 640 pixels."""

from collections.abc import Sequence

from framepack_core.errors import RequestError
from framepack_core.request import GenerationSettings

Size = tuple[int, int]  # height, width

MAX_PIXELS = 100_000_000  # of a picture: 0.4 GB decoded, 1.2 GB while a WebP file is decoded
MAX_SCALED_PIXELS = 1 << 27  # a long and narrow picture would be scaled to gigabytes before it is cropped
BUCKET_RESOLUTION = 640
BUCKETS: tuple[Size, ...] = (
    (416, 960),
    (448, 864),
    (480, 832),
    (512, 768),
    (544, 704),
    (576, 672),
    (608, 640),
    (640, 608),
    (672, 576),
    (704, 544),
    (768, 512),
    (832, 480),
    (864, 448),
    (960, 416),
)


def scale_buckets(resolution: int) -> tuple[Size, ...]:
    """Scale the sizes to another resolution, in multiples of 16.

    >>> scale_buckets(640) == BUCKETS
    True
    """
    factor = resolution / BUCKET_RESOLUTION
    return tuple(
        (_multiple_of_16(height * factor), _multiple_of_16(width * factor)) for height, width in BUCKETS
    )


def _multiple_of_16(length: float) -> int:
    return max(32, round(length / 16) * 16)


def nearest_bucket(height: int, width: int, buckets: Sequence[Size] = BUCKETS) -> Size:
    """Choose the size nearest in shape; of two equally near ones the later, as in the reference.

    >>> nearest_bucket(512, 512), nearest_bucket(1080, 1920)
    ((640, 608), (480, 832))
    """

    def distance(size: Size) -> int:
        return abs(height * size[1] - width * size[0])

    return min(reversed(buckets), key=distance)


def output_size(settings: GenerationSettings, picture_size: Size, buckets: Sequence[Size] = BUCKETS) -> Size:
    """Give the height and width of the video: those of the settings, or the bucket nearest to the picture."""
    if settings.height is not None and settings.width is not None:
        return settings.height, settings.width
    if settings.resolution is not None:
        buckets = scale_buckets(settings.resolution)
    return nearest_bucket(*picture_size, buckets)


def covering_size(picture: Size, size: Size) -> Size:
    """Give the height and width to which to scale a picture so that it covers a size; rounds half to even.

    Raises:
        RequestError: it is so long and narrow that the crop would keep almost nothing.

    >>> covering_size((100, 300), (64, 64))
    (64, 192)
    """
    scale = max(size[1] / picture[1], size[0] / picture[0])
    height, width = round(picture[0] * scale), round(picture[1] * scale)
    if width * height > MAX_SCALED_PIXELS:
        raise RequestError(
            f"a picture of {picture[1]}x{picture[0]} is too far from the shape of a "
            f"{size[1]}x{size[0]} video: crop it and drop it again"
        )
    return height, width
