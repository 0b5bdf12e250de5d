"""Student to bundle, and bundle to answers."""
