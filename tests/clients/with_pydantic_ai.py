"""pydantic-ai: an agent's text, its stream, and an output type."""

import asyncio

from expected import ANSWERS, BASE, QUESTION, Thing, check
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.settings import ModelSettings

SETTINGS = ModelSettings(temperature=0, max_tokens=64)


async def main() -> None:
    for model in ANSWERS:
        agent = Agent(OpenAIChatModel(model), model_settings=SETTINGS)
        check(model, (await agent.run(QUESTION)).output)
        async with agent.run_stream(QUESTION) as stream:
            check(model, await stream.get_output())
    typed = Agent(OpenAIChatModel(BASE), output_type=NativeOutput(Thing), model_settings=SETTINGS)
    assert isinstance((await typed.run(QUESTION)).output, Thing)


asyncio.run(main())
print("run, stream, output type")
