"""POST /v1/embeddings: each input's last state, of length 1, as vLLM embeds with decoder models."""

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import BadRequest
from replica.api.completion import Call, Piece
from replica.api.openai_protocol import CompletionRequest, Prompt, validated
from replica.api.response_encoder import Answer, Usage

INPUTS_MAX = 2048  # as OpenAI has it


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")
    # Known field → its neutral values.
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "messages": (),
        "normalize": (True,),
        "use_activation": (True,),
        "prompt_embeds": (),
        "stream": (False,),
    }
    stream: ClassVar[bool] = False

    input: Prompt
    model: Annotated[str, Field(min_length=1)] | None = None
    lora_path: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None

    def as_completion(self) -> CompletionRequest:
        """Raises BadRequest."""
        names = ("model", "lora_path", "truncate_prompt_tokens", "add_special_tokens", "priority")
        fields = {name: getattr(self, name) for name in names}
        return validated(CompletionRequest, {**fields, "prompt": self.input, "max_tokens": 0})


class EmbeddingsEncoder:
    """Implements `ResponseEncoder`."""

    def __init__(self, call: Call, request: EmbeddingsRequest) -> None:
        self._call, self._request = call, request

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        raise AssertionError("embeddings are not streamed")

    def end(self, usage: Usage) -> bytes:
        raise AssertionError("embeddings are not streamed")

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": self._embedding(answer)}
            for index, answer in enumerate(answers)
        ]
        tokens = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        body: dict[str, Any] = {"id": self._call.id, "object": "list", "model": self._call.model}
        body |= {"data": data, "usage": tokens}
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    def _embedding(self, answer: Answer) -> str | NDArray[np.float32]:
        assert answer.prompt is not None and answer.prompt.embedding is not None
        state, size = np.frombuffer(answer.prompt.embedding, "<f4"), self._request.dimensions
        if size is not None and size > len(state):
            raise BadRequest(
                f"dimensions: {size} is more than the {len(state)} of this model",
                field="dimensions",
            )
        scaled = (state[:size] / max(float(np.linalg.norm(state[:size])), 1e-12)).astype("<f4")
        if self._request.encoding_format == "base64":
            return base64.b64encode(scaled.tobytes()).decode()
        return scaled
