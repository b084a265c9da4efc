// Speech as it is spoken: a realtime transcription session over a WebSocket, in OpenAI's events.
// It knows the wire alone: sound comes in as 16-bit PCM, turns of words go out. A connection that breaks is made
// again, and what had no transcript yet is sent again.

export const RATE = 24000; // samples a second
const TRANSCRIPTION = "conversation.item.input_audio_transcription.";
const WAITS = [500, 1000, 2000, 4000, 8000]; // milliseconds before each further try to connect
const OPENING = 10000; // milliseconds that the server may take to begin a session
const ENDING = 20000; // and to transcribe what is left
const UNSENT = 1 << 18; // bytes that may wait in the browser: more is kept back, and sent when the network takes it
const AT_ONCE = 50; // blocks sent in a row, so that what was kept back does not come all at once
const MARGIN = RATE / 2; // samples sent again before what was lost, so that no word begins in the middle

const LAST = "last"; // the id of the event that commits what is left

const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class LiveSession {
  #options;
  #blocks = []; // all sound so far, Int16Arrays
  #starts = []; // the sample that each begins with
  #length = 0; // samples in them
  #sent = 0; // blocks that were sent in this connection
  #base = 0; // the sample of the recording that is this connection's first
  #socket = null;
  #ready = false; // whether the session has begun
  #turns = new Map(); // by item: {id, text, start, done, words}
  #ending = null; // once the sound is over: called when the last turn is told
  #lost = false; // whether an earlier connection broke
  #refused = false; // whether there is no connection, and will be none
  #closed = false;

  /**
   * `protocols()` gives the WebSocket's subprotocols, `settings()` the session as it should be now. `turn(turn)` is
   * called when a turn has changed, `gone(turn)` when it is to be heard again, `state(name, error)` when the connection
   * is "open", "lost" (a new one is tried) or "refused" (there will be none), `problem(error)` for what goes wrong.
   */
  constructor(options) {
    this.#options = options;
  }

  /** Connect; what is heard meanwhile waits. Does not throw: `state` says how it went. */
  async start() {
    try {
      await this.#open();
      this.#options.state("open");
    } catch (error) {
      this.#refuse(error);
    }
  }

  /** More sound. */
  append(block) {
    if (!block.length) return;
    this.#starts.push(this.#length);
    this.#blocks.push(block);
    this.#length += block.length;
    this.#pump();
  }

  /** Tell the server what `settings()` says now; at once, for the words that are being spoken too. */
  update() {
    if (this.#ready) this.#send({ type: "session.update", session: this.#options.settings() });
  }

  /** The sound is over: resolves once every turn has its transcript, or will not get one. */
  async finish() {
    const end = Date.now() + ENDING;
    while (!this.#closed && this.#sent < this.#blocks.length && Date.now() < end) {
      this.#pump();
      await later(20);
    }
    if (!this.#closed && this.#ready) {
      const told = new Promise((resolve) => (this.#ending = { resolve, committed: false }));
      this.#send({ type: "input_audio_buffer.commit", event_id: LAST });
      await Promise.race([told, later(Math.max(0, end - Date.now()))]);
    }
    this.close();
  }

  close() {
    this.#closed = true;
    this.#ready = false;
    this.#socket?.close();
  }

  /** Whether the server does not take, or no longer takes, what is said. */
  get refused() {
    return this.#refused;
  }

  /** All sound so far. */
  get blocks() {
    return this.#blocks;
  }

  /** The turns in the order in which they were spoken. */
  get turns() {
    return [...this.#turns.values()].sort((one, other) => one.start - other.start);
  }

  async #open() {
    const url = new URL("/v1/realtime?intent=transcription", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url, await this.#options.protocols());
    this.#socket = socket;
    await new Promise((resolve, reject) => {
      const refused = () => reject(new Error("The server takes no live speech just now."));
      const late = setTimeout(() => (socket.close(), refused()), OPENING);
      socket.addEventListener("close", () => (clearTimeout(late), refused()));
      socket.addEventListener("message", ({ data }) => {
        const event = JSON.parse(data);
        if (event.type === "session.created") (clearTimeout(late), resolve());
        if (socket === this.#socket) this.#hear(event);
      });
    });
    socket.addEventListener("close", () => socket === this.#socket && this.#dropped());
    if (this.#closed) return socket.close();
    this.#ready = true;
    this.#sent = this.#lost ? this.#first() : 0;
    this.#base = this.#starts[this.#sent] ?? this.#length;
    this.update();
    this.#pump();
  }

  /** The block from which on sound has no transcript yet; turns without one will come again. */
  #first() {
    const [done, open] = [true, false].map((over) => this.turns.filter((turn) => turn.done === over));
    const sent = this.#starts[this.#sent] ?? this.#length;
    const from = Math.min(Math.max(0, sent - MARGIN, ...done.map((turn) => turn.end)), ...open.map((turn) => turn.start));
    for (const turn of open) {
      this.#turns.delete(turn.id);
      this.#options.gone(turn);
    }
    return this.#starts.filter((start) => start <= from).length - (this.#blocks.length ? 1 : 0);
  }

  async #dropped() {
    if (this.#closed) return;
    this.#ready = false;
    this.#lost = true;
    if (this.#ending) return this.#ending.resolve();
    this.#options.state("lost");
    for (const wait of WAITS) {
      await later(wait);
      if (this.#closed) return;
      try {
        await this.#open();
        return this.#options.state("open");
      } catch {
        // once more
      }
    }
    this.#refuse(new Error("The connection was lost, and the server does not answer."));
  }

  #refuse(error) {
    this.#closed = this.#refused = true;
    this.#ending?.resolve();
    this.#options.state("refused", error);
  }

  /** Send what has not been sent, as far as the network takes it. */
  #pump() {
    for (let n = 0; n < AT_ONCE && this.#ready && this.#sent < this.#blocks.length; n++) {
      if (this.#socket.bufferedAmount > UNSENT) return;
      const block = this.#blocks[this.#sent++];
      const bytes = new Uint8Array(block.buffer, block.byteOffset, block.byteLength);
      this.#send({ type: "input_audio_buffer.append", audio: btoa(String.fromCharCode(...bytes)) });
    }
  }

  #send(event) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(event));
  }

  #hear(event) {
    switch (event.type) {
      case "input_audio_buffer.speech_started":
        this.#turn(event.item_id).start = this.#base + Math.round((event.audio_start_ms * RATE) / 1000);
        return this.#changed(event.item_id);
      case "input_audio_buffer.speech_stopped":
        this.#turn(event.item_id).end = this.#base + Math.round((event.audio_end_ms * RATE) / 1000);
        return;
      case "input_audio_buffer.committed":
        this.#turn(event.item_id);
        if (this.#ending) this.#ending.committed = true;
        return;
      case `${TRANSCRIPTION}delta`:
        this.#turn(event.item_id).text += event.delta;
        return this.#changed(event.item_id);
      case `${TRANSCRIPTION}segment`:
        return this.#segment(event);
      case `${TRANSCRIPTION}completed`:
        Object.assign(this.#turn(event.item_id), { text: event.transcript, done: true });
        return this.#changed(event.item_id);
      case `${TRANSCRIPTION}failed`:
        this.#turn(event.item_id).done = true;
        this.#options.problem(new Error(event.error.message));
        return this.#changed(event.item_id);
      case "error":
        return this.#complaint(event.error);
    }
  }

  #turn(id) {
    if (!this.#turns.has(id)) this.#turns.set(id, { id, text: "", start: this.#length, end: 0, done: false, words: [] });
    return this.#turns.get(id);
  }

  /** Words that will not change, by the recording's clock. */
  #segment({ item_id: id, text, start, end, words, unclear }) {
    const offset = this.#base / RATE;
    const timed = words ?? text.split(/\s+/).filter(Boolean).map((word) => ({ word, start, end }));
    for (const word of timed) {
      const times = { start: word.start + offset, end: word.end + offset };
      this.#turn(id).words.push({ ...word, ...times, unclear: Boolean(unclear ?? word.unclear) });
    }
    this.#changed(id);
  }

  #changed(id) {
    this.#options.turn(this.#turn(id));
    this.#over();
  }

  /** Whether that was all. */
  #over() {
    const { resolve, committed } = this.#ending ?? {};
    if (committed && this.turns.every((turn) => turn.done)) resolve();
  }

  #complaint({ message, event_id: id }) {
    if (id === LAST && this.#ending) {
      // Nothing is left to be transcribed but what is under way.
      this.#ending.committed = true;
      return this.#over();
    }
    this.#options.problem(new Error(/[.!?]$/.test(message) ? message : `${message}.`));
  }
}
