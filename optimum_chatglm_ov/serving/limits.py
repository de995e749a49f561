# SPDX-License-Identifier: Apache-2.0
"""What stands before every request: the key of the interface, and the size of a body and the time that it takes."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from .errors import RequestError, error_response


# What asks for the key where a page is served, which asks for it in its own way.
_INTERFACE = ("/v1/", "/tokenize", "/metrics", "/openapi.json")


class Gate:
    """ASGI middleware that refuses requests without the key, and bodies that are too large or too slow.

    Args:
        api_key: what `Authorization: Bearer` must name, except for /health; `None`: nothing is asked for.
        max_body: bytes.
        body_seconds: how long a body may take to come.
        has_page: what is not of the interface belongs to a page, which asks for the key itself.
    """

    def __init__(self, app: Any, api_key: str | None, max_body: int, body_seconds: float, has_page: bool = False):
        self._app, self._max_body, self._body_seconds, self._has_page = app, max_body, body_seconds, has_page
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._api_key is not None and not self._is_open(scope["path"]) and not self._has_key(headers):
            missing = RequestError("The API key is missing or wrong.", 401, code="invalid_api_key")
            await error_response(missing)(scope, receive, send)
            return
        body: bytes | None = None
        refusal: RequestError | None = None
        try:
            body = await asyncio.wait_for(self._body(headers, receive), self._body_seconds)
        except RequestError as error:
            refusal = error
        except asyncio.TimeoutError:
            message = f"The body has not come within {self._body_seconds:g} s."
            refusal = RequestError(message, 408, code="request_timeout")
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
        if body is None:  # or the client has left
            return
        is_given = False

        async def receive_whole() -> dict[str, Any]:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_whole, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | None:
        """Reads the whole body; `None` if the client has left.

        Raises:
            RequestError: it is too large.
        """
        too_large = RequestError(
            f"The body is larger than {self._max_body} bytes. Send less.", 413, code="request_too_large"
        )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            raise too_large
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                raise too_large
        return bytes(body)

    def _is_open(self, path: str) -> bool:
        return path == "/health" or self._has_page and not path.startswith(_INTERFACE)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(key.strip(), self._api_key) and scheme.lower() == b"bearer"
