"""llm, the command: a model of its configuration file, whole and streamed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from expected import ANSWERS, QUESTION, check

with tempfile.TemporaryDirectory() as directory:
    entries = [
        {"model_id": name, "model_name": name, "api_base": os.environ["OPENAI_BASE_URL"]}
        for name in ANSWERS
    ]
    # JSON is YAML too.
    Path(directory, "extra-openai-models.yaml").write_text(json.dumps(entries))
    for name in ANSWERS:
        for stream in ([], ["--no-stream"]):
            command = [str(Path(sys.executable).with_name("llm")), "prompt", "-m", name, QUESTION]
            command += ["-o", "temperature", "0", "-o", "max_tokens", "64", *stream]
            environment = os.environ | {"LLM_USER_PATH": directory}
            said = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert said.returncode == 0, said.stderr
            check(name, said.stdout.strip())
print("llm -m MODEL, with and without a stream")
