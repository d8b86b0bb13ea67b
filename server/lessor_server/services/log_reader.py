"""Logs: from an offset or from the last lines, followed live, over all attempts to come.

Memory is bounded by a page of chunks, however long the log.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime

from lessor.ids import encode_job_id
from lessor_server.bells import Bell, Bells
from lessor_server.domain.errors import AttemptNotFound, JobNotFound
from lessor_server.store.database import Database
from lessor_server.store.log_queries import (
    AttemptKey,
    read_attempt_keys,
    read_chunks,
    read_chunks_before,
    read_log_standing,
)

POLL_S = 0.25
"""Another replica's log bytes are found by looking, this often."""

_TAIL_CHUNKS = 4
_NEWLINE = b"\n"
_BEYOND = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class LogPiece:
    """Bytes of one attempt's log, of one stream."""

    attempt: int
    offset: int
    """Of the first byte, in the attempt's log."""
    stream: int
    data: bytes
    read_at: datetime


class LogReader:
    """Reads logs of one database; woken by the bells of its replica."""

    def __init__(self, database: Database, bells: Bells, *, poll_s: float = POLL_S) -> None:
        self._database = database
        self._bells = bells
        self._poll_s = poll_s

    async def stream(
        self, number: int, *, attempt: int = 0, offset: int = 0, tail_lines: int = 0, follow: bool = False
    ) -> AsyncGenerator[LogPiece, None]:
        """Yields the log in order, each byte once.

        Without ``follow`` it ends at what is stored. With it, it ends once the
        attempt asked for is over (``attempt`` 0: once the job is) and every stored
        byte was sent; an attempt that does not exist yet is waited for.

        Args:
            number: The job.
            attempt: This one only; 0: the latest, and with ``follow`` those after it.
            offset: Begin at this byte of the first attempt read, >= 0.
            tail_lines: Begin this many lines before the end instead; 0: not used.
            follow: Go on until the end.

        Raises:
            JobNotFound: There is no such job.
            AttemptNotFound: The job has no such attempt, and will have none.
            DatabaseUnavailable: The database does not answer.
        """
        with self._bells.logs.listen(number) as bell:
            key = await self._first(number, attempt, follow, bell)
            if key is None:
                return
            position = await self._tail_offset(key.lease_id, tail_lines) if tail_lines else offset
            while True:
                seen = bell.count
                # Where it stands is read before the bytes: what was stored until then is among them.
                standing = await read_log_standing(self._database, number, key.lease_id)
                while position < standing.end_offset:
                    chunks = await read_chunks(self._database, key.lease_id, position)
                    if not chunks:
                        # Retention took the bytes in between.
                        break
                    for chunk in chunks:
                        yield LogPiece(key.attempt, chunk.start_offset, chunk.stream, chunk.data, chunk.read_at)
                        position = chunk.end_offset
                if not follow:
                    return
                if not standing.live:
                    if attempt or (standing.terminal and standing.following is None):
                        return
                    if standing.following is not None:
                        key, position = standing.following, 0
                        continue
                await bell.wait(seen, self._poll_s)

    async def _first(self, number: int, attempt: int, follow: bool, bell: Bell) -> AttemptKey | None:
        """Returns the attempt to begin with, waited for if it may come; None: there is nothing to read."""
        while True:
            seen = bell.count
            keys = await read_attempt_keys(self._database, number)
            if keys is None:
                raise JobNotFound(encode_job_id(number))
            last = keys[-1].attempt if keys else 0
            if attempt:
                found = next((key for key in keys if key.attempt == attempt), None)
            else:
                found = keys[-1] if keys else None
            if found is not None:
                return found
            over = not follow or 0 < attempt <= last
            if not over:
                standing = await read_log_standing(self._database, number, keys[-1].lease_id if keys else 0)
                if standing.following is not None:
                    continue
                over = standing.terminal
            if over:
                if attempt:
                    raise AttemptNotFound(encode_job_id(number), attempt, last)
                return None
            await bell.wait(seen, self._poll_s)

    async def _tail_offset(self, lease_id: int, lines: int) -> int:
        """Returns where the last ``lines`` lines begin, counted back over both streams as they were read."""
        before, left = _BEYOND, lines
        while True:
            chunks = await read_chunks_before(self._database, lease_id, before, _TAIL_CHUNKS)
            for chunk in chunks:
                end = len(chunk.data)
                if before == _BEYOND and chunk.data.endswith(_NEWLINE):
                    # It ends the last line; no line begins after it.
                    end -= 1
                while (at := chunk.data.rfind(_NEWLINE, 0, end)) >= 0:
                    left -= 1
                    if left == 0:
                        return chunk.start_offset + at + 1
                    end = at
                before = chunk.start_offset
            if len(chunks) < _TAIL_CHUNKS:
                return 0
