/** The page: adding one or two clips, asking about them, and showing the answer while it is written. */

import { HEARD, SoundError, decode } from "./audio.js";
import { ServerError, answer, models } from "./chat.js";
import { Clip } from "./clip.js";
import { drawLevels } from "./plot.js";
import { MicrophoneError, Recording } from "./record.js";

const MOST_CLIPS = 2;
const KEPT_ANSWERS = 12;

/** Questions of the kinds that the model is trained on, by how many clips they are about. */
const EXAMPLES = {
  1: [
    "Caption the audio.",
    "What is happening in the background?",
    "Is there speech in the audio?",
    "Which sound is the loudest?",
    "Where was this recorded? a) indoors b) outdoors",
    "Is the hypothesis true? An animal is heard.",
  ],
  2: [
    "Explain the difference between the two audios in a few words.",
    "Explain the difference between the two audios in detail.",
    "Is the same sound in both audios?",
    "In which audio is the sound louder? a) the first b) the second",
    "Which audio is calmer?",
  ],
};

const $ = (id) => document.getElementById(id);
const FINGERS = matchMedia("(pointer: coarse)").matches; // nothing to drop files with
const clips = [];
let asking = null; // the AbortController of the question that is being answered
let recording = null;
let shown = null; // {question, about, text} of the answer on the page
let retry = null; // what to do again once there is a key

// Clips ---------------------------------------------------------------------------------------------------------------

let adding = Promise.resolve(); // files are read one after another, so that they keep their order

/** Add files as clips, or put the only one in the place of the clip `instead`. */
function add(files, instead = null) {
  adding = adding.then(() => addNow([...files], instead));
  return adding;
}

async function addNow(files, instead) {
  $("sound-error").textContent = "";
  const free = instead ? 1 : MOST_CLIPS - clips.length;
  const errors = [];
  for (const file of files.slice(0, free)) {
    $("sound-status").textContent = `Reading ${file.name}…`;
    try {
      const clip = new Clip(file.name, await decode(file), remove);
      if (instead) {
        clips.splice(clips.indexOf(instead), 1, clip);
        instead.remove();
      } else {
        clips.push(clip);
      }
      arrange();
    } catch (error) {
      if (!(error instanceof SoundError)) throw error;
      errors.push(`${file.name}: ${error.message}`);
    } finally {
      $("sound-status").textContent = "";
    }
  }
  if (files.length > free) {
    errors.push(
      free
        ? `The model hears two clips at most: ${files.length - free} of these ${files.length} were left out.`
        : "There are two clips already: remove one first, or drop the file on the one to replace.",
    );
  }
  $("sound-error").textContent = errors.join(" ");
}

function remove(clip) {
  const at = clips.indexOf(clip);
  clips.splice(at, 1);
  clip.remove();
  arrange();
  (clips[0] ?? { focus: () => $("file").focus() }).focus(); // the focused button is gone
}

/** Show what depends on which clips there are. */
function arrange() {
  // Both clips on one scale of seconds, so that they can be compared.
  const axis = Math.max(...clips.map((clip) => clip.seconds));
  const places = clips.length > 1 ? ["First", "Second"] : [""];
  $("clips").classList.toggle("two", clips.length > 1);
  clips.forEach((clip) => $("clips").append(clip.element));
  if (clips.length > 1) clips[1].element.before($("swap"));
  clips.forEach((clip, i) => clip.arrange(places[i], axis));
  $("swap").hidden = clips.length < MOST_CLIPS;
  $("adder").hidden = clips.length === MOST_CLIPS || recording !== null;
  $("adder").classList.toggle("second", clips.length > 0);
  $("adder-title").textContent = clips.length
    ? "Add a second one to compare"
    : `${FINGERS ? "Add a sound" : "Drop a sound here"}, or two to compare`;
  $("adder-hint").hidden = clips.length > 0;
  showExamples();
  if (!asking) archive();
}

