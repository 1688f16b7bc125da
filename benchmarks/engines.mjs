// Reads a job from the first file, and writes what llama.cpp makes of it into the second, as JSON.
// Job: {runs: [{label, model, lora}], ids: [[token, ...], ...], tokens}.
import fs from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const job = JSON.parse(fs.readFileSync(process.argv[2]));
const llama = await getLlama({
  gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1,
});
const models = new Map();
const found = {};
for (const {label, model, lora} of job.runs) {
  if (!models.has(model)) {
    models.set(model, await llama.loadModel({modelPath: model, gpuLayers: 0}));
  }
  const adapters = lora === null ? {} : {lora: {adapters: [{filePath: lora, scale: 1}]}};
  const context = await models.get(model).createContext({contextSize: 256, threads: 1, ...adapters});
  const sequence = context.getSequence();
  const asked = {generateNext: {token: true, probabilities: true, options: {temperature: 0}}};
  found[label] = [];
  for (const ids of job.ids) {
    await sequence.clearHistory();
    let given = ids;
    let first = null;
    const answer = [];
    for (let n = 0; n < job.tokens; n++) {
      const last = given.length - 1;
      const input = given.map((token, place) => (place === last ? [token, asked] : token));
      const next = (await sequence.controlledEvaluate(input)).at(-1).next;
      first ??= Object.fromEntries(next.probabilities);
      answer.push(next.token);
      given = [next.token];
    }
    found[label].push({first, answer});
  }
  await context.dispose();
}
fs.writeFileSync(process.argv[3], JSON.stringify(found));
process.exit(0);
