"""How deliveries lie: wrapping folders, masks among images, groups."""

import pytest

from pipeline.ingest import dump_layout


@pytest.mark.parametrize(
    ("names", "masks"),
    [
        (["images/a.png", "masks/a.png"], ["masks/a.png"]),
        (["may/images/a.png", "may/SegmentationClass/a.png"], ["may/SegmentationClass/a.png"]),
        (["a.jpg", "a_mask.png", "a.target.png", "b_mask.png"], ["a_mask.png", "a.target.png"]),
        (["labels/a.png", "labels/b.png"], []),  # everything lies there: that is its folder's name
        (["cam_l.png", "cam_r.png"], []),
        (["x/A.jpg", "x/a_MASK.png"], ["x/a_MASK.png"]),
        (["a.jpg", "a_mask.jpg", "a_label.jpg", "a_l.jpg", "a_label.png"], ["a_mask.jpg", "a_label.png"]),
    ],
)
def test_masks_are_told_from_images(names: list[str], masks: list[str]) -> None:
    assert list(dump_layout.masks_among(names)) == masks


@pytest.mark.parametrize(
    ("names", "inside"),
    [
        (["images/cam0/1.png", "images/2.png"], ["cam0/1.png", "2.png"]),
        (["may/images/cam0/1.png", "may/images/cam1/2.png"], ["cam0/1.png", "cam1/2.png"]),
        (["a/b/images/1.png"], ["1.png"]),
        (["may/cam0/1.png", "may/cam1/2.png"], ["may/cam0/1.png", "may/cam1/2.png"]),  # may could be a place
        (["a/images/1.png", "b/images/1.png"], ["a/images/1.png", "b/images/1.png"]),
        (["1.png"], ["1.png"]),
        ([], []),
    ],
)
def test_folders_around_images_are_wrapping(names: list[str], inside: list[str]) -> None:
    assert list(dump_layout.without_wrapping(names).values()) == inside
