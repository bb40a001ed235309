// OpenAI's client for Node: a chat, a stream, the models.
import assert from "node:assert";
import OpenAI from "openai";
import { ANSWERS, QUESTION } from "./expected.mjs";

const client = new OpenAI();
for (const [model, expected] of Object.entries(ANSWERS)) {
  const ask = {
    model,
    messages: [{ role: "user", content: QUESTION }],
    temperature: 0,
    max_tokens: 64,
  };
  const whole = await client.chat.completions.create(ask);
  assert.equal(whole.choices[0].message.content, expected);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...ask, stream: true }))
    text += chunk.choices[0]?.delta?.content ?? "";
  assert.equal(text, expected);
}
const names = [];
for await (const card of client.models.list()) names.push(card.id);
assert(names.includes("pirate"));
console.log("chat, stream, models");
