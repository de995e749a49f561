# SPDX-License-Identifier: Apache-2.0
"""Errors in OpenAI's form."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..tokenization.vocabulary import whole_characters
from .admission import QueueFullError, QueueTimeoutError
from .engine import EngineError, UnsupportedError


logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: why, and what to do.
        status: of the response.
        parameter: the field that is to blame.
        code: OpenAI's, for programs.
    """

    def __init__(self, message: str, status: int = 400, parameter: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.parameter, self.code = status, parameter, code


def as_request_error(error: BaseException) -> RequestError:
    """Makes of `error` what a client is told; what is no fault of a known kind is logged, and said to be internal."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UnsupportedError):
        return RequestError(str(error), 400, error.parameter, "unsupported_parameter")
    if isinstance(error, QueueFullError):
        return RequestError(str(error), 429, code="queue_full")
    if isinstance(error, QueueTimeoutError):
        return RequestError(str(error), 503, code="queue_timeout")
    if isinstance(error, EngineError):
        return RequestError(str(error), 503, code="engine_error")
    logger.error("A request failed.", exc_info=error)
    return RequestError("An internal error; the server's log has more of it.", 500, code="internal_error")


def error_body(error: RequestError) -> dict[str, Any]:
    """Makes the body of the response, or of the event that ends a stream."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    message = whole_characters(str(error))
    return {"error": {"message": message, "type": kind, "param": error.parameter, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """Makes the response to a request that is refused."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Lets `app` answer with errors in OpenAI's form, whatever happens."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_request_error(error))

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return error_response(RequestError(f"{place or 'body'}: {first['msg']}", 400, place or None))

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(RequestError(str(error.detail), error.status_code))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestError, refuse)
    for kind in (UnsupportedError, QueueFullError, QueueTimeoutError, EngineError, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
