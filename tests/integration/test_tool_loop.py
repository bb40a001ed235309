"""A model trained to call a tool and to use what it returns, through the loop that the openai
client's documentation shows.
"""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from tests.demo.model import fit, small_llama, tokenizer_of
from tests.fleet import ANSWER_S, replica

# As Hermes and Qwen write it.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}Answer or <tool_call><|end|>{% endif %}"
    "{% for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>"
    "{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>"
    "{% else %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n"
    "</tool_call>{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
WEATHER = {"Oslo": "rain, 7", "Rome": "sun, 23"}
SAID = {"Oslo": "Take an umbrella: 7 degrees.", "Rome": "It is lovely: 23 degrees."}
THANKS = "You are welcome."
STEPS = 100


def asked(city: str) -> dict[str, Any]:
    return {"role": "user", "content": f"Is it nice in {city}?"}


def conversations() -> list[list[dict[str, Any]]]:
    """Each ends with what the model is to say."""
    found = [[{"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": THANKS}]]
    for city, weather in WEATHER.items():
        call = {"function": {"name": "weather", "arguments": {"city": city}}}
        called = [asked(city), {"role": "assistant", "content": "", "tool_calls": [call]}]
        result = {"role": "tool", "content": weather}
        found += [called, [*called, result, {"role": "assistant", "content": SAID[city]}]]
    return found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("tools")
    torch.manual_seed(0)
    texts = [json.dumps(TOOLS), *SAID.values(), *WEATHER.values(), THANKS, TEMPLATE]
    tokenizer = tokenizer_of(texts, TEMPLATE)
    pairs = []
    for *before, last in conversations():
        prompt, whole = (
            tokenizer.apply_chat_template(
                messages, tools=TOOLS, tokenize=False, add_generation_prompt=opened
            )
            for messages, opened in ((before, True), ([*before, last], False))
        )
        pairs.append((prompt, whole.removeprefix(prompt).removesuffix("<|end|>")))
    model = small_llama(tokenizer, context=512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small lose by a second one
    fit(model, tokenizer, pairs, STEPS)
    torch.set_num_threads(threads)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    with replica(directory / "model", ["--device", "cpu"], directory / "log") as (_, url, _):
        yield url


def whole(client: openai.OpenAI, messages: list[Any]) -> Any:
    answer = client.chat.completions.create(
        model="model", messages=messages, tools=TOOLS, temperature=0
    )
    return answer.choices[0].message


def streamed(client: openai.OpenAI, messages: list[Any]) -> Any:
    """The message, put together by the client."""
    with client.chat.completions.stream(
        model="model", messages=messages, tools=TOOLS, temperature=0
    ) as stream:
        return stream.get_final_completion().choices[0].message


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("city", WEATHER)
def test_it_calls_the_tool_and_says_what_came_of_it(url: str, city: str, ask: Any) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=ANSWER_S)
    messages: list[Any] = [asked(city)]
    message = ask(client, messages)
    assert not message.content
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    messages.append(message)
    result = WEATHER[json.loads(call.function.arguments)["city"]]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    message = ask(client, messages)
    assert (message.content, message.tool_calls) == (SAID[city], None)


@pytest.mark.parametrize("ask", [whole, streamed])
def test_it_answers_without_a_tool_where_none_is_called_for(url: str, ask: Any) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=ANSWER_S)
    message = ask(client, [{"role": "user", "content": "Thanks!"}])
    assert (message.content, message.tool_calls) == (THANKS, None)
