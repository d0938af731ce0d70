// Wires the two forms to the API. Data reaches the page through textContent only.

import { finished, post } from "./api.js";
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

// Run a form's task, one at a time, and show how far it is. A submit meanwhile waits for its turn,
// and is dropped when there is nothing left to send.
function onSubmit(form, progress, run) {
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
      try {
        progress.succeed(await run(Object.fromEntries(new FormData(form))));
      } catch (error) {
        progress.fail(error);
      }
    }
    isBusy = false;
    form.removeAttribute("aria-busy");
  });
}

const searching = new Progress("search");
const adding = new Progress("add");

async function ask(query) {
  searching.show("awaiting");
  return (await post("/api/ask/", { query })).results;
}

async function sendAndPoll(query) {
  const { task_id: taskId } = await post("/api/search/", { query });
  return finished(taskId, (state) => searching.show(state));
}

onSubmit(byId("search"), searching, async ({ query, mode }) => {
  // They answer another sentence, also when this one fails.
  byId("results").classList.add("stale");
  const hits = await (mode === "await" ? ask(query) : sendAndPoll(query));
  showHits(hits);
  byId("results").classList.remove("stale");
  return hits.length === 1 ? "One result" : `${hits.length} results`;
});

onSubmit(byId("add"), adding, async ({ title, text }) => {
  const { steps } = await post("/api/documents/", { title, text });
  for (const step of steps) {
    await finished(step, (state) => adding.show(state));
  }
  byId("shelf").prepend(filled("book", { title, text }));
  byId("count").textContent = byId("shelf").childElementCount;
  byId("shelf-empty").hidden = true;
  byId("add").reset();
  return `${title} was added`;
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
