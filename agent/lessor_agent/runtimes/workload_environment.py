"""What a workload on this host is started with: its environment and the user it runs as."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence

from lessor_agent.keeper.spec import Identity
from lessor_agent.runtimes.base import StartRefused, StartRequest

_MAX_STRING_BYTES = 128 * 1024 - 1
"""Longest single argument or variable that Linux takes (MAX_ARG_STRLEN)."""

_OF_THE_USER = ("HOME", "USER", "LOGNAME", "SHELL", "MAIL")


def host_environment(host: Mapping[str, str], allow: Sequence[str]) -> dict[str, str]:
    """Returns the variables of the host that every workload may see.

    No ``LESSOR_`` variable gets through, whatever the list says: the agent's own
    settings and credentials are among them.

    Args:
        host: The agent's environment.
        allow: Names of variables, or prefixes that end in ``*``.
    """
    return {
        name: value
        for name, value in host.items()
        if not name.startswith("LESSOR_") and any(_matches(name, rule) for rule in allow)
    }


def workload_environment(
    request: StartRequest, lease_directory: str, host: Mapping[str, str], account: pwd.struct_passwd | None
) -> dict[str, str]:
    """Returns the whole environment of a workload.

    In this order, later ones win: those of the host, those of the account it
    runs as, the job's own, Lessor's own.

    Args:
        request: What is started.
        lease_directory: Absolute path of the lease's directory.
        host: What :func:`host_environment` returned.
        account: The account it runs as; None: the agent's own.
    """
    env = dict(host)
    if account is not None:
        for name in _OF_THE_USER:
            env.pop(name, None)
        env |= {"HOME": account.pw_dir, "USER": account.pw_name, "LOGNAME": account.pw_name}
        if account.pw_shell:
            env["SHELL"] = account.pw_shell
    # A forgotten GPU must not be visible: a job without any is told an empty list, not none.
    gpus = ",".join(request.gpu_uuids)
    env |= request.env
    env |= {
        "LESSOR_JOB_ID": request.job_id,
        "LESSOR_ATTEMPT": str(request.attempt),
        "LESSOR_FENCING_TOKEN": str(request.lease_id),
        "LESSOR_EVENTS": f"{lease_directory}/events",
        "LESSOR_CANCEL": f"{lease_directory}/cancel",
        "CUDA_VISIBLE_DEVICES": gpus,
        "NVIDIA_VISIBLE_DEVICES": gpus,
    }
    env.pop("LESSOR_CHECKPOINT", None)
    if request.checkpoint is not None:
        env["LESSOR_CHECKPOINT"] = request.checkpoint
    return env


def _matches(name: str, rule: str) -> bool:
    return name.startswith(rule[:-1]) if rule.endswith("*") else name == rule


def check_strings(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Checks that the kernel can be given these strings.

    Raises:
        StartRefused: It cannot; the message names the culprit, never a variable's value.
    """
    if not argv or not argv[0]:
        raise StartRefused("the job names no program to run")
    for position, argument in enumerate(argv):
        _check_string(f"argument {position}", argument)
    for name, value in env.items():
        if not name or "=" in name:
            raise StartRefused(f"environment variable {name!r}: a name is not empty and has no '='")
        _check_string(f"environment variable {name!r}", f"{name}={value}")


def _check_string(what: str, text: str) -> None:
    if "\0" in text:
        raise StartRefused(f"{what} contains a NUL byte")
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        raise StartRefused(f"{what} contains characters that have no bytes (lone surrogates)") from None
    if size > _MAX_STRING_BYTES:
        raise StartRefused(f"{what} has {size} bytes; Linux takes at most {_MAX_STRING_BYTES}")


def find_account(user: str) -> pwd.struct_passwd | None:
    """Looks up the account a job asks for; None if it is the agent's own. Blocks: it may ask a directory service.

    Raises:
        StartRefused: There is no such account, or this agent may not use it.
    """
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise StartRefused(f"no user {user!r} on this host; create it here or name another") from None
    own = os.geteuid()
    if account.pw_uid == own:
        return None
    if own != 0:
        raise StartRefused(
            f"cannot run as user {user!r}: the agent runs as uid {own}; run the agent as root, or leave the user out"
        )
    return account


def identity_of(account: pwd.struct_passwd) -> Identity:
    """Returns the numbers of an account, its supplementary groups included. Blocks likewise."""
    groups = os.getgrouplist(account.pw_name, account.pw_gid)
    return Identity(account.pw_name, account.pw_uid, account.pw_gid, groups)
