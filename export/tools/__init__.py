"""Commands on a bundle: predict, bench, and other programs' formats of it."""
