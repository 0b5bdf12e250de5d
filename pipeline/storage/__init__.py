"""Bytes at rest: atomic files, archives, shards, the manifest, and what DVC keeps."""
