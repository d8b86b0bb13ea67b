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
        await self.store_shapes([shape])
        return self._shape_ids[shape]

    async def store_shapes(self, shapes: Iterable[Shape]) -> None:
        """Stores those that are new, in two statements however many there are."""
        missing = {shape.digest(): shape for shape in shapes if shape not in self._shape_ids}
        if not missing:
            return
        # In order, so that two who store the same ones wait for each other instead of both for both.
        digests = sorted(missing)
        await self._database.query(
            "INSERT INTO shape (digest, spec) SELECT s.digest, CAST(s.spec AS jsonb) "
            "FROM unnest($1::bytea[], $2::text[]) AS s (digest, spec) ON CONFLICT DO NOTHING",
            digests,
            [json.dumps(missing[digest].to_json()) for digest in digests],
        )
        for row in await self._database.query("SELECT id, digest FROM shape WHERE digest = ANY($1::bytea[])", digests):
            shape = missing[row["digest"]]
            self._shape_ids[shape] = row["id"]
            self._shapes[row["id"]] = shape

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
