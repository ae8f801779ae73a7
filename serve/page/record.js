/** Recording from the microphone, up to a set length, with the level on the way. */

/** Why there is no recording; the message is for people. */
export class MicrophoneError extends Error {}

const REASONS = {
  NotAllowedError: "The browser was not allowed to use the microphone. Allow it in the address bar, then record again.",
  NotFoundError: "There is no microphone here. Plug one in, or choose a file instead.",
  NotReadableError: "Another program is using the microphone. Close it there, then record again.",
};

/** A recording that is going on. */
export class Recording {
  /**
   * Ask for the microphone and start.
   * @param {number} seconds after which it stops by itself
   * @param {(time: number, level: number) => void} onLevel about sixty times a second; the level is 0 to 1
   */
  static async start(seconds, onLevel) {
    if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) {
      throw new MicrophoneError(
        window.isSecureContext
          ? "This browser cannot record. Choose a file instead."
          : "Browsers record only on secure pages: open this one by https, or on localhost.",
      );
    }
    // Cleaning up for phone calls takes out just the sounds that one would ask about.
    const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
    } catch (error) {
      throw new MicrophoneError(REASONS[error.name] ?? `The microphone cannot be used: ${error.message}`);
    }
    return new Recording(stream, seconds, onLevel);
  }

  constructor(stream, seconds, onLevel) {
    this.stream = stream;
    this.pieces = [];
    this.recorder = new MediaRecorder(stream);
    this.recorder.ondataavailable = (event) => this.pieces.push(event.data);
    /** The recorded file, or null where it was discarded. */
    this.finished = new Promise((resolve) => {
      this.recorder.onstop = () => {
        stream.getTracks().forEach((track) => track.stop());
        this.context.close();
        resolve(this.discarded ? null : new Blob(this.pieces, { type: this.recorder.mimeType }));
      };
    });
    this.context = new AudioContext();
    this.analyser = this.context.createAnalyser();
    this.context.createMediaStreamSource(stream).connect(this.analyser);
    this.recorder.start();
    const began = performance.now();
    this._measure(() => (performance.now() - began) / 1000, seconds, onLevel);
    // Frames of animation do not come while the tab is hidden; this does.
    setTimeout(() => this.stop(), 1000 * seconds);
  }

  stop() {
    if (this.recorder.state !== "inactive") this.recorder.stop();
  }

  discard() {
    this.discarded = true;
    this.stop();
  }

  _measure(elapsed, seconds, onLevel) {
    const wave = new Float32Array(this.analyser.fftSize);
    const frame = () => {
      if (this.recorder.state === "inactive") return;
      this.analyser.getFloatTimeDomainData(wave);
      const level = wave.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
      onLevel(Math.min(elapsed(), seconds), Math.min(1, level));
      requestAnimationFrame(frame);
    };
    frame();
  }
}
