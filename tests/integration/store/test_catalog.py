"""Shapes: stored once, whoever meets them first."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from lessor_server.store.catalog import Catalog
from tests.support.rows import SHAPE
from tests.support.store import Store

SHAPES = [replace(SHAPE, memory_bytes=number) for number in range(1, 301)]


async def test_shapes_met_at_once_by_many_get_one_number_each(store: Store) -> None:
    catalogs = [Catalog(store.database) for _ in range(6)]
    # Each begins elsewhere: two that locked the same rows in different order would wait for each other.
    await asyncio.gather(
        *(catalog.store_shapes(SHAPES[50 * index :] + SHAPES[: 50 * index]) for index, catalog in enumerate(catalogs))
    )
    numbers = [[await catalog.shape_id(shape) for shape in SHAPES] for catalog in catalogs]
    assert all(found == numbers[0] for found in numbers)
    assert len(set(numbers[0])) == len(SHAPES)
    assert await Catalog(store.database).shapes(numbers[0]) == dict(zip(numbers[0], SHAPES, strict=True))


async def test_shapes_that_are_known_cost_no_statement(store: Store) -> None:
    catalog = Catalog(store.database)
    await catalog.store_shapes(SHAPES[:10])
    await store.database.close()
    await catalog.store_shapes(SHAPES[:10])
    assert await catalog.shape_id(SHAPES[3]) > 0
