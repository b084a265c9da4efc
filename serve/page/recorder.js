// The microphone's side of a recording: sound becomes 16-bit PCM at 24 kHz, as realtime sessions take it, and goes
// to the page a tenth of a second at a time. Knows neither the page nor the network.

const RATE = 24000;
const BLOCK = RATE / 10; // samples that are sent at a time

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Int16Array(BLOCK);
    this.filled = 0;
    this.position = 0; // of the next sample, counted in the microphone's from the last one taken
    this.last = 0;
    this.port.onmessage = () => {
      // The page has heard enough: what is left goes, and then nothing more comes.
      this.port.postMessage(this.block.slice(0, this.filled));
      this.port.postMessage(null);
      this.over = true;
    };
  }

  process([[samples]]) {
    if (samples && !this.over) this.take(samples);
    return !this.over;
  }

  /** Samples at the context's rate, put between each other where it is not RATE. */
  take(samples) {
    const step = sampleRate / RATE;
    for (; this.position < samples.length; this.position += step) {
      const at = Math.floor(this.position);
      const before = at ? samples[at - 1] : this.last;
      this.put(before + (samples[at] - before) * (this.position - at));
    }
    this.position -= samples.length;
    this.last = samples[samples.length - 1];
  }

  put(sample) {
    this.block[this.filled++] = Math.max(-1, Math.min(1, sample)) * 0x7fff;
    if (this.filled < BLOCK) return;
    this.port.postMessage(this.block, [this.block.buffer]);
    this.block = new Int16Array(BLOCK);
    this.filled = 0;
  }
}

registerProcessor("recorder", Recorder);
