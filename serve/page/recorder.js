// The microphone's side of a recording: every block of samples (mono, -1 to 1) goes to the page as it comes.

class Recorder extends AudioWorkletProcessor {
  process([[block]]) {
    if (block) this.port.postMessage(block.slice()); // a copy: the audio engine fills the same block again
    return true;
  }
}

registerProcessor("recorder", Recorder);
