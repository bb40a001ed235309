"""The project's exceptions. Each has an HTTP status, a code and, if it helps, a retry delay.

FleetError
├── BadRequest                400  a field is wrong; `field` names it
│   ├── ContextLengthExceeded 400  prompt + max_tokens exceeds the context length
│   └── AdapterRefused        400  this fleet can never serve the adapter
│       └── AdapterMissing    400  nothing is where the adapter should be
├── Unauthorized              401  the API key is missing or wrong
├── Forbidden                 403  the caller has no right to it
├── ModelNotFound             404  neither the base model nor an adapter has that name
├── QueueFull                 429  too many requests wait (Retry-After)
├── Poisoned                  400  engines died under this request, one after another
├── RetriesSpent              503  engines died under too many requests lately (Retry-After)
├── EngineFailed              502  the engine died while the request ran; nothing was sent
│   └── EngineGone            502  no engine could run the request, or it was stopped
├── LogitsNotFinite           500  the forward pass overflowed, so there is no token to choose
├── DeadlineExceeded          504  the client's deadline passed first
├── AdapterFailed             503  the adapter is known but its load failed; it is retried later
│   └── StoreFull             507  this node's disk has no room for the adapter's files
├── CatalogUnavailable        503  Redis cannot be reached; nothing was changed
├── ShuttingDown              503  the replica stops: it takes no request and cuts off late ones
└── StartupError                   nothing is served: the configuration or the model is wrong
    ├── ConfigError
    └── ModelUnsupported
"""


class FleetError(Exception):
    """An error whose message clients may see.

    field: the request field at fault, if there is one.
    retry_after_s: seconds after which the same request may succeed.
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
    """Unpickles an error: errors cross processes, and pickling loses keyword arguments."""
    return kind(message, field=field, retry_after_s=retry_after_s)


class BadRequest(FleetError):
    status = 400
    code = "invalid_value"
    type = "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class AdapterRefused(BadRequest):
    code = "adapter_refused"


class AdapterMissing(AdapterRefused):
    pass


class Unauthorized(FleetError):
    status = 401
    code = "invalid_api_key"
    type = "invalid_request_error"


class Forbidden(FleetError):
    status = 403
    code = "forbidden"
    type = "invalid_request_error"


class ModelNotFound(FleetError):
    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class QueueFull(FleetError):
    status = 429
    code = "queue_full"
    type = "rate_limit_error"


class Poisoned(FleetError):
    status = 400
    code = "poisoned"
    type = "invalid_request_error"


class RetriesSpent(FleetError):
    status = 503
    code = "retries_spent"


class EngineFailed(FleetError):
    """death: names the end of one engine, for all requests that it ran. It does not cross
    processes.
    """

    status = 502
    code = "engine_failed"
    death: str = ""


class EngineGone(EngineFailed):
    pass


class LogitsNotFinite(FleetError):
    code = "logits_not_finite"


class DeadlineExceeded(FleetError):
    status = 504
    code = "deadline_exceeded"


class AdapterFailed(FleetError):
    status = 503
    code = "adapter_failed"


class StoreFull(AdapterFailed):
    status = 507
    code = "store_full"


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
