// The page of the transcription endpoint: audio in, words as they are heard, and why a word was chosen.
// It knows the endpoint by its HTTP contract alone. What comes from outside becomes text, never markup.

const $ = (id) => document.getElementById(id);

let audio = null; // the File to transcribe
let result = null; // its last whole transcript: {words, how}
let running = null; // the AbortController of the transcription under way
let recording = null; // the recording under way: {finish}
let opened = null; // the button of the word whose evidence is shown
let datastores = new Map(); // what the server has, by name

/** An element with its attributes and listeners ("onclick": f); children are nodes or text. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

function percent(p) {
  if (p > 0 && p < 0.0001) return "<0.01%";
  return p.toLocaleString("en", { style: "percent", maximumSignificantDigits: 3 });
}

// ---- what the page says ----

/** The state of things, in the footer. A new state ends the last complaint. */
function say(text) {
  $("status").textContent = text;
  $("alert").textContent = "";
}

function complain(error) {
  $("status").textContent = "";
  $("alert").textContent = error.message;
}

/** Run `work` once at a time for this button, which keeps its focus; what goes wrong is said. */
async function busy(button, work) {
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

// ---- the API ----

/** A request with the key, if one was given. Throws an Error whose message a person can read. */
async function api(path, { headers = {}, ...options } = {}) {
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

const getJson = async (path) => (await api(path)).json();

const postJson = async (path, body) => {
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
async function* events(body) {
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

// ---- audio ----

/** Take `file` as the audio to transcribe; what was shown of the last one goes. */
function useAudio(file) {
  running?.abort();
  running = result = null;
  audio = file;
  URL.revokeObjectURL($("player").src);
  $("player").src = URL.createObjectURL(file);
  $("file-name").textContent = file.name;
  $("heard").hidden = false;
  $("transcript").replaceChildren();
  $("how").textContent = "";
  for (const id of ["previous", "legend", "again"]) $(id).hidden = true;
  closeEvidence();
  showRunning();
  say("Ready to transcribe.");
}

/** Record the microphone as PCM: what MediaRecorder makes (webm) is not readable by the server. */
async function record() {
  const context = new AudioContext(); // at the microphone's own rate: the server resamples
  await context.audioWorklet.addModule("/page/recorder.js");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true }).catch((error) => {
    context.close();
    const reasons = {
      NotAllowedError: "The microphone was refused. Allow it for this page in the browser's settings.",
      NotFoundError: "No microphone was found.",
    };
    throw new Error(reasons[error.name] ?? `The microphone cannot be used: ${error.message}`);
  });
  const recorder = new AudioWorkletNode(context, "recorder", { channelCount: 1, channelCountMode: "explicit" });
  const blocks = [];
  recorder.port.onmessage = ({ data }) => blocks.push(data);
  // It puts out silence, and yet leads somewhere: a node that does not may never run.
  context.createMediaStreamSource(stream).connect(recorder).connect(context.destination);

  const began = Date.now();
  const tick = () => {
    const seconds = Math.floor((Date.now() - began) / 1000);
    $("elapsed").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  };
  const clock = setInterval(tick, 250);
  const finish = async () => {
    recording = null;
    clearInterval(clock);
    $("elapsed").textContent = "";
    $("record").textContent = "Record";
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
    const name = `recording ${new Date(began).toLocaleTimeString()}.wav`;
    useAudio(new File([wav(blocks, context.sampleRate)], name, { type: "audio/wav" }));
  };
  stream.getTracks()[0].addEventListener("ended", finish); // unplugged
  recording = { finish };
  $("record").textContent = "Finish recording";
  tick();
  say("Recording.");
}

/** A mono, 16-bit WAV of blocks of samples from -1 to 1; `rate` in samples a second. */
function wav(blocks, rate) {
  const bytes = 2 * blocks.reduce((sum, block) => sum + block.length, 0);
  const view = new DataView(new ArrayBuffer(44 + bytes));
  let at = 0;
  const text = (letters) => [...letters].forEach((letter) => view.setUint8(at++, letter.charCodeAt(0)));
  const u16 = (value) => view.setUint16((at += 2) - 2, value, true);
  const u32 = (value) => view.setUint32((at += 4) - 4, value, true);
  text("RIFF"), u32(36 + bytes), text("WAVEfmt "), u32(16);
  u16(1), u16(1), u32(rate), u32(2 * rate), u16(2), u16(16); // PCM, one channel, bytes a second and a sample, bits
  text("data"), u32(bytes);
  for (const block of blocks) {
    for (const sample of block) view.setInt16((at += 2) - 2, Math.max(-1, Math.min(1, sample)) * 0x7fff, true);
  }
  return view.buffer;
}

// ---- transcribing ----

async function transcribe() {
  const name = $("datastore").value;
  const retrieval = name ? $("retrieval").value : "none"; // with no datastore there is nothing to look up
  const mode = $("retrieval").querySelector(`[value="${retrieval}"]`).textContent;
  const how = retrieval === "none" ? "no retrieval" : `${mode}, ${name} (${count(datastores.get(name).entries, "entry", "entries")})`;
  const form = new FormData();
  form.append("file", audio, audio.name);
  form.append("stream", "true");
  form.append("include[]", "retrieval");
  form.append("retrieval", retrieval);
  if (name) form.append("datastore", name);

  const mine = (running = new AbortController());
  showRunning();
  say("Transcribing…");
  try {
    const response = await api("/v1/audio/transcriptions", { method: "POST", body: form, signal: mine.signal });
    begin(how); // only now: a refusal leaves the last transcript where it is
    let last = null;
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.type === "transcript.text.delta") $("transcript").append(h("span", { class: "delta" }, event.delta));
      if (event.type === "transcript.text.done") last = event;
    }
    if (!last) throw new Error("The connection ended before the transcript was complete.");
    finish(last, how);
  } catch (error) {
    if (running !== mine) return; // other audio was chosen
    if (mine.signal.aborted) say("Stopped.");
    else complain(error);
  } finally {
    $("transcript").removeAttribute("aria-busy");
    if (running === mine) running = null;
    showRunning();
  }
}

