"""What file names say: which image is meant, which split and group a path states, which files are no images at all."""
