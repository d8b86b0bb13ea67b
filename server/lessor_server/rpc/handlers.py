"""Wrapping the handlers of RPCs, whatever their shape.

grpc has four kinds of RPC, and two ways to answer with a stream: an async
generator, or a coroutine that writes to the context. What goes around a call is
written once, as an :class:`Around`, and put around each kind here.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from grpc import aio

Context = aio.ServicerContext[Any, Any]
Call = Callable[[], Awaitable[Any]]
Stream = Callable[[], AsyncGenerator[Any, None]]


@dataclass(frozen=True, slots=True)
class Rpc:
    """Which RPC is called."""

    method: str
    """Like ``/lessor.v1.JobService/GetJob``."""
    request_streaming: bool
    response_streaming: bool


class Around:
    """What is put around a call; as it stands, nothing. Raise to refuse the call."""

    checks_requests: ClassVar[bool] = False
    """Whether :meth:`request` is to be called: for agents' streams each look costs."""

    async def request(self, message: Any, rpc: Rpc) -> None:
        """Looks at the request, or at each message of a stream of requests."""

    async def answer(self, call: Call, context: Context, rpc: Rpc) -> Any:
        """Runs a call that returns its answer, or writes its stream of answers itself."""
        return await call()

    async def stream(self, call: Stream, context: Context, rpc: Rpc) -> AsyncGenerator[Any, None]:
        """Runs a call that yields its answers."""
        async with aclosing(call()) as answers:
            async for answer in answers:
                yield answer


class Wrapping(aio.ServerInterceptor):  # type: ignore[type-arg]
    """An interceptor that puts an :class:`Around` around every RPC."""

    def __init__(self, around: Around) -> None:
        self._around = around

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Returns the wrapped handler; None, as grpc has it, for a method that does not exist."""
        handler: Any = await continuation(handler_call_details)
        return None if handler is None else self._wrapped(handler, handler_call_details.method)  # type: ignore[return-value]

    def _wrapped(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        behaviour = next(found for found in behaviours if found is not None)
        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        rpc = Rpc(method, handler.request_streaming, handler.response_streaming)
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            self._behaviour(behaviour, rpc),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _behaviour(self, behaviour: Any, rpc: Rpc) -> Callable[[Any, Context], Any]:
        around = self._around

        async def look(request: Any) -> Any:
            """Returns the request, looked at; a stream of them is looked at as it is read."""
            if not around.checks_requests:
                return request
            if rpc.request_streaming:
                return self._looked_at(request, rpc)
            await around.request(request, rpc)
            return request

        if inspect.isasyncgenfunction(behaviour):

            async def yielding(request: Any, context: Context) -> AsyncGenerator[Any, None]:
                async def call() -> AsyncGenerator[Any, None]:
                    async with aclosing(behaviour(await look(request), context)) as answers:
                        async for answer in answers:
                            yield answer

                async with aclosing(around.stream(call, context, rpc)) as answers:
                    async for answer in answers:
                        yield answer

            return yielding

        async def returning(request: Any, context: Context) -> Any:
            async def call() -> Any:
                return await behaviour(await look(request), context)

            return await around.answer(call, context, rpc)

        return returning

    async def _looked_at(self, requests: AsyncIterator[Any], rpc: Rpc) -> AsyncGenerator[Any, None]:
        async for message in requests:
            await self._around.request(message, rpc)
            yield message
