"""The bundle on disk: files, manifest, checksums."""
