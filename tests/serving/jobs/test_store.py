"""Jobs on disk: nothing is lost or done twice, whenever the process ends."""

import sqlite3

import pytest

from serving.jobs.store import Job, JobStore, StoreError


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def job(name, submitted, owner="anna", images=1):
    return Job(
        id=name, owner=owner, kind="image", query="{}", view="mask", media_type="image/png", state="waiting",
        submitted=submitted, bytes=10, images=images,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path):
    made = JobStore(tmp_path / "jobs", Clock())
    for name, submitted in (("second", 2.0), ("first", 1.0), ("third", 3.0)):
        made.body(name).write_bytes(b"0123456789")
        made.add(job(name, submitted))
    return made


def reopened(store):
    store.close()
    return JobStore(store.folder, store._clock)


def test_jobs_are_begun_in_the_order_in_which_they_came_and_each_once(store):
    assert store.ahead(store.get("third", "anna")) == 2
    assert [store.claim().id for _ in range(3)] == ["first", "second", "third"]
    assert store.claim() is None
    assert {each.state for each in store.of("anna")} == {"running"}
    assert store.get("first", "berta") is None
    assert store.of("berta") == []


def test_an_answer_is_kept_until_its_time_is_over(store):
    claimed = store.claim()
    part = store.folder / "first.part"
    part.write_bytes(b"answer")
    store.finish(claimed.id, part, "bundle-1")
    done = store.get("first", "anna")
    assert (done.state, done.done, done.bytes, done.bundle) == ("done", 1, 16, "bundle-1")
    assert store.answer("first").read_bytes() == b"answer"
    assert store.kept() == (3, 36)

    store._clock.now += 59
    assert store.expire(60.0) == 0
    store._clock.now += 2
    assert store.expire(60.0) == 1
    assert store.get("first", "anna") is None
    assert not store.answer("first").exists()
    assert not store.body("first").exists()


def test_what_ran_when_the_process_was_killed_waits_again_once_and_then_has_failed(store):
    assert store.claim().attempts == 1
    store.progress("first", 1)
    (store.folder / "first.part").write_bytes(b"half")
    (store.folder / "nobody.body").write_bytes(b"of no row")
    store = reopened(store)
    again = store.get("first", "anna")
    assert (again.state, again.done) == ("waiting", 0)
    assert not (store.folder / "nobody.body").exists()

    assert store.claim().attempts == 2
    store = reopened(store)
    failed = store.get("first", "anna")
    assert (failed.state, failed.status, failed.code) == ("failed", 500, "internal")
    assert "twice" in failed.message
    assert store.claim().id == "second"


def test_an_orderly_end_does_not_count_as_an_attempt(store):
    for _ in range(4):
        claimed = store.claim()
        assert (claimed.id, claimed.attempts) == ("first", 1)
        store.put_back("first")
        store = reopened(store)


def test_a_job_that_is_deleted_while_it_runs_leaves_nothing(store):
    store.claim()
    store.delete("first")
    part = store.folder / "first.part"
    part.write_bytes(b"answer")
    store.finish("first", part, None)
    store.fail("first", 500, "internal", "late")
    store.put_back("first")
    assert store.get("first", "anna") is None
    assert [path.name for path in store.folder.iterdir() if path.name.startswith("first")] == []


def test_one_folder_is_one_servers(store, tmp_path):
    with pytest.raises(StoreError, match="another server keeps its jobs there"):
        JobStore(store.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="jobs cannot be kept there"):
        JobStore(tmp_path / "file" / "jobs")
    store.close()
    (store.folder / "jobs.sqlite").write_bytes(b"no database, but long enough to be looked at" * 100)
    with pytest.raises(StoreError, match="jobs cannot be kept there"):
        JobStore(store.folder)


def test_a_change_that_fails_changes_nothing(store):
    with pytest.raises(sqlite3.Error):
        store.add(job("first", 9.0))
    assert [each.id for each in store.of("anna")] == ["first", "second", "third"]
    assert store.claim().id == "first"
