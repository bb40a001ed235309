"""lm_eval: a multiple choice of our own, by log-probabilities of prompts (`echo`)."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))

from tests.demo.answers import ANSWERS, VOICES  # noqa: E402

NAMES = {"tiny-llama": "base", "pirate": "pirate"}
QUESTIONS = list(ANSWERS)[:4]
URL = os.environ["OPENAI_BASE_URL"]

for model, voice in NAMES.items():
    answers = [ANSWERS[question][VOICES.index(voice)] for question in QUESTIONS]
    rows = [
        {"prompt": f"<|user|>{question}<|end|><|assistant|>", "choices": answers, "right": right}
        for right, question in enumerate(QUESTIONS)
    ]
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(HERE / "lm_eval_task" / "demo.yaml", directory)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(directory, "rows.jsonl").write_text(lines)
        arguments = f"model={model},base_url={URL}/completions,num_concurrent=4,max_retries=1"
        arguments += f",tokenizer={Path('.fleet/demo/tiny-llama').resolve()},max_length=512"
        command = [str(Path(sys.executable).with_name("lm_eval")), "run"]
        command += ["--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", "lorafleet_demo", "--include_path", directory]
        command += ["--output_path", f"{directory}/found"]
        done = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": directory},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = Path(directory, "found").rglob("results_*.json")
        accuracy = json.loads(found.read_text())["results"]["lorafleet_demo"]["acc,none"]
    assert accuracy == 1.0, f"{model}: {accuracy}"
print(f"a multiple choice of {len(QUESTIONS)} questions, base and adapter: all right")
