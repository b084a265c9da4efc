// The endpoint by its HTTP contract: requests, with the key if one was given, and streams of events.

import { $, count } from "/page/dom.js";

/** A request with the key, if one was given. Throws an Error whose message a person can read. */
export async function api(path, { headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem("key");
  if (key) headers = { ...headers, Authorization: `Bearer ${key}` };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server could not be reached. Is it running?");
  }
  if (response.ok) return response;
  const message = await explanation(response);
  if (response.status !== 401) throw Object.assign(new Error(message), { status: response.status });
  if (sessionStorage.getItem("key") === key) await askForKey(message); // else it was given meanwhile
  return api(path, { headers, ...options });
}

export const getJson = async (path) => (await api(path)).json();

export const postJson = async (path, body) => {
  const headers = { "Content-Type": "application/json" };
  return (await api(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
};

/** What a refusal means, in words, and when to try again if the server says so (in seconds, or a date). */
async function explanation(response) {
  const body = await response.json().catch(() => ({})); // a proxy's page is not JSON
  const message = body.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  const sentence = /[.!?]$/.test(message) ? message : `${message}.`;
  const after = response.headers.get("Retry-After");
  if (!after) return sentence;
  const wait = Math.ceil(Number.isNaN(+after) ? (Date.parse(after) - Date.now()) / 1000 : +after);
  if (!(wait > 0)) return `${sentence} Try again now.`;
  const time = new Date(Date.now() + wait * 1000).toLocaleTimeString();
  return `${sentence} Try again in ${count(wait, "second")}, at ${time}.`;
}

/** Ask for the key, which this tab alone keeps. Throws if none is given. */
async function askForKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  if (!dialog.open) {
    dialog.returnValue = $("key").value = "";
    dialog.showModal();
  }
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true })); // more than one may wait
  if (dialog.returnValue !== "use") throw new Error("Without an API key this server does nothing.");
  sessionStorage.setItem("key", $("key").value);
}

/** The events of a text/event-stream, parsed, wherever the network cut it. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection broke before the transcript was complete.");
    });
    if (done) return;
    const blocks = (text + value).split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield JSON.parse(lines.map((line) => line.slice(5)).join("\n"));
    }
  }
}
