"""Wrapping the handlers of RPCs, whatever their shape.

grpc has four kinds of RPC, and two ways to answer with a stream: an async
generator, or a coroutine that writes to the context. What goes around a call is
written once, as an :class:`Around`, and put around each kind here.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
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


class Handlers:
    """Takes the handlers of servicers in a server's place, and gives them to it wrapped.

    Each handler is wrapped once, when it is first called. An interceptor would
    wrap it anew at every call. And the server gets them as generic handlers
    only: for *registered* methods grpc.aio waits, at every call, on one task per
    method there is, which costs as much as the rest of a small call.
    """

    def __init__(self, server: aio.Server, arounds: Sequence[Around]) -> None:
        """
        Args:
            server: Is to serve the handlers.
            arounds: The first is the outermost.
        """
        self._server = server
        self._arounds = tuple(arounds)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """Takes the handlers of a service; called by its generated code."""
        self._server.add_generic_rpc_handlers([_Wrapped(handler, self._arounds) for handler in handlers])

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Takes the same handlers again; called by generated code. They are served as generic ones already."""


class _Wrapped(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The handlers of one service, each with what goes around it."""

    def __init__(self, handlers: grpc.GenericRpcHandler[Any, Any], arounds: Sequence[Around]) -> None:
        self._handlers = handlers
        self._arounds = arounds
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the wrapped handler; None for a method that is not of this service."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler: Any = self._handlers.service(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = _wrapped(handler, method, self._arounds)
        return wrapped


def _wrapped(handler: Any, method: str, arounds: Sequence[Around]) -> grpc.RpcMethodHandler[Any, Any]:
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    behaviour = next(found for found in behaviours if found is not None)
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    rpc = Rpc(method, handler.request_streaming, handler.response_streaming)
    for around in reversed(arounds):
        behaviour = _behaviour(behaviour, rpc, around)
    wrapped: grpc.RpcMethodHandler[Any, Any] = make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


def _behaviour(behaviour: Any, rpc: Rpc, around: Around) -> Callable[[Any, Context], Any]:
    if around.checks_requests:
        behaviour = _checking(behaviour, rpc, around)
    if inspect.isasyncgenfunction(behaviour):

        async def yielding(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            async with aclosing(around.stream(partial(behaviour, request, context), context, rpc)) as answers:
                async for answer in answers:
                    yield answer

        return yielding if type(around).stream is not Around.stream else behaviour

    async def returning(request: Any, context: Context) -> Any:
        return await around.answer(partial(behaviour, request, context), context, rpc)

    return returning if type(around).answer is not Around.answer else behaviour


def _checking(behaviour: Any, rpc: Rpc, around: Around) -> Callable[[Any, Context], Any]:
    """Returns ``behaviour`` with its request looked at first; a stream of them is looked at as it is read."""

    async def looked_at(requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        async for message in requests:
            await around.request(message, rpc)
            yield message

    if inspect.isasyncgenfunction(behaviour):

        async def yielding(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            if rpc.request_streaming:
                request = looked_at(request)
            else:
                await around.request(request, rpc)
            async with aclosing(behaviour(request, context)) as answers:
                async for answer in answers:
                    yield answer

        return yielding

    async def returning(request: Any, context: Context) -> Any:
        if rpc.request_streaming:
            request = looked_at(request)
        else:
            await around.request(request, rpc)
        return await behaviour(request, context)

    return returning
