// autocannon, a load generator: every request of 200, 16 at a time, is answered 200.
import assert from "node:assert";
import autocannon from "autocannon";
import { QUESTION } from "./expected.mjs";

const body = { model: "pirate", prompt: QUESTION, max_tokens: 8, ignore_eos: true };
const found = await autocannon({
  url: `${process.env.OPENAI_BASE_URL}/completions`,
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify(body),
  connections: 16,
  amount: 200,
  timeout: 120,
});
assert.deepEqual([found.errors, found.timeouts, found.non2xx], [0, 0, 0]);
assert.equal(found["2xx"], 200);
console.log("200 requests, 16 at a time, all answered");
