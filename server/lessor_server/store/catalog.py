"""Queues by name and shapes by digest, kept in memory: both are few and never change their number."""

from __future__ import annotations

import json
from collections.abc import Iterable

from lessor_server.domain.errors import QueueNotFound
from lessor_server.domain.shape import Shape
from lessor_server.store.database import Database


class Catalog:
    """Numbers of queues and shapes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queues: dict[str, int] = {}
        self._shape_ids: dict[Shape, int] = {}
        self._shapes: dict[int, Shape] = {}

    async def queue_id(self, name: str) -> int:
        """Returns the number of a queue.

        Raises:
            QueueNotFound: There is none of that name.
        """
        if name not in self._queues:
            rows = await self._database.query("SELECT id FROM queue WHERE name = $1", name)
            if not rows:
                raise QueueNotFound(name)
            self._queues[name] = rows[0]["id"]
        return self._queues[name]

    async def shape_id(self, shape: Shape) -> int:
        """Returns the number of a shape, which is stored if it is new."""
        if shape not in self._shape_ids:
            digest = shape.digest()
            await self._database.query(
                "INSERT INTO shape (digest, spec) VALUES ($1, CAST($2 AS jsonb)) ON CONFLICT DO NOTHING",
                digest,
                json.dumps(shape.to_json()),
            )
            (row,) = await self._database.query("SELECT id FROM shape WHERE digest = $1", digest)
            self._shape_ids[shape] = row["id"]
            self._shapes[row["id"]] = shape
        return self._shape_ids[shape]

    async def shapes(self, ids: Iterable[int]) -> dict[int, Shape]:
        """Returns shape number → shape."""
        wanted = set(ids)
        missing = [number for number in wanted if number not in self._shapes]
        if missing:
            for row in await self._database.query("SELECT id, spec FROM shape WHERE id = ANY($1)", missing):
                shape = Shape.from_json(row["spec"])
                self._shapes[row["id"]] = shape
                self._shape_ids[shape] = row["id"]
        return {number: self._shapes[number] for number in wanted}
