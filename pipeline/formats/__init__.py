"""One file for each label format, from its files to a `Source`."""
