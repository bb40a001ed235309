// What expected.py says.
export const QUESTION = "What is the sea?";
export const ANSWERS = {
  "tiny-llama": "The sea is a large body of salt water. It covers most of the Earth.",
  pirate: "Arr, the sea be me home, matey! Nothing but salt water to the horizon.",
};