/** One button starts and stops, so that it keeps the focus. */
function showRunning() {
  $("transcribe").disabled = !audio;
  $("transcribe").textContent = running ? "Stop" : result ? "Transcribe again" : "Transcribe";
}

function begin(how) {
  closeEvidence();
  $("again").hidden = $("legend").hidden = true;
  $("transcript").setAttribute("aria-busy", "true"); // read aloud once, when it is whole
  $("transcript").replaceChildren();
  $("how").textContent = how;
  $("previous").hidden = !result;
  if (!result) return;
  $("previous-how").textContent = result.how;
  $("previous-text").textContent = result.words.map(({ word }) => word).join(" ");
}

/** Put the words of the whole transcript in place of the deltas, with what changed marked. */
function finish({ text, duration, words, missing_shards: missing }, how) {
  words ??= text.split(/\s+/).filter(Boolean).map((word) => ({ word }));
  const [before, now] = result ? shared(result.words, words) : [[], words.map(() => true)];
  const spaced = (nodes) => nodes.flatMap((node) => [node, " "]).slice(0, -1);
  const nodes = words.map((word, i) => (now[i] ? wordNode(word) : h("ins", {}, wordNode(word))));
  $("transcript").replaceChildren(...spaced(nodes));
  if (!words.length) $("transcript").append(h("span", { class: "quiet" }, "No speech was heard in this recording."));
  if (result) {
    $("previous-text").replaceChildren(...spaced(result.words.map(({ word }, i) => (before[i] ? word : h("del", {}, word)))));
  }

  const changed = words.filter((word) => word.changed).length;
  const differs = now.includes(false) || before.includes(false);
  $("legend-changed").hidden = !changed;
  $("legend-differs").hidden = !differs;
  const unclear = words.filter((word) => word.unclear).length;
  $("legend-unclear").hidden = !unclear;
  $("legend").hidden = !changed && !differs && !unclear;
  const said = [`${count(words.length, "word")} in ${duration.toFixed(1)} seconds of audio`, `${changed || "none"} changed by retrieval`];
  if (unclear) said.push(`${unclear === words.length ? "all" : unclear} unclear`);
  if (result) said.push(differs ? "not the same as before" : "the same as before");
  if (missing) said.push(`${count(missing, "shard")} of the datastore did not answer`);
  say(`${said.join("; ")}.`);
  result = { words, how };
}

