"""What the split gives a training: its images by use, and what it says of itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.storage.manifest import Row


@dataclass(frozen=True)
class SplitData:
    """Rows of the split manifest by use, and what the split says about them."""

    labelled: Sequence[Row]
    unlabelled: Sequence[Row]
    val: Sequence[Row]
    classes: list[dict[str, Any]]
    ignore: int
    split_hash: str
    data_hash: str
    label_hash: str | None
    judged: frozenset[str]

    @classmethod
    def read(cls, rows: Sequence[Row], summary: dict[str, Any]) -> "SplitData":
        def use(name: str) -> list[Row]:
            return [row for row in rows if row.split == name]

        return cls(
            use("labelled"), use("unlabelled"), use("val"),
            summary["classes"], summary["ignore"], summary["split_hash"], summary["data_hash"],
            summary.get("label_hash"), frozenset(row.id for row in rows if row.split in ("val", "test")),
        )  # fmt: skip

    def with_hidden_labels(self) -> "SplitData":
        """The unlabelled images that have a mask all the same are labelled; raises ValueError where none has one."""
        hidden = [row for row in self.unlabelled if row.mask_shard is not None]
        if not hidden:
            raise ValueError(
                "method ceiling trains on the hidden labels of unlabelled images, and none has a mask; list some of the "
                "labelled images under data.lists.unlabelled, or choose another method"
            )
        bare = [row for row in self.unlabelled if row.mask_shard is None]
        return replace(self, labelled=[*self.labelled, *hidden], unlabelled=bare)

    @property
    def has_hidden_labels(self) -> bool:
        """Whether an unlabelled image has a mask all the same; it is never trained on."""
        return any(row.mask_shard is not None for row in self.unlabelled)

    def pool(self) -> list[Row]:
        """What is fed as unlabelled: the labelled images too, so that a pool of zero unlabelled images is still a pool.

        Their masks measure the pseudo-labels only where no unlabelled image has a hidden one: the network has learnt them.
        """
        if not self.has_hidden_labels:
            return [*self.unlabelled, *self.labelled]
        bare = [replace(row, mask_shard=None, mask_offset=None, mask_length=None) for row in self.labelled]
        return [*self.unlabelled, *bare]
