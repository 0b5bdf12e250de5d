"""labelme: one JSON file per image."""

from pipeline.formats.labelme.reader import read as read
