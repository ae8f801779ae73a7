/** Sound as numbers: decoding files to what the model hears, writing WAV, and the spectrogram that is shown. */

/** Samples a second that the model hears. */
export const RATE = 32_000;
/** Seconds that the model hears. */
export const HEARD = 10;

/** Bytes of a file: decoded, it takes many times as much memory, and a phone's tab ends without a word. */
const LARGEST = 64e6;

/** A file that cannot be used as a sound; the message is for people and names the fault, not the file. */
export class SoundError extends Error {}

/**
 * Decode a file (whatever container the browser knows) to one channel at RATE, of which at most HEARD seconds are kept.
 * @param {Blob} file
 * @returns {Promise<{samples: Float32Array, seconds: number}>} the samples and how long the whole recording is
 */
export async function decode(file) {
  if (file.size === 0) throw new SoundError("the file is empty.");
  if (file.size > LARGEST) {
    const size = Math.round(file.size / 1e6);
    throw new SoundError(`${size} MB is too much for a browser; the limit is ${LARGEST / 1e6} MB.`);
  }
  // An offline context resamples while it decodes, and needs no permission to play.
  const context = new OfflineAudioContext(1, 1, RATE);
  let decoded;
  try {
    decoded = await context.decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new SoundError("your browser cannot read this as sound. Try wav, mp3, flac, ogg or m4a.");
  }
  if (decoded.length === 0) throw new SoundError("there is no sound in this file.");
  return { samples: mono(decoded, Math.min(decoded.length, RATE * HEARD)), seconds: decoded.duration };
}

/** The average of the channels, as the server mixes them too. */
function mono(buffer, length) {
  const mixed = new Float32Array(length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    const samples = buffer.getChannelData(channel);
    for (let i = 0; i < length; i++) mixed[i] += samples[i] / buffer.numberOfChannels;
  }
  return mixed;
}

/** `samples` as a 16-bit WAV file at RATE. */
export function wav(samples) {
  const bytes = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const ascii = (at, text) => [...text].forEach((letter, i) => bytes.setUint8(at + i, letter.charCodeAt(0)));
  ascii(0, "RIFF");
  bytes.setUint32(4, 36 + 2 * samples.length, true);
  ascii(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true); // bytes of the format that follows
  bytes.setUint16(20, 1, true); // PCM
  bytes.setUint16(22, 1, true); // channels
  bytes.setUint32(24, RATE, true);
  bytes.setUint32(28, 2 * RATE, true); // bytes a second
  bytes.setUint16(32, 2, true); // bytes a frame
  bytes.setUint16(34, 16, true); // bits a sample
  ascii(36, "data");
  bytes.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => {
    // Chromium decodes with these two factors, so that a 16-bit file at RATE comes out as it went in.
    const value = Math.round(sample * (sample < 0 ? 32_768 : 32_767));
    bytes.setInt16(44 + 2 * i, Math.max(-32_768, Math.min(32_767, value)), true);
  });
  return new Blob([bytes], { type: "audio/wav" });
}

/** @param {Blob} blob @returns {Promise<string>} its bytes in base64 */
export function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader(); // btoa would need the bytes as a string first
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Loudest sample, 0 to 1. */
export function peak(samples) {
  return samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
}

// The model's own window, hop, range and (Slaney's) mel scale. It sees 64 bands; the picture has more and a longer
// transform, only so that it is smooth.
const WINDOW = 1024;
const HOP = 320;
const TRANSFORM = 2048;
const BANDS = 160;
/** Frequencies that the model hears, in Hz. */
export const LOWEST = 50;
export const HIGHEST = 14_000;

/** Slaney's mel scale: straight up to 1 kHz, logarithmic above. */
export function mel(hertz) {
  return hertz < 1000 ? (3 * hertz) / 200 : 15 + (27 * Math.log(hertz / 1000)) / Math.log(6.4);
}

function hertz(mels) {
  return mels < 15 ? (200 * mels) / 3 : 1000 * Math.exp(((mels - 15) * Math.log(6.4)) / 27);
}

/**
 * Power of `samples` in mel bands.
 * @returns {{frames: number, bands: number, decibels: Float32Array}} [frame][band], from low to high frequencies
 */
export function spectrogram(samples) {
  const frames = 1 + Math.floor(samples.length / HOP);
  const decibels = new Float32Array(frames * BANDS);
  const hann = Float32Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
  const fft = new FFT(TRANSFORM);
  const edges = bandEdges();
  // Running sums over the bins make the mean of a band two look-ups, and can be read between bins too.
  const sums = new Float64Array(TRANSFORM / 2 + 2);
  const sumTo = (bin) => {
    const whole = Math.floor(bin);
    return sums[whole] + (bin - whole) * (sums[whole + 1] - sums[whole]);
  };
  for (let frame = 0; frame < frames; frame++) {
    fft.real.fill(0);
    fft.imaginary.fill(0);
    const start = frame * HOP - WINDOW / 2; // frames are centred on their time
    for (let i = 0; i < WINDOW; i++) fft.real[i] = hann[i] * (samples[start + i] ?? 0);
    fft.run();
    for (let bin = 0; bin <= TRANSFORM / 2; bin++) {
      sums[bin + 1] = sums[bin] + fft.real[bin] ** 2 + fft.imaginary[bin] ** 2;
    }
    for (let band = 0; band < BANDS; band++) {
      const [low, high] = edges[band];
      decibels[frame * BANDS + band] = 10 * Math.log10((sumTo(high) - sumTo(low)) / (high - low) + 1e-10);
    }
  }
  return { frames, bands: BANDS, decibels };
}

/** From and to which bin each band reaches; at least one bin wide, which low bands on their own are not. */
function bandEdges() {
  const [bottom, top] = [mel(LOWEST), mel(HIGHEST)];
  const bin = (band) => (hertz(bottom + ((top - bottom) * band) / BANDS) * TRANSFORM) / RATE + 0.5;
  return Array.from({ length: BANDS }, (_, band) => {
    const [low, high] = [bin(band), bin(band + 1)];
    const narrow = Math.max(0, 1 - (high - low)) / 2;
    return [low - narrow, high + narrow];
  });
}

/** Fourier transform in place, radix 2, over `real` and `imaginary` of `size` values. */
class FFT {
  constructor(size) {
    this.size = size;
    this.real = new Float32Array(size);
    this.imaginary = new Float32Array(size);
    const bits = Math.log2(size);
    this.mirrored = Uint32Array.from({ length: size }, (_, i) => {
      let mirror = 0;
      for (let bit = 0; bit < bits; bit++) mirror |= ((i >> bit) & 1) << (bits - 1 - bit);
      return mirror;
    });
    this.cosine = Float32Array.from({ length: size / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / size));
    this.sine = Float32Array.from({ length: size / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / size));
  }

  run() {
    const { size, real, imaginary, mirrored, cosine, sine } = this;
    for (let i = 0; i < size; i++) {
      const j = mirrored[i];
      if (i < j) {
        [real[i], real[j]] = [real[j], real[i]];
        [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
      }
    }
    for (let half = 1; half < size; half *= 2) {
      const stride = size / (2 * half);
      for (let block = 0; block < size; block += 2 * half) {
        for (let k = 0; k < half; k++) {
          const [even, odd] = [block + k, block + k + half];
          const [c, s] = [cosine[k * stride], sine[k * stride]];
          const re = real[odd] * c - imaginary[odd] * s;
          const im = real[odd] * s + imaginary[odd] * c;
          real[odd] = real[even] - re;
          imaginary[odd] = imaginary[even] - im;
          real[even] += re;
          imaginary[even] += im;
        }
      }
    }
  }
}
