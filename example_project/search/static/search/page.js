// Wires the two forms to the API. Data reaches the page through textContent only.

import { finished, post } from "./api.js";
import { Figures } from "./figures.js";
import { Progress } from "./progress.js";

const byId = (id) => document.getElementById(id);

function filled(templateId, fields) {
  const node = byId(templateId).content.firstElementChild.cloneNode(true);
  for (const [name, value] of Object.entries(fields)) {
    node.querySelector(`[data-field=${name}]`).textContent = value;
  }
  return node;
}

function hitNode({ title, text, score }) {
  const node = filled("hit", { title, text, score: score.toFixed(2) });
  node.style.setProperty("--score", Math.max(0, score).toFixed(4));
  return node;
}

function showHits(hits) {
  byId("results").replaceChildren(...hits.map(hitNode));
  byId("prompt").textContent = hits.length ? "Or try one of these:" : "The library is empty.";
}

// Run a form's task, one at a time, and show how far it is, and at its end what to say of it and
// of its call of the model. A submit meanwhile waits for its turn, and is dropped when there is
// nothing left to send.
function onSubmit(form, run) {
  const progress = new Progress(form.id);
  const figures = new Figures(form.id);
  let isBusy = false;
  let isAsked = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    isAsked = true;
    if (isBusy) return;
    isBusy = true;
    form.setAttribute("aria-busy", "true");
    while (isAsked && form.checkValidity()) {
      isAsked = false;
      progress.start();
      figures.fade();
      try {
        const { sentence, call } = await run(Object.fromEntries(new FormData(form)), progress);
        figures.show(call);
        progress.succeed(sentence);
      } catch (error) {
        figures.hide();
        progress.fail(error);
      }
    }
    isBusy = false;
    form.removeAttribute("aria-busy");
  });
}

function ask(query, progress) {
  progress.show("awaiting");
  return post("/api/ask/", { query });
}

async function sendAndPoll(query, progress) {
  const { task_id: taskId } = await post("/api/search/", { query });
  return finished(taskId, (state) => progress.show(state));
}

onSubmit(byId("search"), async ({ query, mode }, progress) => {
  // They answer another sentence, also when this one fails.
  byId("results").classList.add("stale");
  const answer = mode === "await" ? ask : sendAndPoll;
  const { results, call } = await answer(query, progress);
  showHits(results);
  byId("results").classList.remove("stale");
  return { sentence: results.length === 1 ? "One result" : `${results.length} results`, call };
});

onSubmit(byId("add"), async ({ title, text }, progress) => {
  const { steps } = await post("/api/documents/", { title, text });
  const answers = [];
  for (const step of steps) {
    answers.push(await finished(step, (state) => progress.show(state)));
  }
  const [{ call }] = answers; // the first step is the model's
  byId("shelf").prepend(filled("book", { title, text }));
  byId("count").textContent = byId("shelf").childElementCount;
  byId("shelf-empty").hidden = true;
  byId("add").reset();
  return { sentence: `${title} was added`, call };
});

for (const button of document.querySelectorAll("[data-suggestion]")) {
  button.addEventListener("click", () => {
    byId("query").value = button.textContent;
    byId("search").requestSubmit();
    byId("query").focus();
  });
}

byId("too-long").addEventListener("click", () => {
  byId("title").value = "A text that never ends";
  byId("text").value = "And then it went on for one more sentence. ".repeat(40).trim();
  byId("add").requestSubmit();
});
