"""The configurations of `marginalia bench` as processes that take turns."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter

from export.tools.bench_protocol import Answer, BundleTask, Failed, Greeting, Ready, Turn
from export.tools.bench_rows import Case, Measured
from pipeline import console as progress

HOME = str(Path(__file__).parents[2])  # where the children find this package
TURN = 0.3  # seconds that a turn of fast calls is filled to, so that a p99 has more than one call a round behind it
MOST_CALLS = 50

Expected = TypeVar("Expected")


class Child:
    """A started configuration. One that died is measured no more; why stands in `measured.hello`."""

    def __init__(self, case: Case, process: "subprocess.Popen[str]", stderr: IO[bytes]) -> None:
        self._process = process
        self._stderr = stderr
        self.measured = Measured(case, self._read(Greeting))

    def turn(self, work: Literal["run", "stream"], calls: int) -> None:
        """Time so many calls and keep the seconds."""
        if isinstance(self.measured.hello, Failed):
            return
        self._send(Turn(work=work, calls=calls))
        answer = self._read(Answer)
        if isinstance(answer, Failed):
            self.measured.hello = answer
        else:
            {"run": self.measured.run, "stream": self.measured.stream}[work].append(answer.seconds)

    def calls_in_a_turn(self) -> int:
        once = self.measured.hello.once if isinstance(self.measured.hello, Ready) else TURN
        return max(1, min(MOST_CALLS, int(TURN / max(once, 1e-6))))

    def _send(self, message: BaseModel) -> None:
        assert self._process.stdin is not None
        try:
            print(message.model_dump_json(), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return  # it died: what is read next says so

    def _read(self, expected: TypeAdapter[Expected | Failed]) -> Expected | Failed:
        """The next answer; of a child that died its last words."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return expected.validate_json(line)
        self._stderr.seek(0)
        words = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return Failed(failed=f"ended with code {self._process.wait()}: {words[-1] if words else 'no word'}")


@contextmanager
def started(case: Case) -> Iterator[Child]:
    """The case's process, which ends with the block."""
    search_path = [HOME, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            # -P: not what lies in the folder here
            [sys.executable, "-P", "-m", case.module, case.task.model_dump_json()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(search_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
        )
        try:
            yield Child(case, process, stderr)
        finally:
            process.kill()
            process.communicate()


def measure(group: Sequence[Case], rounds: int, bar: progress.Bar) -> list[Measured]:
    """Raw seconds of cases that take turns."""
    with ExitStack() as stack:
        # One after the other, or they would slow each other's start and first peak.
        children = [stack.enter_context(started(case)) for case in group]
        for _ in range(rounds):
            for child in children:
                child.turn("run", child.calls_in_a_turn())
                task = child.measured.case.task
                if isinstance(task, BundleTask) and task.batch == 1:
                    child.turn("stream", 1)
                bar.advance()
        return [child.measured for child in children]
