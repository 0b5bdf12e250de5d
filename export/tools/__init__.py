"""Commands on a bundle: predict, bench, and other programs' forms of it."""
