"""Making a database cluster: initdb, a password, a database."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lessor_server.embedded.binaries import Account, Binaries
from lessor_server.embedded.errors import DataDirUnusable, StartFailed

SUPERUSER = "lessor"
DATABASE = "lessor"


def make_cluster(directory: Path, binaries: Binaries, account: Account | None, durable: bool) -> str:
    """Makes the cluster unless it is there. Returns the superuser's password.

    The cluster is made aside and renamed into place: half of one is never taken for a whole.
    """
    pgdata = directory / "pgdata"
    password_file = directory / "password"
    if pgdata.exists():
        made_by = (pgdata / "PG_VERSION").read_text().strip() if (pgdata / "PG_VERSION").exists() else "?"
        if made_by != str(binaries.major):
            raise DataDirUnusable(
                f"data directory {directory} was made by PostgreSQL {made_by}, this is {binaries.major}: "
                "remove it, or choose another directory"
            )
        try:
            return password_file.read_text().strip()
        except FileNotFoundError:
            raise DataDirUnusable(
                f"data directory {directory} lost its file 'password': remove the directory, or choose another"
            ) from None
    password = secrets.token_urlsafe(24)
    _write_private(password_file, password, None)
    fresh = directory / "pgdata.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    handed = directory / "password.initdb"
    try:
        if account is not None:
            os.chown(fresh, account.uid, account.gid)
        _write_private(handed, password, account)
        initdb = [str(binaries.bin_dir / "initdb"), "-D", str(fresh), "-U", SUPERUSER, "-A", "scram-sha-256"]
        initdb += ["--pwfile", str(handed), "--no-locale", "-E", "UTF8", *([] if durable else ["-N"])]
        _run_program(initdb, account, "")
        single = [str(binaries.bin_dir / "postgres"), "--single", "-j", "-D", str(fresh)]
        single += [*([] if durable else ["-c", "fsync=off"]), "postgres"]
        _run_program(single, account, f"CREATE DATABASE {DATABASE};\n\n")
    finally:
        handed.unlink(missing_ok=True)
    fresh.rename(pgdata)
    return password


def _write_private(path: Path, text: str, account: Account | None) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        if account is not None:
            os.fchown(file.fileno(), account.uid, account.gid)


def _run_program(argv: list[str], account: Account | None, text: str) -> None:
    as_account: dict[str, Any] = {}
    if account is not None:
        as_account = {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        done = subprocess.run(
            argv,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment(),
            cwd="/",
            timeout=120,
            **as_account,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise StartFailed(f"cannot run {argv[0]}: {error}") from error
    if done.returncode:
        raise StartFailed(f"{argv[0]} failed: {' | '.join(done.stdout.strip().splitlines()[-3:])}")


def clean_environment() -> dict[str, str]:
    """Nothing of ours changes what PostgreSQL does: no PG*, no locale, English messages."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
