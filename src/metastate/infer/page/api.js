// The server's routes: calls, streams, and errors that a person can read.

const KEY = "metastate-key";

export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

export class ApiError extends Error {
  constructor(message, code = "") {
    super(message);
    this.code = code; // the server's own word for what went wrong
  }
}

/** Send a request; return the Response, or throw an ApiError that says what the server said. */
export async function call(path, { method = "GET", json, body, signal } = {}) {
  const headers = {};
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  if (json !== undefined) headers["Content-Type"] = "application/json";
  if (body !== undefined) headers["Content-Type"] = "application/octet-stream";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body ?? (json && JSON.stringify(json)), signal });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  if (response.status === 401) return new ApiError("This server wants an API key: give it at the top of the page.");
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // something between the page and the server answered, not in JSON
  }
  return new ApiError(error.message ?? `The server answered ${response.status} ${response.statusText}.`, error.code);
}

/** Yield the objects of a streamed completion as they come. */
export async function* stream(body, signal) {
  const response = await call("v1/completions", { method: "POST", json: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      signal.throwIfAborted(); // what was on its way when the reader stopped is not wanted
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, event.error.code);
        yield event;
      }
    }
  } catch (cause) {
    if (cause.name === "AbortError" || cause instanceof ApiError) throw cause;
    throw new ApiError("The stream broke off: the server went away.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("The stream broke off before its end.");
}

/** Make an element: properties as given, children as nodes or text. Text never becomes HTML. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Show an error in a `.problem` paragraph; nothing hides it again. */
export function showProblem(paragraph, message = "") {
  paragraph.textContent = message;
  paragraph.hidden = !message;
}

export const count = (n) => n.toLocaleString("en");

export function bytes(n) {
  if (n < 10_000) return `${count(n)} bytes`;
  const [unit, size] = n < 1e6 ? ["kB", 1e3] : n < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return `${(n / size).toLocaleString("en", { maximumSignificantDigits: 3 })} ${unit}`;
}
