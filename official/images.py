"""Image files of common formats -> RGB as a person sees it."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"  # Pillow has more, but EPS starts Ghostscript
MAX_PIXELS = 50_000_000  # 150 MB once decoded


def open_image(path: str | Path) -> Image.Image:
    """Read an image as RGB: upright, transparent parts white. FileNotFoundError or ValueError on failure."""
    if not Path(path).is_file():  # also false for a FIFO, which would block
        raise FileNotFoundError(f"{path}: no such image file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are read")
            return to_rgb(ImageOps.exif_transpose(image))  # cameras store the orientation beside the pixels
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: not a readable image ({e})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode. Pillow would clip 16-bit and float grey at 255, and show hidden colours."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        scales = (1, 255, 65535) if image.mode == "F" else (65535,)
        white = next((scale for scale in scales if grey.max() <= scale), scales[-1])
        image = Image.fromarray((grey / white * 255).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
