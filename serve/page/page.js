// The page of the transcription endpoint: audio in, words as they are heard, and why a word was chosen.
// It knows the endpoint by its HTTP contract alone. What comes from outside becomes text, never markup.

import { api, events, getJson, postJson } from "/page/api.js";
import { $, busy, complain, count, h, percent, say } from "/page/dom.js";
import { LiveSession, RATE } from "/page/live.js";
import { listen, wav } from "/page/microphone.js";

let audio = null; // the File to transcribe
let result = null; // its last whole transcript: {words, how}
let running = null; // the AbortController of the transcription under way
let recording = null; // the recording under way: {session, names: those being added, drop(), finish()}
let opened = null; // the button of the word whose evidence is shown
let datastores = new Map(); // what the server has, by name

// ---- audio ----

/** Take `file` as the audio to transcribe; what was shown of the last one goes, or stays where that is `heard` of it. */
function useAudio(file, heard = false) {
  if (!heard) dropAudio();
  audio = file;
  $("player").src = URL.createObjectURL(file);
  $("file-name").textContent = file.name;
  $("heard").hidden = false;
  showRunning();
  say("Ready to transcribe.");
}

/** What was shown of the last audio goes, and what is made of it. */
function dropAudio() {
  recording?.drop();
  running?.abort();
  running = result = audio = null;
  URL.revokeObjectURL($("player").src);
  $("player").removeAttribute("src");
  $("transcript").replaceChildren();
  $("how").textContent = "";
  for (const id of ["heard", "previous", "legend", "again"]) $(id).hidden = true;
  closeEvidence();
  showRunning();
}

/** Hear the microphone, and show the words while they are spoken. */
async function record() {
  const session = new LiveSession({
    protocols: subprotocols,
    settings: liveSettings,
    turn: showTurn,
    gone: (turn) => forgetTurn(turn.id),
    state: (name, error) => recording && liveState(name, error),
    problem: complain,
  });
  const stop = await listen((block) => session.append(block), () => recording?.finish());
  dropAudio();
  const began = new Date();
  const tick = () => {
    const seconds = Math.floor((Date.now() - began) / 1000);
    $("elapsed").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  };
  const clock = setInterval(tick, 250);
  const end = async () => {
    recording = null;
    clearInterval(clock);
    $("elapsed").textContent = "";
    $("record").textContent = "Record";
    document.body.classList.remove("recording");
    await stop();
  };
  recording = {
    session,
    names: [],
    drop: () => (session.close(), showLive(false), end()),
    finish: async () => {
      await end();
      say("Hearing the last words…");
      await session.finish();
      showLive(false);
      finishLive(session, new File(wav(session.blocks), `recording ${began.toLocaleTimeString()}.wav`, { type: "audio/wav" }));
    },
  };
  $("record").textContent = "Finish recording";
  document.body.classList.add("recording");
  showLive(true);
  tick();
  say("Connecting. What you say is kept.");
  session.start();
}

// ---- transcribing ----

