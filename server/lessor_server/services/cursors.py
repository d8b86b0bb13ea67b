"""Watch cursors: a position among the events of one database, as an opaque string."""

from __future__ import annotations

import base64
import binascii
import struct

from lessor_server.domain.errors import CursorExpired, CursorFault, InvalidField
from lessor_server.store.event_queries import DatabaseIdentity, Position

_VERSION = 1
# Version, system identifier, database oid, xid, id.
_CURSOR = struct.Struct(">BQIQQ")


def encode_cursor(identity: DatabaseIdentity, position: Position) -> str:
    """Returns the cursor of a position."""
    packed = _CURSOR.pack(_VERSION, identity.system & _MASK, identity.oid, position.xid, position.id)
    return base64.urlsafe_b64encode(packed).decode("ascii").rstrip("=")


def decode_cursor(identity: DatabaseIdentity, cursor: str) -> Position:
    """Returns the position of a cursor.

    Raises:
        InvalidField: It is none.
        CursorExpired: It is of another database than ``identity``.
    """
    try:
        packed = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        version, system, oid, xid, number = _CURSOR.unpack(packed)
        if version != _VERSION or xid > _SIGNED_MAX or number > _SIGNED_MAX:
            raise ValueError(f"version {version}")
    except (binascii.Error, ValueError, struct.error):
        raise InvalidField([("cursor", f"{cursor!r} is not a cursor: pass one as it came from WatchJobs")]) from None
    if (system, oid) != (identity.system & _MASK, identity.oid):
        raise CursorExpired(cursor, CursorFault.FOREIGN)
    return Position(xid, number)


# pg_control_system() shows the identifier as a signed number.
_MASK = (1 << 64) - 1
_SIGNED_MAX = (1 << 63) - 1
