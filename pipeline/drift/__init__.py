"""How far later images, and what is served, are from the training images."""