$("file").addEventListener("change", () => {
  const files = [...$("file").files];
  $("file").value = ""; // the same file may be picked again
  add(files);
});

$("swap").addEventListener("click", () => {
  clips.reverse();
  arrange();
  $("swap").focus();
});

let drags = 0; // entering a child comes before leaving its parent
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
const showDrag = () => document.body.classList.toggle("dragging", drags > 0);
addEventListener("dragenter", (event) => {
  if (holdsFiles(event)) drags++;
  showDrag();
});
addEventListener("dragleave", (event) => {
  if (holdsFiles(event)) drags--;
  showDrag();
});
addEventListener("dragover", (event) => {
  if (holdsFiles(event)) event.preventDefault(); // else the browser leaves the page to open the file
});
addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  drags = 0;
  showDrag();
  const { files } = event.dataTransfer;
  const onto = clips.find((clip) => clip.element.contains(event.target));
  add(files, files.length === 1 && clips.length === MOST_CLIPS ? onto : null);
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => clips.forEach((clip) => clip.draw()));

// Recording -----------------------------------------------------------------------------------------------------------

let recorded = 0;
let permitting = false; // while the browser asks for permission

$("record").addEventListener("click", async () => {
  if (permitting) return;
  permitting = true;
  $("sound-error").textContent = "";
  const levels = [];
  try {
    recording = await Recording.start(HEARD, (time, level) => {
      levels.push({ time, level });
      drawLevels($("meter"), levels);
      $("countdown").textContent = `${(HEARD - time).toFixed(1)} s left`;
    });
  } catch (error) {
    if (!(error instanceof MicrophoneError)) throw error;
    $("sound-error").textContent = error.message;
    return;
  } finally {
    permitting = false;
  }
  $("adder").hidden = true;
  $("recorder").hidden = false;
  $("record-stop").focus();
  const file = await recording.finished;
  recording = null;
  const hadFocus = $("recorder").contains(document.activeElement);
  $("recorder").hidden = true;
  $("adder").hidden = clips.length === MOST_CLIPS;
  if (file) {
    const before = clips.length;
    await add([new File([file], `Recording ${++recorded}`)]);
    if (hadFocus && clips.length > before) clips.at(-1).focus();
  } else if (hadFocus) {
    $("record").focus();
  }
});
$("record-stop").addEventListener("click", () => recording?.stop());
$("record-discard").addEventListener("click", () => recording?.discard());

// Questions -----------------------------------------------------------------------------------------------------------

function showExamples() {
  const about = Math.max(1, clips.length);
  $("examples-title").textContent = about > 1 ? "Questions about two sounds" : "Questions to begin with";
  if ($("examples").dataset.about === String(about)) return; // keeps focus where it is
  $("examples").dataset.about = about;
  $("examples").replaceChildren(
    ...EXAMPLES[about].map((question) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.textContent = question;
      chip.addEventListener("click", () => fill(question));
      return chip;
    }),
  );
}

function fill(question) {
  $("question").value = question;
  fit();
}

/** Let the field be as tall as its text. */
function fit() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

$("question").addEventListener("input", fit);

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => asking?.abort());

addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  } else if (event.key === "Escape") {
    if (recording) recording.discard();
    else asking?.abort();
  }
});

