// Vercel's AI SDK: text, a stream, an object of a schema.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText } from "ai";
import { ANSWERS, QUESTION } from "./expected.mjs";

const fleet = createOpenAICompatible({
  name: "lorafleet",
  baseURL: process.env.OPENAI_BASE_URL,
  supportsStructuredOutputs: true,
});
const settings = { prompt: QUESTION, temperature: 0, maxOutputTokens: 64 };
for (const [name, expected] of Object.entries(ANSWERS)) {
  const model = fleet(name);
  assert.equal((await generateText({ model, ...settings })).text, expected);
  let text = "";
  for await (const part of streamText({ model, ...settings }).textStream) text += part;
  assert.equal(text, expected);
}
const schema = jsonSchema({
  type: "object",
  properties: { kind: { enum: ["water", "rock"] }, salty: { type: "boolean" } },
  required: ["kind", "salty"],
  additionalProperties: false,
});
const made = await generateObject({ model: fleet("tiny-llama"), schema, ...settings });
assert(["water", "rock"].includes(made.object.kind));
console.log("text, stream, object");
