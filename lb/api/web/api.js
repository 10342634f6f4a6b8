// The API of the daemon: JSON, problems (RFC 9457) and server-sent events. Tokens travel in a header only.

const SILENCE_MS = 45000; // three heartbeats of the daemon

export class Problem extends Error {
  // `field`: JSON Pointer of the invalid value in the body, or null. status 0: no response.
  constructor(status, detail, field = null) {
    super(detail);
    this.status = status;
    this.field = field;
  }
}

export class Api {
  constructor(token) {
    this.token = token;
  }

  // {document, etag}. Throws Problem.
  async ask(method, path, { body, ifMatch, signal } = {}) {
    const headers = this.headers();
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (ifMatch) headers["If-Match"] = ifMatch;
    const answer = await this.fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    try {
      return { document: await answer.json(), etag: answer.headers.get("ETag") };
    } catch (error) {
      throw lost(error);
    }
  }

  // Calls `on({id, kind, document})` for each event until the stream ends; `on(null)` once it is open.
  async follow(lastId, signal, on) {
    const headers = this.headers();
    if (lastId) headers["Last-Event-ID"] = lastId;
    const own = new AbortController();
    signal.addEventListener("abort", () => own.abort(), { once: true });
    const answer = await this.fetch("/v1/events", { headers, signal: own.signal });
    on(null);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    let silence;
    try {
      for (;;) {
        silence = setTimeout(() => own.abort(), SILENCE_MS);
        const { done, value } = await reader.read();
        clearTimeout(silence);
        if (done) return;
        const blocks = (text + value).split("\n\n");
        text = blocks.pop();
        blocks.map(parsed).filter(Boolean).forEach(on);
      }
    } catch (error) {
      throw lost(error);
    } finally {
      clearTimeout(silence);
    }
  }

  headers() {
    return this.token ? { Authorization: `Bearer ${this.token}` } : {};
  }

  async fetch(path, options) {
    let answer;
    try {
      answer = await fetch(path, { cache: "no-store", credentials: "omit", redirect: "error", ...options });
    } catch (error) {
      throw lost(error);
    }
    if (!answer.ok) throw await problem(answer);
    return answer;
  }
}

function lost(error) {
  return error instanceof Problem ? error : new Problem(0, "no response from the daemon");
}

async function problem(answer) {
  try {
    const { detail, field } = await answer.json();
    return new Problem(answer.status, detail, field);
  } catch {
    return new Problem(answer.status, `HTTP status ${answer.status} ${answer.statusText}`);
  }
}

function parsed(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const [, name, value] = /^(\w+): (.*)$/.exec(line) ?? [];
    if (name) fields[name] = value;
  }
  return fields.data ? { id: fields.id, kind: fields.event, document: JSON.parse(fields.data) } : null;
}

// The path of a service, or of one of its backends.
export function pathOf(vip, backend = null) {
  const service = `/v1/services/${encodeURIComponent(vip)}`;
  return backend === null ? service : `${service}/backends/${encodeURIComponent(backend)}`;
}
