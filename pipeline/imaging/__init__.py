"""Pixels: images and label maps decoded, encoded, resized, tiled and traced."""
