"""Removal of the directories of leases that are over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
from pathlib import Path

_FILES = ("stdout", "stderr", "events", "control", "record")
"""What nearly every lease leaves; the record last, because its lock is how others see that somebody is at it."""

_MAX_AT_ONCE = 64


class Removal:
    """Removes directories in a thread, those that come meanwhile together: a thread is dear for one small directory."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def remove(self, path: Path) -> None:
        """Returns once ``path`` and all below is gone.

        Raises:
            OSError: Something cannot be removed.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((path, done))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="removal")
        await done

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_MAX_AT_ONCE], self._waiting[_MAX_AT_ONCE:]
                errors = await asyncio.to_thread(_remove_all, [path for path, _ in batch])
                for (_, done), error in zip(batch, errors, strict=True):
                    if done.done():
                        # Its asker was cancelled.
                        continue
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(error)
        finally:
            self._worker = None


def _remove_all(paths: list[Path]) -> list[Exception | None]:
    return [_failure(path) for path in paths]


def _failure(path: Path) -> Exception | None:
    try:
        remove_tree(path)
    except Exception as error:
        return error
    return None


def remove_tree(path: Path) -> None:
    """Removes a lease's directory, also what the workload made unremovable for its owner. Blocks.

    Raises:
        OSError: Something cannot be removed.
    """
    with contextlib.suppress(OSError):
        _remove_usual(path)
        return
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except PermissionError:
        os.chmod(path, stat.S_IRWXU)
        for parent, names, _ in os.walk(path):
            for name in names:
                if not os.path.islink(directory := os.path.join(parent, name)):
                    os.chmod(directory, stat.S_IRWXU)
        shutil.rmtree(path)


def _remove_usual(path: Path) -> None:
    """Removes what a job leaves that made no file of its own; with anything else there it fails midway."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.rmdir("work", dir_fd=fd)
        for name in _FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(path)
