/** Drawing: waveform, spectrogram and recording level on canvases, sharp on any screen, in the colours of the page. */

import { HEARD, HIGHEST, LOWEST, RATE, mel } from "./audio.js";

/** Pixels left of the plots for the frequencies; `--gutter` in the stylesheet is the same. */
const GUTTER = 36;
/** Pixels below the spectrogram for the seconds. */
const FOOT = 20;
const FREQUENCIES = [500, 1000, 2000, 4000, 8000];
/** Decibels below the loudest point that still get a shade. */
const RANGE = 72;
/** Decibels of digital silence, as `spectrogram` has them. */
const SILENCE = -100;

/** Colours of the page as it is shown now, light or dark. */
function palette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  return {
    label: colour("--muted"),
    line: colour("--line"),
    wave: colour("--wave"),
    record: colour("--record"),
    shades: [0, 1, 2, 3, 4].map((step) => rgb(colour(`--shade-${step}`))),
    font: `11px ${getComputedStyle(document.body).fontFamily}`,
  };
}

/** `#rrggbb` as three numbers. */
function rgb(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

/** Size a canvas for the screen's pixels, clear it, and return its context and size in pixels of the stylesheet. */
function prepare(canvas) {
  const scale = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width, height };
}

/**
 * Draw `samples`, scaled to their own loudest one, over an axis of `seconds`.
 * @param {HTMLCanvasElement} canvas
 */
export function drawWaveform(canvas, samples, seconds) {
  const { context, width, height } = prepare(canvas);
  const colours = palette();
  const scale = canvas.width / width || 1;
  const columns = Math.round((width - GUTTER) * scale);
  const each = (seconds * RATE) / columns;
  const loudest = Math.max(1e-3, samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0));
  const middle = height / 2;
  context.fillStyle = colours.line;
  context.fillRect(GUTTER, middle - 0.5, width - GUTTER, 1);
  context.fillStyle = colours.wave;
  for (let column = 0; column < columns; column++) {
    const [from, to] = [Math.floor(column * each), Math.min(samples.length, Math.ceil((column + 1) * each))];
    if (from >= to) break;
    let [low, high] = [Infinity, -Infinity];
    for (let i = from; i < to; i++) {
      low = Math.min(low, samples[i]);
      high = Math.max(high, samples[i]);
    }
    const [top, bottom] = [high, low].map((value) => middle - (value / loudest) * (middle - 2));
    context.fillRect(GUTTER + column / scale, top - 0.5, 1 / scale, Math.max(1, bottom - top + 1));
  }
}

/**
 * Draw a spectrogram that lasts `length` seconds over an axis of `seconds`, frequencies on the model's mel scale.
 * @param {HTMLCanvasElement} canvas
 * @param {{frames: number, bands: number, decibels: Float32Array}} spectrogram
 */
export function drawSpectrogram(canvas, spectrogram, length, seconds) {
  const { context, width, height } = prepare(canvas);
  const colours = palette();
  const plot = { width: width - GUTTER, height: height - FOOT };
  const image = shaded(spectrogram, colours.shades);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, GUTTER, 0, (plot.width * length) / seconds, plot.height);

  context.font = colours.font;
  context.fillStyle = colours.label;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const span = mel(HIGHEST) - mel(LOWEST);
  for (const hertz of FREQUENCIES) {
    const y = plot.height * (1 - (mel(hertz) - mel(LOWEST)) / span);
    context.fillText(String(hertz / 1000), GUTTER - 9, y);
    context.fillRect(GUTTER - 5, Math.round(y) - 0.5, 4, 1);
  }
  context.fillText("kHz", GUTTER - 9, 6);

  context.textBaseline = "bottom";
  const step = secondsStep(seconds, plot.width);
  const places = step < 1 ? 1 : 0;
  for (let number = 0; number * step <= seconds + 1e-6; number++) {
    const time = number * step;
    const x = GUTTER + (plot.width * time) / seconds;
    const text = time.toFixed(places) + (number ? "" : " s");
    context.fillRect(Math.min(Math.round(x), width - 1), plot.height + 1, 1, 4);
    context.textAlign = "center";
    const half = context.measureText(text).width / 2; // kept inside the canvas at both ends
    context.fillText(text, Math.min(Math.max(x, GUTTER + half), width - half), height);
  }
}

/** Seconds between two labels, so that they stand at least 56 pixels apart. */
function secondsStep(seconds, width) {
  return [0.1, 0.2, 0.5, 1, 2, 5].find((step) => (step / seconds) * width >= 56) ?? 10;
}

/** The spectrogram as a canvas, one pixel a frame and band. */
function shaded({ frames, bands, decibels }, shades) {
  const loudest = decibels.reduce((most, value) => Math.max(most, value), SILENCE + RANGE); // else it had a shade
  const table = Array.from({ length: 256 }, (_, level) => shade(level / 255, shades));
  const pixels = new ImageData(frames, bands);
  for (let frame = 0; frame < frames; frame++) {
    for (let band = 0; band < bands; band++) {
      const level = 1 + (decibels[frame * bands + band] - loudest) / RANGE;
      const colour = table[Math.round(255 * Math.max(0, level))];
      const at = 4 * ((bands - 1 - band) * frames + frame);
      pixels.data.set(colour, at);
      pixels.data[at + 3] = 255;
    }
  }
  const canvas = document.createElement("canvas");
  canvas.width = frames;
  canvas.height = bands;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** The colour at `level` (0 to 1) between the `shades`. */
function shade(level, shades) {
  const place = level * (shades.length - 1);
  const below = Math.min(Math.floor(place), shades.length - 2);
  return shades[below].map((start, channel) => start + (place - below) * (shades[below + 1][channel] - start));
}

/**
 * Draw the levels of a recording so far, each at its time on an axis of HEARD seconds.
 * @param {HTMLCanvasElement} canvas
 * @param {{time: number, level: number}[]} levels
 */
export function drawLevels(canvas, levels) {
  const { context, width, height } = prepare(canvas);
  const colours = palette();
  context.fillStyle = colours.line;
  context.fillRect(0, height / 2 - 0.5, width, 1);
  context.fillStyle = colours.record;
  for (const { time, level } of levels) {
    const tall = Math.max(1, Math.sqrt(level) * (height - 4)); // a root, so that quiet sounds are seen to be heard
    context.fillRect((time / HEARD) * width, (height - tall) / 2, 2, tall);
  }
}
