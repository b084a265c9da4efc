// The microphone as 16-bit PCM at 24 kHz, a tenth of a second at a time, and such sound as a WAV file.

import { RATE } from "/page/live.js";

const REASONS = {
  NotAllowedError: "The microphone was refused. Allow it for this page in the browser's settings, then record again.",
  NotFoundError: "No microphone was found. Plug one in, or choose a recording.",
  NotReadableError: "The microphone does not answer. Another program may be using it.",
};

/**
 * Hear the microphone until the function that is returned is called: it resolves once everything was heard. `hear` gets
 * each block (Int16Array); `ended` is called when the microphone goes away. Throws an Error that says what is wrong.
 */
export async function listen(hear, ended) {
  if (!navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode) {
    throw new Error("Browsers lend the microphone to https pages and to localhost alone. Open this page in one of these ways, or choose a recording.");
  }
  const wanted = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: wanted }).catch((error) => {
    throw new Error(REASONS[error.name] ?? `The microphone cannot be used: ${error.message}`);
  });
  const { context, source } = await connected(stream);
  const recorder = new AudioWorkletNode(context, "recorder", { channelCount: 1, channelCountMode: "explicit" });
  const rest = new Promise((resolve) => {
    recorder.port.onmessage = ({ data }) => (data ? hear(data) : resolve());
  });
  // It puts out silence, and yet leads somewhere: a node that does not may never run.
  source.connect(recorder).connect(context.destination);
  stream.getTracks()[0].addEventListener("ended", ended); // unplugged
  return async () => {
    recorder.port.postMessage("finish");
    await Promise.race([rest, new Promise((resolve) => setTimeout(resolve, 500))]);
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
  };
}

/** A context that the stream leads into: at RATE, or at the microphone's own where the browser does not convert it. */
async function connected(stream) {
  for (const options of [{ sampleRate: RATE }, {}]) {
    const context = new AudioContext(options);
    try {
      await context.audioWorklet.addModule("/page/recorder.js");
      return { context, source: context.createMediaStreamSource(stream) };
    } catch (error) {
      await context.close();
      if (!options.sampleRate) {
        stream.getTracks().forEach((track) => track.stop());
        throw new Error(`The microphone cannot be used: ${error.message}`);
      }
    }
  }
}

/** A mono WAV file of blocks of samples (Int16Array) at RATE. */
export function wav(blocks) {
  const bytes = 2 * blocks.reduce((sum, block) => sum + block.length, 0);
  const head = new DataView(new ArrayBuffer(44));
  let at = 0;
  const text = (letters) => [...letters].forEach((letter) => head.setUint8(at++, letter.charCodeAt(0)));
  const u16 = (value) => head.setUint16((at += 2) - 2, value, true);
  const u32 = (value) => head.setUint32((at += 4) - 4, value, true);
  text("RIFF"), u32(36 + bytes), text("WAVEfmt "), u32(16);
  u16(1), u16(1), u32(RATE), u32(2 * RATE), u16(2), u16(16); // PCM, one channel, bytes a second and a sample, bits
  text("data"), u32(bytes);
  return [head, ...blocks];
}
