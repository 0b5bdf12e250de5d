"""Label Studio: its JSON export of tasks, read and written."""

from pipeline.formats.labelstudio.reader import image_name as image_name
from pipeline.formats.labelstudio.reader import load as load
from pipeline.formats.labelstudio.reader import read as read
from pipeline.formats.labelstudio.writer import config_xml as config_xml
from pipeline.formats.labelstudio.writer import write as write
