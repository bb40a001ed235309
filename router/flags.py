"""The flags of more than one command. None: not given, so the configuration's default holds."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(metavar="DIR", help="Hugging Face checkpoint to serve.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="PEFT adapter, served as model NAME. Repeat it for more.",
    ),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of the base model on the API (default: DIR's name)."),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).")]
Port = Annotated[
    int | None, typer.Option(help="Port to listen on; 0 takes a free one (default: 8000).")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda (default: auto).")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16 (default: what the checkpoint says; on a CPU float32, "
        "unless it computes the checkpoint's bfloat16 natively)."
    ),
]
AdapterRoot = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR",
        help="The API may load adapters from below DIR. Repeat it for more (default: nowhere).",
    ),
]
AdapterMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Device memory for adapters, by replica, such as 64MiB or 8GiB (default: chosen at "
        "the start, as are the others, and printed then).",
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Host memory for adapters that left the device, by replica (default: chosen).",
    ),
]
KvMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Device memory for keys and values (default: chosen)."),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Device memory that adapters and keys and values share (default: on a GPU 0.9 of what "
        "is free beside the model and one step; on a CPU each has its own).",
    ),
]
RankMax = Annotated[int | None, typer.Option(help="Largest rank accepted (default: 256).")]
SlotsMax = Annotated[
    int | None, typer.Option(help="Most adapters on the device at once (default: what fits).")
]
BatchRowsMax = Annotated[
    int | None, typer.Option(help="Most requests computed in one step (default: 64).")
]
FairShare = Annotated[
    bool | None,
    typer.Option(
        "--fair-share", help="Adapters get batch space in turn, by their weights (default: no)."
    ),
]
QueueMax = Annotated[
    int | None,
    typer.Option(help="Waiting requests, by replica, beyond which come 429s (default: 1024)."),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads, by replica (default: the cores, shared out).")
]
TensorParallel = Annotated[
    int | None, typer.Option(help="Devices that share the model, by replica (default: 1).")
]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML with the fields of the configuration; flags win."),
]
Url = Annotated[
    str, typer.Option(envvar="LORAFLEET_URL", help="Where the fleet (or a replica) answers.")
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="LORAFLEET_API_KEY", help="Key, when the fleet wants one.")
]
