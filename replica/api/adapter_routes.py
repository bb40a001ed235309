"""POST /v1/load_lora_adapter and its like: changes of the catalog, answered in vLLM's words."""

import asyncio
from collections.abc import Callable, Set
from contextlib import AbstractAsyncContextManager
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from cluster.errors import AdapterRefused, BadRequest, ShuttingDown
from replica.api import asgi
from replica.api.access import FORM, JSON, Access, Caller
from replica.api.bodies import Bodies
from replica.api.interfaces import Acknowledgement, Adapters, NewAdapter
from replica.api.openai_protocol import shown, validated
from replica.api.upload_form import read_form

# The fair share is a running sum of tokens / weight; larger weights would round tokens away.
_WEIGHT_MAX = 1e6
# One change of the catalog: it occupies Redis for some ten milliseconds.
_AT_ONCE_MAX = 1024


_Weight = Annotated[float, Field(ge=1 / _WEIGHT_MAX, le=_WEIGHT_MAX)]
_File = Annotated[str, Field(json_schema_extra={"format": "binary"})]


class AdapterEntry(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    pinned: bool = False
    weight: _Weight = 1.0


class LoadAdapterRequest(AdapterEntry):
    load_inplace: bool = False


class UploadAdapterRequest(BaseModel):
    """A form, whose values are text. files: parts with these file names."""

    lora_name: Annotated[str, Field(min_length=1)]
    files: Annotated[list[_File], Field(json_schema_extra={"minItems": 2, "maxItems": 2})]
    load_inplace: bool = False
    pinned: bool = False
    weight: _Weight = 1.0


class LoadAdaptersRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    adapters: Annotated[list[AdapterEntry], Field(min_length=1, max_length=_AT_ONCE_MAX)]
    load_inplace: bool = False


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    lora_name: Annotated[str, Field(min_length=1)]


class AdapterRoutes:
    """base_names: the base model's, which no adapter may have.
    until_cut: around what waits for others than the engine. closing: True refuses changes.
    access: who may change what.
    """

    def __init__(
        self,
        adapters: Adapters,
        base_names: Set[str],
        bodies: Bodies,
        until_cut: Callable[[], AbstractAsyncContextManager[None]],
        closing: Callable[[], bool],
        access: Access,
    ) -> None:
        self._adapters = adapters
        self._base_names = base_names
        self._bodies = bodies
        self._until_cut = until_cut
        self._closing = closing
        self._access = access

    async def load(self, http: Request) -> Response:
        caller: Caller = http.scope["caller"]
        if self._access.check_change(caller, http.headers, (JSON, FORM), path=True) == FORM:
            return await self._upload(http)
        request, _ = await self._bodies.read(LoadAdapterRequest, http)
        self._check_name(request.lora_name)
        async with self._until_cut():
            done = await self._adapters.add(
                request.lora_name,
                request.lora_path,
                load_inplace=request.load_inplace,
                pinned=request.pinned,
                weight=request.weight,
                trusted=caller.operator,
            )
        return _added(done)

    async def _upload(self, http: Request) -> Response:
        """The files come with the request. What breaks off or is refused leaves none of them."""
        self._check_open()
        upload = self._adapters.upload()
        try:
            async with self._until_cut():
                fields = await read_form(http, upload, UploadAdapterRequest.model_fields)
                form = validated(UploadAdapterRequest, fields)
                self._check_name(form.lora_name)
                done = await self._adapters.add(
                    form.lora_name,
                    await asyncio.to_thread(upload.keep),
                    load_inplace=form.load_inplace,
                    pinned=form.pinned,
                    weight=form.weight,
                    trusted=True,
                )
        except BadRequest as error:
            upload.refused = True  # after other errors the catalog may have it
            if isinstance(error, AdapterRefused):
                error.field, error.message = "files", error.message.removeprefix("lora_path: ")
            raise
        finally:
            await asyncio.to_thread(upload.close)
        return _added(done)

    async def load_all(self, http: Request) -> Response:
        """Many in one change of the catalog: all or none."""
        caller: Caller = http.scope["caller"]
        self._access.check_change(caller, http.headers, path=True)
        request, _ = await self._bodies.read(LoadAdaptersRequest, http)
        for entry in request.adapters:
            self._check_name(entry.lora_name)
        adapters = [
            NewAdapter(
                each.lora_name, each.lora_path, each.pinned, each.weight, trusted=caller.operator
            )
            for each in request.adapters
        ]
        async with self._until_cut():
            done = await self._adapters.add_all(adapters, load_inplace=request.load_inplace)
        return _acknowledge_all(done)

    async def unload(self, http: Request) -> Response:
        self._access.check_change(http.scope["caller"], http.headers, path=False)
        request, _ = await self._bodies.read(UnloadAdapterRequest, http)
        self._check_name(request.lora_name)
        async with self._until_cut():
            done = await self._adapters.remove(request.lora_name)
        return _acknowledge(f"Success: LoRA adapter '{done.name}' removed successfully.", done)

    def _check_name(self, name: str) -> None:
        if name in self._base_names:
            raise BadRequest(f"lora_name: {shown(name)} is the base model", field="lora_name")
        self._check_open()

    def _check_open(self) -> None:
        if self._closing():
            raise ShuttingDown("this replica is shutting down", retry_after_s=1.0)


def _added(done: Acknowledgement) -> Response:
    return _acknowledge(f"Success: LoRA adapter '{done.name}' added successfully.", done)


def _acknowledge(message: str, done: Acknowledgement) -> Response:
    """vLLM's text, and what of the adapter is not used. Replicas that have not followed are named
    in it, with the reason if it is known, and in headers.
    """
    message = " ".join((message, *done.remarks))
    headers = {
        "x-lorafleet-digest": done.digest,
        "x-lorafleet-sequence": str(done.sequence),
    }
    if done.applied:
        headers["x-lorafleet-applied"] = ", ".join(done.applied)
    if done.failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in sorted(done.failed.items()))
        message += f" Could not be read by: {reasons}."
        headers["x-lorafleet-failed"] = ", ".join(sorted(done.failed))
    if done.pending:
        names = ", ".join(done.pending)
        message += f" Not yet acknowledged by: {names}."
        headers["x-lorafleet-pending"] = names
    return PlainTextResponse(message, headers=headers)


def _acknowledge_all(done: list[Acknowledgement]) -> Response:
    last = done[-1]
    body = {
        "object": "list",
        "sequence": last.sequence,
        "pending": list(last.pending),
        "data": [
            {
                "id": each.name,
                "digest": each.digest,
                "applied": list(each.applied),
                "failed": dict(each.failed),
                "remarks": list(each.remarks),
            }
            for each in done
        ],
    }
    return asgi.JsonResponse(body)
