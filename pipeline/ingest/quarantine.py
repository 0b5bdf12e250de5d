"""What was not taken into the data, and why: quarantine.json of each dump, and of all of them together."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.storage import atomic


class QuarantineEntry(BaseModel):
    """One file. `kept`: only its mask is refused, the image stays in the manifest as an unlabelled one."""

    model_config = ConfigDict(frozen=True)
    dump: str
    name: str
    code: str
    reason: str
    kept: bool = False

    @property
    def key(self) -> str:
        return f"{self.dump}/{self.name}"

    @property
    def is_duplicate(self) -> bool:
        """Whether it is an image that another one equals or nearly equals."""
        return "duplicate" in self.code


def read_quarantine(path: Path) -> list[QuarantineEntry]:
    """Raises ValueError: the file is not what `write_quarantine` writes."""
    return [QuarantineEntry.model_validate(item) for item in atomic.read_json(path)]


def write_quarantine(path: Path, entries: Iterable[QuarantineEntry]) -> None:
    atomic.write_json(path, [entry.model_dump() for entry in entries])
