"""How many files this process may have open."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)


def raise_open_files() -> int:
    """Raises the soft limit of open files to the hard one; returns what it was.

    An agent holds several descriptors per job, a server one per connection; the
    usual soft limit is meant for programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning(
                "the limit of open files stays as it is",
                extra={"event": "open_files", "limit": soft, "error": str(error)},
            )
    return soft