async function transcribe() {
  const name = $("datastore").value;
  const retrieval = name ? $("retrieval").value : "none"; // with no datastore there is nothing to look up
  const mode = $("retrieval").querySelector(`[value="${retrieval}"]`).textContent;
  const how = retrieval === "none" ? "no retrieval" : `${mode}, ${name} (${size(datastores.get(name), retrieval)})`;
  const form = new FormData();
  form.append("file", audio, audio.name);
  form.append("stream", "true");
  form.append("include[]", "retrieval");
  if (retrieval !== "auto") form.append("retrieval", retrieval);
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

/** How much of a datastore there is to find: entries are searched and read, and documents spotted. */
function size({ documents, entries }, retrieval) {
  return ["auto", "spotting"].includes(retrieval) ? count(documents, "document") : count(entries, "entry", "entries");
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
  words ??= textWords(text);
  const [before, now] = result ? shared(result.words, words) : [[], words.map(() => true)];
  const nodes = words.map((word, i) => (now[i] ? wordNode(word) : h("ins", {}, wordNode(word))));
  $("transcript").replaceChildren(...spaced(nodes));
  if (!words.length) $("transcript").append(h("span", { class: "quiet" }, "No speech was heard in this recording."));
  if (result) {
    $("previous-text").replaceChildren(...spaced(result.words.map(({ word }, i) => (before[i] ? word : h("del", {}, word)))));
  }

  const changed = words.filter(byRetrieval).length;
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

const textWords = (text) => text.split(/\s+/).filter(Boolean).map((word) => ({ word }));

const spaced = (nodes) => nodes.flatMap((node) => [node, " "]).slice(0, -1);

/** The language model alone would not have chosen the word; but where nothing that was looked up speaks for it, its sound did. */
const byRetrieval = (word) => word.changed && Boolean(word.source);

function wordNode(word) {
  if (!byRetrieval(word)) return word.unclear ? h("span", { class: "unclear" }, word.word) : document.createTextNode(word.word);
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

// ---- live ----

/** The WebSocket's subprotocols: behind a key, a secret that only opens a session, and not for long. */
async function subprotocols() {
  if (!sessionStorage.getItem("key")) return ["realtime"];
  const asked = { expires_after: { anchor: "created_at", seconds: 60 } };
  const { value } = await postJson("/v1/realtime/client_secrets", asked);
  return ["realtime", `openai-insecure-api-key.${value}`];
}

/** What a session listens for, as the page says now. */
function liveSettings() {
  const datastore = $("datastore").value || null;
  const context = recording?.names ?? [];
  const chosen = datastore || context.length ? $("retrieval").value : "none";
  const retrieval = chosen === "auto" ? null : chosen;
  const format = { type: "audio/pcm", rate: RATE };
  return { type: "transcription", audio: { input: { format, transcription: { datastore, context, retrieval } } } };
}

function liveState(name, error) {
  if (name === "open") say("Listening. The words appear as you speak.");
  if (name === "lost") say("The connection was lost. Connecting again; what you say is kept.");
  if (name !== "refused") return;
  say(`${error.message} Go on: the recording is kept, and transcribed when you finish.`);
}

/** Whether words come while they are spoken: each is shown, and read aloud once its turn is whole. */
function showLive(on) {
  $("transcript").setAttribute("aria-live", on ? "off" : "polite");
  $("transcript").toggleAttribute("aria-busy", on);
  if (on) $("spoken").replaceChildren();
}

const turnNode = (id) => $("transcript").querySelector(`[data-turn="${CSS.escape(id)}"]`);

function showTurn({ id, text, done, words }) {
  let node = turnNode(id);
  if (!node && !text) return;
  if (!node) {
    node = h("span", { "data-turn": id });
    $("transcript").append(node, " ");
  }
  if (done) {
    const same = words.map(({ word }) => word).join(" ") === text;
    node.replaceChildren(...(same ? spaced(words.map(wordNode)) : [text]));
    $("spoken").append(h("p", {}, text));
    return;
  }
  const shown = node.textContent;
  if (text.startsWith(shown)) node.append(h("span", { class: "delta" }, text.slice(shown.length)));
  else node.textContent = text;
}

function forgetTurn(id) {
  turnNode(id)?.nextSibling?.remove();
  turnNode(id)?.remove();
}

/** The recording as a file, with what was heard of it; without a session it is transcribed now. */
function finishLive(session, file) {
  const words = session.turns.flatMap(({ text, words }) => (words.length ? words : textWords(text)));
  const heard = session.turns.length > 0;
  useAudio(file, heard);
  if (!heard && session.refused) return transcribe();
  const unclear = words.filter((word) => word.unclear).length;
  $("legend-unclear").hidden = $("legend").hidden = !unclear;
  $("legend-changed").hidden = $("legend-differs").hidden = true;
  if (!words.length) {
    $("transcript").replaceChildren(h("span", { class: "quiet" }, "No speech was heard in this recording."));
    return say("Nothing was heard. Is the right microphone chosen?");
  }
  const how = `live, ${$("datastore").value || "no datastore"}`;
  result = { words, how };
  $("how").textContent = how;
  showRunning();
  const rest = session.refused ? " The connection was lost before the end: transcribe again for all of it." : "";
  say(`${count(words.length, "word")}${unclear ? `, ${unclear} unclear` : ""}. Transcribe again to see what retrieval did.${rest}`);
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
    quotation(source, word.word),
    h(
      "dl",
      { class: "facts" },
      ...fact("Document", source.document === source.text ? null : source.document),
      ...fact("Distance", source.distance === null ? null : `${source.distance.toFixed(2)} (smaller is nearer)`),
      ...fact("Share of attention", source.attention === null ? null : percent(source.attention)),
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

function quotation(source, word) {
  const parts = source.text.split(/(\s+)/).map((part) => (part === word ? h("mark", {}, part) : part));
  const what = source.entry < 0 ? "It was spotted in what was heard, and is from here" : `Entry ${source.entry}, the one that mattered most`;
  return h("figure", {}, h("blockquote", {}, ...parts), h("figcaption", {}, what));
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
  await inTheSameBreath(texts, async () => {
    name = await store(name, texts);
  });
  $("names").value = "";
  changedNames(`${count(texts.length, "name")} added to ${name}.`);
}

/** While somebody speaks, names are listened for at once; once `work` has put them into the datastore, as its own. */
async function inTheSameBreath(names, work) {
  const session = recording;
  if (session) session.names = names;
  session?.session.update();
  try {
    await work();
  } finally {
    if (session) session.names = [];
    session?.session.update();
  }
}

/** Put names into a datastore, or into a new one; its name. */
async function store(name, texts) {
  if (name) {
    await postJson(`${storePath(name)}/entries`, { texts });
  } else {
    name = $("store-name").value;
    await postJson("/v1/datastores", { name, texts }).catch((error) => {
      if (error.status !== 409) throw error; // it exists already, and that is as good
      return postJson(`${storePath(name)}/entries`, { texts });
    });
  }
  await loadDatastores(name);
  return name;
}

function changedNames(text) {
  if (recording) return say(`${text} Listening for what the datastore has now.`);
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
$("datastore").addEventListener("change", () => {
  recording?.session.update();
  loadContents().catch(complain);
});
$("retrieval").addEventListener("change", () => recording?.session.update());
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

try {
  const { data } = await getJson("/v1/models");
  for (const option of $("retrieval").options) option.disabled = option.value !== "auto" && !data[0].retrieval.includes(option.value);
  await loadDatastores("names");
} catch (error) {
  complain(error);
}
