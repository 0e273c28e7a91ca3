"""HTTP connections with limits for clients that send nothing, or take nothing of their answers. uvicorn has no such limits."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .metrics import Metrics
from .protocol import ApiError, server_ending

HEADER_SECONDS = 10.0  # within which the headers of a request must arrive
IDLE_SECONDS = 30  # after which a connection is closed if no other request comes: longer than most clients keep one
TAKING_SECONDS = 20.0  # within which a client must take something of what is sent to it
LINGER_SECONDS = 1.0  # for which a refused client may go on sending
MAX_LINGERING = 50  # connections above the limit that may do so


class Connection(H11Protocol):
    """A connection of uvicorn's that is closed when its client is too slow, or refused when there are too many."""

    def __init__(self, *args: Any, metrics: Metrics, max_connections: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.metrics, self.max_connections = metrics, max_connections
        self.refused = False
        self.headers_timer: asyncio.TimerHandle | None = None
        self.taking_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            message = f"{self.max_connections} connections are open, and that is the limit; connect again later"
            self._refuse(ApiError(503, message, code="too_many_connections"))
        else:
            self._limit_headers()

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)
        if not self.refused:
            self._limit_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.headers_timer, self.taking_timer, self.timeout_keep_alive_task):
            if timer:
                timer.cancel()

    def _limit_headers(self) -> None:
        """Start the timer for a request's headers, or stop it when they have arrived.

        The time runs from the start of the connection, and for later requests from the first byte of the headers.
        """
        awaited = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if awaited and self.headers_timer is None:
            self.headers_timer = self.loop.call_later(HEADER_SECONDS, self._end_without_headers)
        elif not awaited and self.headers_timer is not None:
            self.headers_timer.cancel()
            self.headers_timer = None

    def _end_without_headers(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(ApiError(408, f"the headers did not arrive within {HEADER_SECONDS:g} seconds"))
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit_taking()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._limit_taking()

    def _limit_taking(self, before: int | None = None) -> None:
        """End the connection if its client has taken nothing since `before` bytes were left for it; look again later.

        Only then can this be told: while writing is paused, or after a complete response, when uvicorn adds no bytes to those
        left. At other times there is no limit.
        """
        if self.taking_timer:
            self.taking_timer.cancel()
        if not (self.flow.write_paused or self.cycle.response_complete):
            return
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        elif left:
            self.taking_timer = self.loop.call_later(TAKING_SECONDS, self._limit_taking, left)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the format of all other errors."""
        self._refuse(ApiError(400, msg))

    def shutdown(self) -> None:
        """End the connection when the server ends, but let a request that has arrived be answered."""
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.SEND_RESPONSE:
            self._refuse(server_ending())
        if self.refused:
            self.transport.close()
        else:
            super().shutdown()

    def _refuse(self, error: ApiError) -> None:
        """Send an error without the application, and close the connection."""
        if self.refused or self.transport.is_closing():
            return
        self.refused = True
        if self.headers_timer:
            self.headers_timer.cancel()
        if self.cycle:
            self.cycle.disconnected = True  # for the application
            self.cycle.message_event.set()
        self.metrics.requests["other", error.status] += 1
        body = json.dumps(error.body()).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        head = h11.Response(status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase.encode())
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if len(self.connections) > self.max_connections + MAX_LINGERING:
            self.transport.close()
        else:  # to close while the client sends would reset the connection, and most clients would not see the error
            self.transport.write_eof()
            self.headers_timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)
