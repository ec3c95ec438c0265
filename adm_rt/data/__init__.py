"""Data sets that need no download, each a function to (images uint8 [N, H, W, 3], labels [N])."""

from adm_rt.data.glyphs import GLYPH_CLASSES, glyphs

__all__ = ["GLYPH_CLASSES", "glyphs"]
