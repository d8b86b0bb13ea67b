// graphile-worker, measured in a process of its own: drains no-op jobs, then begins single ones. Prints one JSON object.
//
// Arguments: directory that it is installed in, database URL, jobs to drain, jobs to begin one at a time, and its
// settings as JSON (of `preset.worker`).
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const ENQUEUE_BATCH = 5000;

const [directory, url, jobsText, samplesText, settings] = process.argv.slice(2);
const jobs = Number(jobsText);
const samples = Number(samplesText);
const installed = createRequire(`${directory}/package.json`);
const { Logger, makeWorkerUtils, run } = await import(pathToFileURL(installed.resolve("graphile-worker")));

// On Linux this is CLOCK_MONOTONIC, as Python's time.monotonic_ns.
const now = () => process.hrtime.bigint();

let begun = 0;
let wanted = 0;
let first = 0n;
let last = 0n;
let reached = () => {};

/** Forgets the jobs begun so far; the promise is kept once that many more have begun. */
function expect(count) {
  begun = 0;
  wanted = count;
  return new Promise((resolve) => (reached = resolve));
}

const taskList = {
  noop() {
    last = now();
    if (begun === 0) first = last;
    begun += 1;
    if (begun === wanted) reached();
  },
};

const preset = {
  worker: { connectionString: url, logger: new Logger(() => () => {}), ...JSON.parse(settings) },
};

const utils = await makeWorkerUtils({ preset });
await utils.migrate();

/** Adds jobs, then starts a worker; returns it once it has begun them all. */
async function drain(count) {
  for (let added = 0; added < count; added += ENQUEUE_BATCH) {
    const size = Math.min(ENQUEUE_BATCH, count - added);
    await utils.addJobs(Array.from({ length: size }, () => ({ identifier: "noop", payload: {} })));
  }
  await utils.withPgClient((client) => client.query("ANALYZE"));
  const all = expect(count);
  const runner = await run({ preset, taskList, noHandleSignals: true });
  await all;
  return runner;
}

/** Waits until every job's row is gone: what has begun must also have been completed. */
async function settle() {
  for (;;) {
    const answer = await utils.withPgClient((client) => client.query("SELECT count(*)::int AS left FROM graphile_worker.jobs"));
    if (answer.rows[0].left === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

await (await drain(Math.max(1, Math.floor(jobs / 10)))).stop();
const runner = await drain(jobs);
const figures = { first_ns: Number(first), last_ns: Number(last), latencies_ns: [], runtime: `Node ${process.version}` };
await settle();
for (let sample = 0; sample < samples; sample += 1) {
  const one = expect(1);
  const submitted = now();
  await utils.addJob("noop", {});
  await one;
  figures.latencies_ns.push(Number(last - submitted));
}
await runner.stop();
await utils.release();
console.log(JSON.stringify(figures));
