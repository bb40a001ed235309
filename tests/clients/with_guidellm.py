"""guidellm: its table of a short load, for the base model and an adapter."""

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUESTS, STREAMS = 32, 4


def main() -> None:
    from guidellm.__main__ import cli

    server = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
    said = []
    for model in ("tiny-llama", "pirate"):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "out.json")
            cli(
                [
                    "run",
                    *("--backend", f"kind=openai_http,target={server},model={model}"),
                    *("--profile", f"kind=concurrent,streams={STREAMS}"),
                    *("--constraint", f"kind=max_requests,count={REQUESTS}"),
                    *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
                    *("--tokenizer", f"kind=hf_auto,model={ROOT / '.fleet/demo/tiny-llama'}"),
                    *("--output", f"kind=json,path={out}", "--output", "kind=console"),
                    "--disable-progress",
                ],
                standalone_mode=False,
            )
            (found,) = json.loads(out.read_text())["benchmarks"]
        metrics = found["metrics"]
        totals = metrics["request_totals"]
        assert totals == {
            "successful": REQUESTS,
            "errored": 0,
            "incomplete": 0,
            "total": REQUESTS,
        }, totals
        tokens = metrics["output_token_count"]["successful"]
        assert (tokens["min"], tokens["max"]) == (16, 16), tokens
        ttft = metrics["time_to_first_token_ms"]["successful"]["median"]
        said.append(f"{model} TTFT {ttft:.0f} ms")
    print(f"{REQUESTS} requests of each, {STREAMS} at a time, none failed: {', '.join(said)}")


if __name__ == "__main__":
    # torch is the project's own: see the requirements.
    sys.path += map(str, ROOT.glob(".venv/lib/python3*/site-packages"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
