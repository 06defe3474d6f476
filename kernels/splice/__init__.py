"""splice_rows: image features in the places of image tokens."""

from .op import image_rows, splice_rows

__all__ = ["image_rows", "splice_rows"]
