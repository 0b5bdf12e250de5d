"""Who wins when two images are the same, or look it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest import deduplicate
from pipeline.storage import manifest

NO_LISTS: dict[str, list[str] | None] = dict.fromkeys(("labelled", "unlabelled", "val", "test"))
PLAIN = manifest.Row(
    "", "", "folder", "base", "g", 4, 4, "s", 0, 1, mask_shard=None, mask_offset=None, mask_length=None, phash=""
)


def row(name: str, pixels: str, phash: int, *, dump: str = "base", mask: bool = False) -> manifest.Row:
    out = replace(PLAIN, name=name, id=pixels, phash=f"{phash:016x}", dump=dump)
    return replace(out, mask_shard="m", mask_offset=0, mask_length=1) if mask else out


def outcome(
    archives: list[list[manifest.Row]], lists: dict = NO_LISTS, bits: int = 3, cap: int = 1
) -> tuple[list[str], dict]:
    kept, dropped = deduplicate.deduplicate(archives, lists, bits, cap)
    return [f"{r.dump}/{r.name}" for r in kept], {entry.key: entry.code for entry in dropped}


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


@pytest.mark.parametrize("cap", [1, 2, 3, 9])
def test_so_many_of_a_cluster_stay_whichever_dumps_they_come_in(cap: int) -> None:
    """Eight frames of a still camera, a bit or two apart, over three archives, beside one image of another place."""
    frames = [row(f"f{n}", f"f{n}", FAR[0] ^ (n % 4), dump=("base", "d", "e")[n // 3]) for n in range(8)]
    archives = [[r for r in frames if r.dump == dump] for dump in ("base", "d", "e")]
    archives[1].append(row("other", "other", FAR[1], dump="d"))
    kept, dropped = outcome(archives, cap=cap)
    assert [name for name in kept if name != "d/other"] == [f"{r.dump}/{r.name}" for r in frames[:cap]]
    assert "d/other" in kept
    assert set(dropped.values()) <= {"near-duplicate"}


def test_a_chain_of_neighbours_is_capped_by_who_is_near_not_by_its_ends() -> None:
    """0, 3, 6, 9 and 12 bits away from the first: each is near the one before it alone."""
    chain = [row(f"{n}", f"{n}", FAR[0] ^ ((1 << (3 * n)) - 1)) for n in range(5)]
    assert outcome([chain])[0] == ["base/0", "base/2", "base/4"]
    assert outcome([chain], cap=2)[0] == ["base/0", "base/1", "base/2", "base/3", "base/4"]


def test_no_cap_lets_a_near_copy_of_what_may_be_scored_into_training() -> None:
    base = [row("m", "m", FAR[0], mask=True), row("t", "t", FAR[1]), row("u", "u", FAR[2])]
    later = [row(n, f"{n}2", FAR[i] ^ 1, dump="d") for i, n in enumerate("mtu")]
    kept, dropped = outcome([base, later], NO_LISTS | {"test": ["t"]}, cap=9)
    assert kept == ["base/m", "base/t", "base/u", "d/u"]  # a mask, or a list, keeps its look-alikes out
    assert dropped == {"d/m": "near-duplicate", "d/t": "near-duplicate"}


def slow(archives: list[list[manifest.Row]], bits: int, cap: int) -> list[str]:
    """The rules of the module as a double loop."""
    kept: list[manifest.Row] = []
    for rows in archives:
        for r in sorted(rows, key=lambda r: (r.mask_shard is None, r.name)):
            near = [k for k in kept if (int(k.phash, 16) ^ int(r.phash, 16)).bit_count() <= bits]
            most = 1 if r.mask_shard or any(k.mask_shard for k in near) else cap
            if not any(k.id == r.id for k in kept) and len(near) < most:
                kept.append(r)
    return sorted(f"{r.dump}/{r.name}" for r in kept)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_fast_search_keeps_what_a_double_loop_keeps(data: st.DataObject) -> None:
    bits, cap = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3))
    places = st.tuples(st.integers(0, 2), st.integers(0, 1 << 9), st.booleans())
    drawn = data.draw(st.lists(places, min_size=1, max_size=30))
    # Equal pixels have equal hashes: the hash is the id here.
    rows = [row(f"{n:02d}", f"{h}", FAR[0] ^ h, dump=f"d{a}", mask=m) for n, (a, h, m) in enumerate(drawn)]
    archives = [[r for r in rows if r.dump == f"d{a}"] for a in range(3)]
    assert sorted(outcome(archives, bits=bits, cap=cap)[0]) == slow(archives, bits, cap)


def test_hashes_propose_and_the_closer_look_decides() -> None:
    rows = [row("a", "1", FAR[0], mask=True), row("b", "2", FAR[0], mask=True), row("c", "3", FAR[0] ^ 1)]

    def look(same: bool) -> list[str]:
        kept, _ = deduplicate.deduplicate([rows], NO_LISTS, 3, 1, lambda row, others: [same] * len(others))
        return [r.name for r in kept]

    assert look(same=True) == ["a"]
    assert look(same=False) == ["a", "b", "c"]


def test_near_duplicates_can_be_kept() -> None:
    rows = [row("a", "1", FAR[0], mask=True), row("b", "2", FAR[0]), row("c", "2", FAR[0])]
    kept, dropped = deduplicate.deduplicate([rows], NO_LISTS, None)
    assert [r.name for r in kept] == ["a", "b"]
    assert [entry.code for entry in dropped] == ["duplicate"]


def test_lost_labels_are_told_loudly() -> None:
    rows = [row("a", "1", FAR[0], mask=True), row("b", "2", FAR[0], mask=True), row("c", "3", FAR[0])]
    _, dropped = deduplicate.deduplicate([rows], NO_LISTS, 3)
    assert len(dropped) == 2
    (warning,) = deduplicate.lost_labels(dropped, {"base/a", "base/b"})
    assert warning.startswith(
        "1 labelled or listed images are left out as near duplicates, the first: base/b looks like"
    )
    assert deduplicate.lost_labels(dropped, set()) == []
