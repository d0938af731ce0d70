// What the last call of the model was like: measured in the worker, carried in its answer.

function duration(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  const milliseconds = seconds * 1000;
  return `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;
}

function shared(size) {
  return size === 1 ? "1 text" : `${size} texts`;
}

export class Figures {
  constructor(name) {
    this.list = document.getElementById(`${name}-figures`);
  }

  // They are those of the call before, until the next one has ended.
  fade() {
    this.list.classList.add("stale");
  }

  show({ batch_size: size, queue_wait: wait, model_time: model }) {
    // Celery's own pools form no batches, and nothing waits in a replica.
    const isBatched = size !== null;
    this.write("batch", isBatched ? shared(size) : "this pool forms none");
    this.write("wait", isBatched ? duration(wait) : "");
    this.write("model", duration(model));
    this.list.classList.remove("stale");
    this.list.hidden = false;
  }

  hide() {
    this.list.hidden = true;
  }

  write(name, text) {
    const value = this.list.querySelector(`[data-figure=${name}]`);
    value.textContent = text;
    value.parentElement.hidden = text === "";
  }
}