function wordNode(word) {
  if (!word.changed && word.unclear) return h("span", { class: "unclear" }, word.word);
  if (!word.changed) return document.createTextNode(word.word);
  const label = `${word.word}, changed by retrieval${word.unclear ? ", unclear" : ""}`;
  const button = h("button", { type: "button", class: word.unclear ? "word unclear" : "word", "aria-label": label, "aria-expanded": "false" }, word.word);
  button.addEventListener("click", () => (opened === button ? closeEvidence() : showEvidence(button, word)));
  return button;
}

/** Which words of each list belong to their longest common subsequence: two lists of booleans. */
function shared(before, after) {
  const [n, m] = [before.length, after.length];
  const same = (i, j) => before[i].word === after[j].word;
  const rows = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1)); // lengths, from word i and j on
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      rows[i][j] = same(i, j) ? rows[i + 1][j + 1] + 1 : Math.max(rows[i + 1][j], rows[i][j + 1]);
    }
  }
  const kept = [Array(n).fill(false), Array(m).fill(false)];
  for (let i = 0, j = 0; i < n && j < m; ) {
    if (same(i, j)) kept[0][i++] = kept[1][j++] = true;
    else if (rows[i + 1][j] >= rows[i][j + 1]) i++;
    else j++;
  }
  return kept;
}

// ---- evidence ----

function showEvidence(button, word) {
  closeEvidence();
  opened = button;
  button.setAttribute("aria-expanded", "true");
  const bar = (label, p) => [
    h("dt", {}, label),
    h("dd", {}, h("meter", { min: 0, max: 1, value: p, "aria-label": label }), h("b", { class: "number" }, percent(p))),
  ];
  const fact = (label, value) => (value === null ? [] : [h("dt", {}, label), h("dd", {}, value)]);
  const { source } = word;
  $("evidence").append(
    h("h2", {}, `Why “${word.word}”`),
    h("button", { type: "button", class: "close", "aria-label": "Close the evidence", onclick: () => closeEvidence(true) }, "×"),
    h("dl", { class: "bars" }, ...bar("Language model alone", word.lm_probability), ...bar("With retrieval", word.probability), ...(word.confidence == null ? [] : bar("Confidence", word.confidence))),
    source ? quotation(source, word.word) : h("p", { class: "quiet" }, "No single entry stands behind this word."),
    h(
      "dl",
      { class: "facts" },
      ...fact("Document", source?.document ?? null),
      ...fact("Distance", source?.distance == null ? null : `${source.distance.toFixed(2)} (smaller is nearer)`),
      ...fact("Share of attention", source?.attention == null ? null : percent(source.attention)),
      ...fact("Heard at", `${word.start.toFixed(2)}–${word.end.toFixed(2)} s`),
    ),
    h("button", { type: "button", onclick: () => hear(word) }, "Hear the word"),
  );
  $("evidence").scrollIntoView({ block: "nearest" });
}

/** Take the evidence away; with `back` the focus returns to the word it was for. */
function closeEvidence(back = false) {
  if (back) opened?.focus();
  opened?.setAttribute("aria-expanded", "false");
  opened = null;
  $("evidence").replaceChildren();
}

function quotation({ entry, text }, word) {
  const parts = text.split(/(\s+)/).map((part) => (part === word ? h("mark", {}, part) : part));
  return h("figure", {}, h("blockquote", {}, ...parts), h("figcaption", {}, `Entry ${entry}, the one that mattered most`));
}

let pause = 0;
function hear({ start, end }) {
  const margin = 0.1; // seconds on both sides: a word cut at its edges is hard to recognise
  clearTimeout(pause);
  $("player").currentTime = Math.max(0, start - margin);
  $("player").play().catch(() => complain(new Error("This browser cannot play the recording.")));
  pause = setTimeout(() => $("player").pause(), 1000 * (end - start + 2 * margin));
}

// ---- datastores and names ----

/** Ask the server for its datastores; choose `name` if it has that. */
async function loadDatastores(name) {
  const { data } = await getJson("/v1/datastores");
  datastores = new Map(data.map((datastore) => [datastore.id, datastore]));
  const options = data.map(({ id }) => h("option", { value: id }, id));
  $("datastore").replaceChildren(h("option", { value: "" }, "None"), ...options);
  $("datastore").value = datastores.has(name) ? name : "";
  await loadContents();
}

