"""GET /v1/models: the base model and the adapters in OpenAI's shape; and SGLang's descriptions."""

import time
from collections.abc import Mapping, Set
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import ModelNotFound
from cluster.values import Version
from replica.api import asgi
from replica.api.interfaces import Adapters
from replica.api.openai_protocol import shown


class ModelCards:
    """base: the base model's name. base_names: all that it answers to. context: in tokens.
    engine: its sizes, by SGLang's names.

    Where files lie is nobody's business.
    """

    def __init__(
        self,
        adapters: Adapters,
        base: str,
        base_names: Set[str],
        context: int,
        engine: Mapping[str, int],
    ) -> None:
        self._adapters = adapters
        self._base_names = base_names
        self._engine = engine
        self._base = {
            "id": base,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "lorafleet",
            "root": base,
            "parent": None,
            "max_model_len": context,
        }

    async def all(self, http: Request) -> Response:
        cards = [self._base, *map(self._card, self._adapters.versions())]
        return asgi.JsonResponse({"object": "list", "data": cards})

    async def one(self, http: Request) -> Response:
        name = http.path_params["name"]
        if name in self._base_names:
            return asgi.JsonResponse(self._base)
        found = await self._adapters.find(name)
        if found is None:
            raise ModelNotFound(f"the model {shown(name)} does not exist", field="model")
        return asgi.JsonResponse(self._card(found))

    async def model_info(self, http: Request) -> Response:
        return asgi.JsonResponse(
            {
                "model_path": self._base["id"],
                "tokenizer_path": self._base["id"],
                "is_generation": True,
                "preferred_sampling_params": None,
            }
        )

    async def server_info(self, http: Request) -> Response:
        info: dict[str, Any] = {
            "model_path": self._base["id"],
            "served_model_name": self._base["id"],
            "context_length": self._base["max_model_len"],
            "enable_lora": True,
            "version": version("lorafleet"),
            "internal_states": [],
        }
        return asgi.JsonResponse({**info, **self._engine})

    def _card(self, adapter: Version) -> dict[str, Any]:
        return self._base | {"id": adapter.name, "root": adapter.name, "parent": self._base["id"]}
