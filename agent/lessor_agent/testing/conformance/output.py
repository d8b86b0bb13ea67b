"""Output: which bytes arrive, where, and when."""

from __future__ import annotations

from hashlib import sha256

from lessor_agent.runtimes.base import StopCause
from lessor_agent.testing.conformance import workload
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import Stage
from lessor_agent.testing.conformance.subject import Subject

_LINES = 2000
_READ_BYTES = 1 << 20


class OutputChecks(Subject):
    """Standard output, error and input."""

    @holds(Check.OUTPUT_APART)
    async def test_output_apart(self, stage: Stage) -> None:
        execution, exit = await stage.run("lines", str(_LINES))
        assert exit.exit_code == 0
        assert execution.output.stdout.read_bytes() == b"".join(b"out %d\n" % number for number in range(_LINES))
        assert execution.output.stderr.read_bytes() == b"".join(b"err %d\n" % number for number in range(_LINES))

    @holds(Check.OUTPUT_BINARY)
    async def test_output_binary(self, stage: Stage) -> None:
        execution, exit = await stage.run("binary")
        assert exit.exit_code == 0
        assert execution.output.stdout.read_bytes() == workload.BINARY
        assert execution.output.stderr.read_bytes() == workload.BINARY[::-1]

    @holds(Check.OUTPUT_LARGE)
    async def test_output_large(self, stage: Stage) -> None:
        execution, exit = await stage.run("flood", str(self.large_mb))
        assert exit.exit_code == 0
        assert execution.output.stdout.stat().st_size == self.large_mb * 1_000_000
        wanted, found = sha256(), sha256()
        for number in range(self.large_mb):
            wanted.update(workload.block(number))
        with execution.output.stdout.open("rb") as file:
            while data := file.read(_READ_BYTES):
                found.update(data)
        assert found.hexdigest() == wanted.hexdigest()

    @holds(Check.OUTPUT_LIVE)
    async def test_output_live(self, stage: Stage) -> None:
        execution = await stage.stand(stage.place())
        stdout = execution.output.stdout
        await stage.until(lambda: b"line 9\n" in stdout.read_bytes(), "ten lines of output have arrived")
        assert not execution.ended

    @holds(Check.OUTPUT_FILES)
    async def test_output_files(self, stage: Stage) -> None:
        execution = await stage.prepare(stage.request("leave", "0"))
        output = execution.output
        for path in (output.stdout, output.stderr, output.events):
            assert path.read_bytes() == b""
        assert len({output.stdout, output.stderr, output.events}) == 3
        await execution.stop(StopCause.STALE)
        await stage.end(execution)
        for path in (output.stdout, output.stderr, output.events):
            assert path.read_bytes() == b""

    @holds(Check.STDIN_EMPTY)
    async def test_stdin_empty(self, stage: Stage) -> None:
        execution, exit = await stage.run("stdin")
        assert (exit.exit_code, execution.output.stdout.read_bytes()) == (0, b"read 0")
