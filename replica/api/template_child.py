"""Renders chat templates that adapters bring, as the child of `template_process.py`.

    python -P template_child.py MEMORY_BYTES ALARM_S

It runs as a file, and loads little: transformers without torch. stdin is a socket for both ways.
A frame is a length, 4 bytes, and that much. An answer begins with the first 8 bytes of its request.
"""

import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

from jinja2 import TemplateSyntaxError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

RENDERED, REFUSED, SYNTAX = b"r", b"e", b"s"
_ID_BYTES = 8
_MESSAGE_MAX = 1000


class _Tokenizer:
    """What `apply_chat_template` needs of the base model's tokenizer."""

    chat_template = None
    get_chat_template = PreTrainedTokenizerBase.get_chat_template

    def __init__(self, special_tokens: dict[str, str]) -> None:
        self.special_tokens_map = special_tokens


def _rendered(request: bytes) -> bytes:
    try:
        given: dict[str, Any] = json.loads(request)
        tokenizer = _Tokenizer(given["special_tokens"])
        text = PreTrainedTokenizerBase.apply_chat_template(
            tokenizer,
            given["messages"],
            chat_template=given["template"],
            tokenize=False,
            **given["options"],
        )
        return RENDERED + str(text).encode()  # refuses half a character: it has no tokens
    except MemoryError:
        os._exit(1)  # so that the next template finds none of this one's memory
    except TemplateSyntaxError as error:
        return SYNTAX + _encoded(f"line {error.lineno}: {error.message}"[:_MESSAGE_MAX])
    except Exception as error:  # templates raise whatever they like
        return REFUSED + _encoded(str(error)[:_MESSAGE_MAX])


def _encoded(reason: str) -> bytes:
    return reason.encode("utf-8", "backslashreplace")


def _main(memory_bytes: int, alarm_s: int) -> None:
    requests, answers = sys.stdin.buffer, open(0, "wb", closefd=False)  # noqa: SIM115
    with open("/proc/self/status", "rb", buffering=0) as status:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _send(answers, b"ready")
        while length := requests.read(4):
            request = requests.read(int.from_bytes(length))
            _limit_memory(status, memory_bytes)
            # Ends the process if nobody is left to kill it.
            signal.alarm(alarm_s)
            answer = _rendered(request[_ID_BYTES:])
            signal.alarm(0)
            _send(answers, request[:_ID_BYTES] + answer)


def _limit_memory(status: BinaryIO, memory_bytes: int) -> None:
    """Beyond what the process has now: it keeps compiled templates."""
    status.seek(0)
    (line,) = (line for line in status.read().splitlines() if line.startswith(b"VmData:"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(line.split()[1]) * 1024 + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if most < 0 else min(limit, most), most))


def _send(answers: BinaryIO, content: bytes) -> None:
    answers.write(len(content).to_bytes(4) + content)
    answers.flush()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
