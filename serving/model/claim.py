"""Who comes first: a load at the moment of the swap, or its caller when the time is up."""

import threading

from serving.model.checks import CandidateRefused


class Claim:
    """What one side only can take. Either the swap happens, or the caller gets an error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> bool:
        """True for the first who asks."""
        return self._lock.acquire(blocking=False)

    def take_in_time(self) -> None:
        """For the load. Raises CandidateRefused if its caller no longer waits."""
        if not self.take():
            raise CandidateRefused("late", "was not ready in time; raise MARGINALIA_LOAD_TIMEOUT_S")
