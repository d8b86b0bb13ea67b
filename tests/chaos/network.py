"""A network of its own for each agent: a namespace, a cable to the host, and iptables to break it.

Nothing of the host's own network is touched but one address per cable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_TOOLS = ("ip", "iptables", "nsenter", "mount", "umount")


def missing() -> str:
    """Returns what this host lacks for faults of network and disk, in words; empty: nothing."""
    if os.geteuid() != 0:
        return "root is needed for network namespaces"
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    name = f"lessor-probe-{os.getpid()}"
    with tempfile.TemporaryDirectory() as mountpoint:
        try:
            run("ip", "netns", "add", name)
            try:
                run("ip", "netns", "exec", name, "iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random",
                    "--probability", "0.1", "-j", "DROP")  # fmt: skip
            finally:
                run("ip", "netns", "del", name)
            run("mount", "-t", "tmpfs", "-o", "size=64k", "lessor-probe", mountpoint)
            run("umount", mountpoint)
        except NetworkFault as error:
            return str(error)
    return ""


class NetworkFault(Exception):
    """A command that sets up or breaks a network failed; the message is what it said."""


def run(*command: str) -> None:
    """Runs a command.

    Raises:
        NetworkFault: It failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkFault(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Cable:
    """A namespace and its cable to the host. Each call breaks or mends one thing; nothing waits."""

    def __init__(self, number: int) -> None:
        """Describes cable ``number`` (0 … 62) of this process; :meth:`lay` makes it."""
        mark = os.getpid() % 50000
        self.namespace = f"lessor-chaos-{mark}-{number}"
        self._outside, self._inside = f"lc{mark}o{number}", f"lc{mark}i{number}"
        # 10.128/9, so that few hosts have a use of their own for it; two cables never meet.
        net = f"10.{128 + mark // 256 % 128}.{mark % 256}"
        self.host = f"{net}.{4 * number + 1}"
        """The host, seen from the namespace."""
        self._guest = f"{net}.{4 * number + 2}"

    @property
    def enter(self) -> list[str]:
        """What a command begins with that is to run inside."""
        return ["nsenter", f"--net=/var/run/netns/{self.namespace}"]

    def lay(self) -> None:
        """Makes it."""
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", self._outside, "type", "veth", "peer", "name", self._inside, "netns", self.namespace)
        run("ip", "address", "add", f"{self.host}/30", "dev", self._outside)
        run("ip", "link", "set", self._outside, "up")
        self._inside_run("ip", "address", "add", f"{self._guest}/30", "dev", self._inside)
        self._inside_run("ip", "link", "set", self._inside, "up")
        self._inside_run("ip", "link", "set", "lo", "up")

    def remove(self) -> None:
        """Removes it; nothing happens if it is not there."""
        subprocess.run(["ip", "link", "del", self._outside], capture_output=True, check=False)
        if Path("/var/run/netns", self.namespace).exists():
            run("ip", "netns", "del", self.namespace)

    def drop(self, *chains: str, share: float = 1.0) -> None:
        """Drops that share of the packets that come in (``INPUT``) or go out (``OUTPUT``)."""
        for chain in chains:
            chance = [] if share >= 1 else ["-m", "statistic", "--mode", "random", "--probability", f"{share:.3f}"]
            self._inside_run("iptables", "-A", chain, *chance, "-j", "DROP")

    def unplug(self) -> None:
        """Takes the link down."""
        run("ip", "link", "set", self._outside, "down")

    def mend(self) -> None:
        """Drops nothing any more; the link is up."""
        self._inside_run("iptables", "-F")
        run("ip", "link", "set", self._outside, "up")

    def _inside_run(self, *command: str) -> None:
        run(*self.enter, *command)


class SmallDisk:
    """A file system of a few megabytes, to be filled up."""

    def __init__(self, path: Path, size_mib: int = 48) -> None:
        self.path = path
        self._size_mib = size_mib
        self._ballast = path / "ballast"

    def mount(self) -> None:
        """Mounts it; the directory is made."""
        self.path.mkdir(parents=True)
        run("mount", "-t", "tmpfs", "-o", f"size={self._size_mib}m,mode=0755", "lessor-chaos", str(self.path))

    def fill(self) -> None:
        """Leaves not a byte."""
        with self._ballast.open("ab", buffering=0) as file:
            for block in (b"\0" * (1 << 20), b"\0" * 4096):
                try:
                    while True:
                        file.write(block)
                except OSError:
                    continue

    def clear(self) -> None:
        """Gives the room back."""
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Unmounts it, even while something in it is open."""
        subprocess.run(["umount", "-l", str(self.path)], capture_output=True, check=False)
