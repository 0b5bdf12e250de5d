"""Who wins when two images are the same, or look it."""

from dataclasses import replace

from pipeline import index, manifest

NO_LISTS: dict[str, list[str] | None] = dict.fromkeys(("labelled", "unlabelled", "val", "test"))
PLAIN = manifest.Row(
    "", "", "folder", "base", "g", 4, 4, "s", 0, 1, mask_shard=None, mask_offset=None, mask_length=None, phash=""
)


def row(name: str, pixels: str, phash: int, *, dump: str = "base", mask: bool = False) -> manifest.Row:
    out = replace(PLAIN, name=name, id=pixels, phash=f"{phash:016x}", dump=dump)
    return replace(out, mask_shard="m", mask_offset=0, mask_length=1) if mask else out


def outcome(archives: list[list[manifest.Row]], lists: dict = NO_LISTS, bits: int = 3) -> tuple[list[str], dict]:
    kept, dropped = index.deduplicate(archives, lists, bits)
    return [f"{r.dump}/{r.name}" for r in kept], {f"{d['dump']}/{d['name']}": d["code"] for d in dropped}


FAR = [0x0123456789ABCDEF ^ (0x1111111111111111 * n) for n in range(8)]


def test_earlier_archives_win_over_later_ones() -> None:
    first, second = [row("a", "1", FAR[0])], [row("a", "1", FAR[0], dump="d"), row("b", "2", FAR[1], dump="d")]
    assert outcome([first, second]) == (["base/a", "d/b"], {"d/a": "duplicate"})
    assert outcome([[replace(r, dump="base") for r in second], [replace(r, dump="d") for r in first]])[0] == [
        "base/a", "base/b",
    ]  # fmt: skip


def test_a_labelled_image_beats_an_unlabelled_one_of_the_same_archive() -> None:
    rows = [row("a", "1", FAR[0]), row("b", "1", FAR[0], mask=True), row("c", "2", FAR[0] ^ 1)]
    assert outcome([rows]) == (["base/b"], {"base/a": "duplicate", "base/c": "near-duplicate"})


def test_a_test_image_is_never_lost_to_a_training_image() -> None:
    rows = [row(n, n, FAR[0] ^ (1 << i), mask=True) for i, n in enumerate("abcd")]
    lists = NO_LISTS | {"labelled": ["a"], "unlabelled": ["b"], "val": ["c"], "test": ["d"]}
    assert outcome([rows], lists) == (["base/d"], dict.fromkeys(("base/a", "base/b", "base/c"), "near-duplicate"))


def test_a_list_keeps_its_own_look_alikes_but_no_exact_copies() -> None:
    rows = [row("a", "1", FAR[0], mask=True), row("b", "2", FAR[0] ^ 1, mask=True), row("c", "1", FAR[0], mask=True)]
    lists = NO_LISTS | {"test": ["a", "b", "c"]}
    assert outcome([rows], lists) == (["base/a", "base/b"], {"base/c": "duplicate"})
    assert outcome([rows])[0] == ["base/a"]


def test_lists_speak_of_the_base_archive_only() -> None:
    later = [row("a", "9", FAR[0] ^ 2, dump="d")]
    assert outcome([[row("a", "1", FAR[0], mask=True)], later], NO_LISTS | {"test": ["a"]}) == (
        ["base/a"], {"d/a": "near-duplicate"},
    )  # fmt: skip


def test_the_distance_counts_bits_inclusively() -> None:
    def second(flips: int, bits: int) -> bool:
        near = FAR[0] ^ sum(1 << (5 * n) for n in range(flips))
        return len(outcome([[row("a", "1", FAR[0]), row("b", "2", near)]], bits=bits)[0]) == 2

    assert [second(flips, 3) for flips in (0, 3, 4)] == [False, False, True]
    assert [second(flips, 0) for flips in (0, 1)] == [False, True]


def test_order_within_an_archive_does_not_matter() -> None:
    rows = [row(f"{n}", f"{n % 5}", FAR[n % 8] ^ n, mask=n % 3 == 0) for n in range(8)]
    assert outcome([rows]) == outcome([rows[::-1]])


def test_flat_images_stay_and_hash_zero_is_a_hash() -> None:
    rows = [replace(row(n, n, 0), phash="") for n in "ab"] + [row("c", "3", 0), row("d", "4", 1)]
    assert outcome([rows]) == (["base/a", "base/b", "base/c"], {"base/d": "near-duplicate"})