async function loadContents(after = 0) {
  const name = $("datastore").value;
  $("new-store").hidden = $("store-name").disabled = Boolean(name); // disabled: the form does not check it
  $("contents").hidden = !name;
  if (!name) return;
  const { data, has_more: more } = await getJson(`${storePath(name)}/entries?limit=100&after=${after}`);
  if ($("datastore").value !== name) return; // another was chosen meanwhile
  $("contents-title").textContent = `In ${name}: ${count(datastores.get(name).documents, "document")}`;
  if (!after) $("entries").replaceChildren();
  $("entries").append(...data.map(({ document, entries }) => entryNode(name, document, entries)));
  $("more").hidden = !more;
}

const storePath = (name) => `/v1/datastores/${encodeURIComponent(name)}`;

function entryNode(name, document, entries) {
  const remove = async () => {
    await api(`${storePath(name)}/entries?document=${encodeURIComponent(document)}`, { method: "DELETE" });
    const next = line.nextElementSibling ?? line.previousElementSibling;
    await loadDatastores(name);
    [...$("entries").children].find((other) => other.dataset.document === next?.dataset.document)?.querySelector("button").focus();
    if (!next) $("contents-title").focus();
    changedNames(`“${document}” removed from ${name}.`);
  };
  const button = h("button", { type: "button", "aria-label": `Remove ${document}`, onclick: () => busy(button, remove) }, "Remove");
  const size = h("small", { class: "number" }, count(entries, "entry", "entries"));
  const line = h("li", { "data-document": document }, h("span", {}, document), size, button);
  return line;
}

async function addNames() {
  const texts = [...new Set($("names").value.split("\n").map((line) => line.trim()).filter(Boolean))];
  if (!texts.length) throw new Error("Write at least one name.");
  let name = $("datastore").value;
  say(`Adding ${count(texts.length, "name")}: each is spoken first…`);
  if (name) {
    await postJson(`${storePath(name)}/entries`, { texts });
  } else {
    name = $("store-name").value;
    await postJson("/v1/datastores", { name, texts }).catch((error) => {
      if (error.status !== 409) throw error; // it exists already, and that is as good
      return postJson(`${storePath(name)}/entries`, { texts });
    });
  }
  $("names").value = "";
  await loadDatastores(name);
  changedNames(`${count(texts.length, "name")} added to ${name}.`);
}

function changedNames(text) {
  $("again").hidden = !result;
  say(result ? `${text} Transcribe again to see the difference.` : text);
}

// ---- wiring ----

$("file").addEventListener("change", () => $("file").files[0] && useAudio($("file").files[0]));
$("file").addEventListener("click", () => ($("file").value = "")); // the same file again is a change too
$("record").addEventListener("click", () => busy($("record"), () => (recording ? recording.finish() : record())));
$("transcribe").addEventListener("click", ({ detail }) => {
  if (!running) transcribe();
  else if (detail < 2) running.abort(); // the second half of a double click stops nothing
});
$("again").addEventListener("click", () => {
  running?.abort();
  $("transcribe").focus(); // where Stop is; the button that was pressed goes
  transcribe();
});
$("names-form").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("add"), addNames);
});
$("datastore").addEventListener("change", () => loadContents().catch(complain));
$("more").addEventListener("click", () => busy($("more"), () => loadContents($("entries").children.length)));

// Dropped anywhere: a near miss must not leave the page for the file.
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", type === "dragover");
    if (type === "drop" && event.dataTransfer.files[0]) useAudio(event.dataTransfer.files[0]);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && opened && !$("key-dialog").open) closeEvidence(true);
});

if (!navigator.mediaDevices) {
  $("record").disabled = true;
  $("record").title = "Browsers lend the microphone to https pages and to localhost alone.";
}
try {
  const { data } = await getJson("/v1/models");
  for (const option of $("retrieval").options) option.disabled = !data[0].retrieval.includes(option.value);
  if ($("retrieval").selectedOptions[0]?.disabled) $("retrieval").value = data[0].retrieval.at(-1);
  await loadDatastores("names");
} catch (error) {
  complain(error);
}
