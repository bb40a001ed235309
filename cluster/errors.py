"""The exceptions of the project; each knows its HTTP status, its code and whether to try again.

FleetError
├── BadRequest                400  a field is wrong; `field` names it
│   ├── ContextLengthExceeded 400  prompt + max_tokens over the context length
│   └── AdapterRefused        400  an adapter that can never be served here
├── Unauthorized              401  no API key or a wrong one
├── ModelNotFound             404  no base model and no adapter of that name
├── QueueFull                 429  the engine's bound on waiting requests (Retry-After)
├── EngineFailed              500  the engine died under the request
├── AdapterFailed             503  known, but its load failed; it is tried again later
├── CatalogUnavailable        503  Redis cannot be reached, so nothing was changed
├── ShuttingDown              503  no new requests, and none that outlasts the drain time
└── StartupError                   nothing is served: the configuration or the model is at fault
    ├── ConfigError
    └── ModelUnsupported
"""


class FleetError(Exception):
    """An error that a client may be told about in these words.

    field: the request field at fault, when there is one.
    retry_after_s: how long to wait before the same request may do better.
    """

    status: int = 500
    code: str = "internal_error"
    type: str = "server_error"

    def __init__(
        self, message: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.field, self.retry_after_s))


def _rebuild(
    kind: type[FleetError], message: str, field: str | None, retry_after_s: float | None
) -> FleetError:
    """Pickling loses keyword arguments; errors cross the link to the engine's process."""
    return kind(message, field=field, retry_after_s=retry_after_s)


class BadRequest(FleetError):
    status = 400
    code = "invalid_value"
    type = "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class AdapterRefused(BadRequest):
    code = "adapter_refused"


class Unauthorized(FleetError):
    status = 401
    code = "invalid_api_key"
    type = "invalid_request_error"


class ModelNotFound(FleetError):
    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class QueueFull(FleetError):
    status = 429
    code = "queue_full"
    type = "rate_limit_error"


class EngineFailed(FleetError):
    code = "engine_failed"


class AdapterFailed(FleetError):
    status = 503
    code = "adapter_failed"


class CatalogUnavailable(FleetError):
    status = 503
    code = "catalog_unavailable"


class ShuttingDown(FleetError):
    status = 503
    code = "shutting_down"


class StartupError(FleetError):
    code = "startup_error"


class ConfigError(StartupError):
    code = "config_error"


class ModelUnsupported(StartupError):
    code = "model_unsupported"
