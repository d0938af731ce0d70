// The line under a form: which state its task is in, and for how long it has been on its way.

const SPOKEN = {
  queued: "Queued",
  running: "Running",
  awaiting: "Waiting for the answer",
};

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(milliseconds < 10_000 ? 2 : 1)} s`;
}

export class Progress {
  constructor(name) {
    this.line = document.getElementById(`${name}-progress`);
    this.problem = document.getElementById(`${name}-problem`);
    this.elapsed = this.line.querySelector(".elapsed");
    this.spoken = this.line.querySelector(".spoken");
  }

  start() {
    this.problem.textContent = "";
    this.startedAt = performance.now();
    this.show("queued");
    this.tick();
  }

  show(state) {
    if (this.line.dataset.state === state) return;
    this.line.dataset.state = state;
    if (SPOKEN[state]) this.spoken.textContent = SPOKEN[state];
  }

  succeed(sentence) {
    this.end("done");
    this.spoken.textContent = sentence;
  }

  fail(error) {
    this.end("failed");
    this.spoken.textContent = "";
    const kind = error.type ?? error.name;
    this.problem.textContent = kind === "BadInput" ? error.message : `${kind}: ${error.message}`;
  }

  tick() {
    this.elapsed.textContent = seconds(performance.now() - this.startedAt);
    this.frame = requestAnimationFrame(() => this.tick());
  }

  end(state) {
    cancelAnimationFrame(this.frame);
    this.elapsed.textContent = seconds(performance.now() - this.startedAt);
    this.show(state);
  }
}
