// The JSON API: one function a call, and one error for whatever goes wrong.

const FIRST_PAUSE = 40;
const LONGEST_PAUSE = 500;

export class ApiError extends Error {
  constructor({ type, message }) {
    super(message);
    this.type = type;
  }
}

function csrfToken() {
  return document.querySelector("[name=csrfmiddlewaretoken]").value;
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new ApiError({ type: "Unreachable", message: "The web server does not answer." });
  }
  const isJson = (response.headers.get("Content-Type") ?? "").startsWith("application/json");
  const answer = isJson ? await response.json() : {};
  if (!response.ok) {
    const unnamed = { type: `HTTP ${response.status}`, message: "The web server failed." };
    throw new ApiError(answer.error ?? unnamed);
  }
  return answer;
}

export function post(path, body) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRFToken": csrfToken() },
    body: JSON.stringify(body),
  });
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

// Ask for a task until it has ended; short pauses first, because most answers are quick.
export async function finished(taskId, onState) {
  for (let wait = FIRST_PAUSE; ; wait = Math.min(wait * 1.3, LONGEST_PAUSE)) {
    const task = await call(`/api/tasks/${encodeURIComponent(taskId)}/`);
    if (task.state === "SUCCESS") return task.result;
    if (task.error) throw new ApiError(task.error);
    onState(task.state === "PENDING" ? "queued" : "running");
    await pause(wait);
  }
}
