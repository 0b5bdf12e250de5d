"""model.backoff: pauses of 1, 2, 4 ... 60 seconds between the attempts at one thing, and none before another's first."""

from serving.model.backoff import Backoff


def test_pauses_double_up_to_a_minute() -> None:
    now = [100.0]
    backoff = Backoff(clock=lambda: now[0])
    assert backoff.is_due(b"a")
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        assert backoff.fail(ValueError("away"), final=False)[0] == pause
        now[0] += pause - 0.1
        assert not backoff.is_due(b"a")
        now[0] += 0.1
        assert backoff.is_due(b"a")


def test_another_thing_is_tried_at_once_and_starts_anew() -> None:
    backoff = Backoff(clock=lambda: 0.0)
    for _ in range(3):
        backoff.is_due(b"a")
        backoff.fail(ValueError("away"), final=False)
    assert not backoff.is_due(b"a")
    assert backoff.is_due(b"b")
    assert backoff.fail(ValueError("away"), final=False) == (1.0, True)


def test_a_final_failure_is_never_due_again_until_a_reset() -> None:
    now = [0.0]
    backoff = Backoff(clock=lambda: now[0])
    backoff.is_due(b"a")
    assert backoff.fail(ValueError("other classes"), final=True) == (None, True)
    now[0] = 1e12
    assert not backoff.is_due(b"a")
    backoff.reset()
    assert backoff.is_due(b"a")


def test_the_same_error_is_new_only_once() -> None:
    backoff = Backoff(clock=lambda: 0.0)
    backoff.is_due(b"a")
    errors = [ValueError("away"), ValueError("away"), ValueError("damaged"), ValueError("away")]
    assert [backoff.fail(error, final=False)[1] for error in errors] == [True, False, True, True]
