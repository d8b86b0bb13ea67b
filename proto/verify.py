"""Verifies the contract: ``buf lint``, ``buf format``, and ``buf breaking`` against main.

The contract is compared with ``main``; where this commit *is* main, with its
parent. ``BUF_AGAINST=REF`` names another base. A clone that holds no such
commit (a shallow one) skips the comparison and says so.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from generate import PROTO, ROOT, compile_image, sources


def git(*args: str) -> str | None:
    """Returns what git prints, or None where it fails (no repository, no such ref)."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def base() -> tuple[str, str] | None:
    """Returns (name, commit) of what the contract must stay compatible with; None: there is nothing to compare with.

    Raises:
        SystemExit: ``BUF_AGAINST`` names no commit.
    """
    asked = os.environ.get("BUF_AGAINST")
    if asked:
        commit = git("rev-parse", "--verify", "--quiet", f"{asked}^{{commit}}")
        if commit is None:
            sys.exit(f"BUF_AGAINST={asked} names no commit of this clone")
        return asked, commit
    head = git("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if head is None:
        return None
    # A changed working tree is compared with main even on main; a clean one would be compared with itself.
    changed = bool(git("status", "--porcelain", "--", "proto/*.proto"))
    for name in ("main", "origin/main", "HEAD^"):
        commit = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        if commit is not None and (changed or commit != head):
            return name, commit
    return None


def extract_proto(commit: str, folder: Path) -> Path:
    """Writes ``proto/`` as it was at ``commit`` below ``folder`` and returns where it is."""
    archive = subprocess.run(["git", "archive", commit, "proto"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "proto"


def buf(*args: str) -> bool:
    """Runs buf, which prints what it finds; returns whether it found nothing."""
    return subprocess.run(["buf", *args], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    own = [option for name in sources() for option in ("--path", name)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "image.binpb"
        compile_image(PROTO, image)
        sound = buf("lint", str(image), *own)
        sound &= buf("format", "--diff", "--exit-code")
        print(f"buf lint and format: {'clean' if sound else 'see above; `make fmt` formats'}")
        against = base()
        if against is None:
            print("buf breaking: skipped, this clone has neither main nor a parent to compare with")
        elif git("ls-tree", "--name-only", against[1], "proto") != "proto":
            print(f"buf breaking: skipped, {against[0]} has no proto/")
        else:
            before = folder / "before.binpb"
            old = extract_proto(against[1], folder / "before")
            compile_image(old, before)
            both = sorted({*sources(), *sources(old)})
            limits = [option for name in both for option in ("--path", name)]
            compatible = buf("breaking", str(image), "--against", str(before), *limits)
            print(f"buf breaking: {'compatible with' if compatible else 'breaks'} {against[0]} ({against[1][:12]})")
            sound &= compatible
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