async function ask() {
  if (asking) return;
  const question = $("question").value.trim();
  $("answer-error").textContent = "";
  if (!clips.length) return complain("Add a sound first: choose a file, drop one, or record.", $("file"));
  if (!question) return complain("Write a question first, or pick one of the examples.", $("question"));

  archive();
  const about = clips.map((clip) => clip.name).join(" and ");
  shown = { question, about, text: "" };
  asking = new AbortController();
  showAsking(true);
  const started = performance.now();
  const since = () => `${((performance.now() - started) / 1000).toFixed(2)} s`;
  let first = null;
  let ending = "stopped";
  try {
    const data = await Promise.all(clips.map((clip) => clip.data()));
    if (!$("model").value) await loadModels();
    const what = { model: $("model").value, question, clips: data, key: key(), signal: asking.signal };
    for await (const { text, finish } of answer(what)) {
      if (text && first === null) {
        first = since();
        $("answer").textContent = "";
      }
      shown.text += text;
      $("answer").append(shown.text === text ? text.trimStart() : text);
      if (finish) ending = finish === "length" ? "cut short: the answer reached its longest" : "";
    }
    if (!shown.text.trim()) $("answer").textContent = "The model had nothing to say.";
  } catch (error) {
    if (error.name !== "AbortError") {
      ending = "broken off";
      fail(error, ask);
    }
    if (first === null) $("answer").textContent = ending === "stopped" ? "Stopped before the first word." : "";
  } finally {
    asking = null;
    showAsking(false);
  }
  const facts = [`first word after ${first}`, `${since()} in all`, ending];
  if (first !== null) $("answer-facts").textContent = facts.filter(Boolean).join(" · ");
}

/** Say what is missing, and lead there. */
function complain(message, field) {
  $("answer-error").textContent = message;
  field.focus();
}

function showAsking(busy) {
  // Read out when it is complete, not word by word.
  $("answer").setAttribute("aria-busy", busy);
  $("answer").classList.toggle("writing", busy);
  const stopping = document.activeElement === $("stop");
  $("stop").hidden = !busy;
  // Not `disabled`, which would take the focus away from whoever just pressed it.
  $("ask").setAttribute("aria-disabled", busy);
  if (!busy) {
    if (stopping) $("ask").focus();
    return;
  }
  $("answer-about").textContent = shown.question;
  $("answer").textContent = "Listening…";
  $("answer-facts").textContent = "";
  if ($("answer").getBoundingClientRect().top > 0.75 * innerHeight) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("answer").scrollIntoView({ block: "center", behavior: calm ? "auto" : "smooth" }); // with room to grow below
  }
}

/** Move the answer on the page, if there is one, to the earlier ones. */
function archive() {
  if (shown?.text.trim()) {
    const { question, about, text } = shown;
    const item = $("earlier-template").content.firstElementChild.cloneNode(true);
    item.querySelector(".about").textContent = `${question} (${about})`;
    item.querySelector(".answer").textContent = text.trim();
    item.querySelector(".unseen").textContent = `: ${question}`;
    item.querySelector(".again").addEventListener("click", () => {
      fill(question);
      ask();
    });
    $("earlier").prepend(item);
    while ($("earlier").children.length > KEPT_ANSWERS) $("earlier").lastElementChild.remove();
    $("earlier-row").hidden = false;
  }
  shown = null;
  for (const id of ["answer", "answer-about", "answer-error", "answer-facts"]) $(id).textContent = "";
}

// The server ----------------------------------------------------------------------------------------------------------

const KEY = "mellow-key";
const key = () => sessionStorage.getItem(KEY);

async function loadModels() {
  const names = await models(key());
  $("model").replaceChildren(...names.map((name) => new Option(name)));
  $("model-field").hidden = names.length < 2;
}

/** Show what went wrong; where a key is missing, ask for it and then do `again`. */
function fail(error, again) {
  if (error.status !== 401) {
    if (!(error instanceof ServerError)) console.error(error); // a fault of this page
    $("answer-error").textContent = error.message;
    return;
  }
  retry = again;
  $("key-message").textContent = key()
    ? "The server did not take this key. Is it complete?"
    : "This server answers only those who have a key.";
  $("key-row").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key-row").hidden = true;
  $("ask").focus();
  await loadModels().then(retry).catch((error) => fail(error, retry));
});

/** What opens the page: nothing to retry but the list itself. */
function begin() {
  const apple = /Mac|iPhone|iPad/.test(navigator.platform);
  $("shortcut").textContent = apple ? "⌘ Enter" : "Ctrl + Enter";
  arrange();
  loadModels().catch((error) => fail(error, () => {}));
}

begin();
