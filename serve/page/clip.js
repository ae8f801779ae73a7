/** One clip on the page: its pictures, its playback with a moving cursor, and its buttons. */

import { HEARD, RATE, base64, peak, spectrogram, wav } from "./audio.js";
import { drawSpectrogram, drawWaveform } from "./plot.js";

/** Quieter than this (-60 dB), nobody can be expected to hear anything. */
const SILENT = 1e-3;
/** Recorders and encoders overshoot by a few frames; that is no longer recording. */
const SLACK = 0.3;

const template = document.querySelector("#clip-template");
let playing = null; // at most one clip plays at a time

export class Clip {
  /**
   * @param {string} name that people know the sound by
   * @param {{samples: Float32Array, seconds: number}} sound what the model will hear, and the length of all of it
   * @param {(clip: Clip) => void} onRemove
   */
  constructor(name, { samples, seconds }, onRemove) {
    this.name = name;
    this.samples = samples;
    this.seconds = samples.length / RATE;
    this.axis = this.seconds;
    this.spectrogram = spectrogram(samples);
    this.file = wav(samples);
    this.element = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.parts = Object.fromEntries(
      ["play", "remove", "place", "name", "time", "note", "waveform", "spectrogram", "figure", "seek"].map((part) => [
        part,
        find(`.${part}`),
      ]),
    );
    this.parts.name.textContent = name;
    this.parts.note.textContent = note(samples, seconds);
    this.parts.remove.addEventListener("click", () => onRemove(this));
    this._setUpPlayback(find("audio"));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.parts.figure);
  }

  /** The file's bytes as the API takes them. */
  async data() {
    this.encoded ??= await base64(this.file);
    return this.encoded;
  }

  /** Say where the clip stands: "" alone, else "First" or "Second"; and how many seconds its axis has. */
  arrange(place, axis) {
    this.axis = axis;
    const title = place ? `${place} clip, ${this.name}` : `Clip, ${this.name}`;
    const { seconds } = this;
    this.element.setAttribute("aria-label", title);
    this.parts.place.textContent = place;
    this.parts.remove.setAttribute("aria-label", `Remove ${this.name}`);
    this.parts.seek.setAttribute("aria-label", `Position in ${this.name}`);
    this.parts.waveform.setAttribute("aria-label", `Waveform of ${this.name}, ${seconds.toFixed(1)} seconds`);
    this.parts.spectrogram.setAttribute("aria-label", `Spectrogram of ${this.name}, 50 Hz to 14 kHz`);
    this.parts.figure.style.setProperty("--share", seconds / axis);
    this._showState();
    this.draw();
  }

  draw() {
    if (!this.parts.figure.clientWidth) return; // not on the page yet
    drawWaveform(this.parts.waveform, this.samples, this.axis);
    drawSpectrogram(this.parts.spectrogram, this.spectrogram, this.seconds, this.axis);
  }

  focus() {
    this.parts.play.focus();
  }

  /** Take the clip off the page. */
  remove() {
    this.audio.pause();
    this.resized.disconnect();
    URL.revokeObjectURL(this.audio.src);
    this.element.remove();
  }

  _setUpPlayback(audio) {
    this.audio = audio;
    audio.src = URL.createObjectURL(this.file);
    this.parts.seek.max = this.seconds;
    this.parts.play.addEventListener("click", () => (audio.paused ? audio.play() : audio.pause()));
    this.parts.seek.addEventListener("input", () => {
      audio.currentTime = this.parts.seek.valueAsNumber;
      this._showTime();
    });
    audio.addEventListener("play", () => {
      if (playing !== this) playing?.audio.pause();
      playing = this;
      this._follow();
    });
    audio.addEventListener("ended", () => (audio.currentTime = 0));
    for (const event of ["play", "pause", "ended"]) audio.addEventListener(event, () => this._showState());
    for (const event of ["pause", "seeked"]) audio.addEventListener(event, () => this._showTime());
    this._showTime();
  }

  /** Move the cursor with the sound, frame by frame: the element's own timeupdate comes four times a second. */
  _follow() {
    if (this.audio.paused) return;
    this._showTime();
    requestAnimationFrame(() => this._follow());
  }

  _showTime() {
    const at = Math.min(this.audio.currentTime, this.seconds);
    const { figure, seek, time } = this.parts;
    figure.style.setProperty("--at", at / this.axis);
    seek.value = at;
    seek.setAttribute("aria-valuetext", `${at.toFixed(1)} of ${this.seconds.toFixed(1)} seconds`);
    const started = at > 0 || !this.audio.paused;
    time.textContent = started ? `${at.toFixed(1)} / ${this.seconds.toFixed(1)} s` : `${this.seconds.toFixed(1)} s`;
    this.element.classList.toggle("started", started);
  }

  _showState() {
    const paused = this.audio.paused;
    this.element.classList.toggle("playing", !paused);
    this.parts.play.setAttribute("aria-label", `${paused ? "Play" : "Pause"} ${this.name}`);
    this._showTime();
  }
}

/** What people should know of a clip before they ask about it. */
function note(samples, seconds) {
  const notes = [];
  if (seconds > HEARD + SLACK) notes.push(`the model hears the first ${HEARD}\u00a0s of ${length(seconds)}`);
  if (peak(samples) < SILENT) notes.push("this clip is silent");
  return notes.join("; ");
}

/** 12.3 s, or 3:05 min. */
function length(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)}\u00a0s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}\u00a0min`;
}
