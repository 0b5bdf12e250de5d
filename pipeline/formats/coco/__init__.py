"""COCO: instances, stuff and panoptic labels, read and written."""

from pipeline.formats.coco.reader import read as read
from pipeline.formats.coco.writer import write as write
