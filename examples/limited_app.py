"""A small Starlette application behind the gate: `python examples/limited_app.py [--port N] [--host H]`.

The limits are in limited_app.toml, beside this file. The page shows what is left of the visitor's own quota.
"""

from __future__ import annotations

import argparse
import hmac
import json
import math
import socket
import sys
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from gatekeeper import Gatekeeper, SettingsError
from gatekeeper.asgi import GatekeeperMiddleware
from gatekeeper.ticket import Charge, Ticket

SETTINGS = Path(__file__).with_name("limited_app.toml")
RIGHT = "correct"
LONGEST_BODY = 4096
UNITS = (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1))


def make_app(keeper: Gatekeeper) -> Starlette:
    return Starlette(
        routes=[
            Route("/", page),
            Route("/quota", quota),
            Route("/login", login, methods=["POST"]),
        ],
        middleware=[Middleware(GatekeeperMiddleware, keeper)],
    )


async def page(request: Request) -> Response:
    """The quota of this visitor, as the gate has just counted it: this request is in it."""
    ticket: Ticket = request.scope["gatekeeper"]
    meters = "".join(
        METER.substitute(escaped(shown(charge)), span=span(window(charge))) for charge in ticket.charges
    )
    return HTMLResponse(
        PAGE.substitute(address=escape(ticket.address), meters=meters),
        headers={"cache-control": "no-store", "content-security-policy": CONTENT_POLICY},
    )


async def quota(request: Request) -> Response:
    return JSONResponse(told(request.scope["gatekeeper"]), headers={"cache-control": "no-store"})


async def login(request: Request) -> Response:
    """A try that the gate let through. The sixth of a minute is answered before it comes here."""
    right = hmac.compare_digest((await password(request)).encode(), RIGHT.encode())
    status, detail = (200, "Welcome.") if right else (401, "Wrong password.")
    return JSONResponse({"detail": detail, **told(request.scope["gatekeeper"])}, status)


async def password(request: Request) -> str:
    """The password of a JSON body or a form; empty if there is none."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_BODY:
            return ""
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            found = json.loads(body)["password"]
            return found.encode("utf-8", "replace").decode() if isinstance(found, str) else ""
        return parse_qs(body.decode())["password"][0]
    except (LookupError, TypeError, ValueError, RecursionError):
        return ""


def told(ticket: Ticket) -> dict[str, Any]:
    tightest = ticket.tightest
    return {
        "address": ticket.address,
        "tightest": tightest.limit.name if tightest is not None else None,
        "limits": [shown(charge) for charge in ticket.charges],
    }


def shown(charge: Charge) -> dict[str, Any]:
    """One limit, in whole seconds as the RateLimit fields tell it."""
    verdict = charge.verdict
    return {
        "name": charge.limit.name,
        "limit": verdict.limit,
        "window": window(charge),
        "remaining": verdict.remaining,
        "reset_after": math.ceil(verdict.reset_after),
    }


def window(charge: Charge) -> int:
    return round(charge.limit.algorithm.window_ns / 1e9)


def span(seconds: int) -> str:
    """A length of time as one says it after "any": "minute", "90 seconds"."""
    unit, size = next((unit, size) for unit, size in UNITS if seconds % size == 0)
    return unit if seconds == size else f"{seconds // size} {unit}s"


def escaped(values: dict[str, Any]) -> dict[str, str]:
    return {name: escape(str(value)) for name, value in values.items()}


CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

METER = Template("""
    <div class="meter" data-name="$name" data-limit="$limit" data-window="$window" data-remaining="$remaining"
         data-reset="$reset_after">
      <div class="line"><span class="name">$name</span>
        <span class="left"><b>$remaining</b> of $limit left</span></div>
      <div class="bar"><i></i></div>
      <div class="line note"><span class="promise">at most $limit in any $span</span>
        <span class="grows"></span></div>
    </div>""")

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Gatekeeper: what is left of your quota</title>
<link rel="icon" href="data:,">
<style>
  :root { --ink: #1c2430; --soft: #5b6675; --paper: #f4f5f7; --card: #fff; --line: #dde1e7;
          --good: #20805a; --low: #b26a00; --none: #c2352b; --act: #2456c4; --on-act: #fff }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6e9ee; --soft: #9aa5b4; --paper: #14181e; --card: #1d232c; --line: #333c48;
            --good: #4cc38a; --low: #f0b04a; --none: #ff7b72; --act: #8db0ff; --on-act: #10203f }
  }
  * { box-sizing: border-box }
  body { margin: 0; background: var(--paper); color: var(--ink);
         font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
  main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem }
  h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 }
  h2 { font-size: 1.05rem; margin: 0 0 .75rem }
  p { margin: .4rem 0 }
  section > p:last-child { margin-bottom: 0 }
  #looks { margin-top: 1rem }
  code, td, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
                    font-size: .9em }
  .note { color: var(--soft); font-size: .875rem }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
            padding: 1.25rem; margin-top: 1.25rem; min-width: 0 }
  .meter + .meter { margin-top: 1.1rem }
  .line { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 0 1rem }
  .name { font-weight: 600 }
  .left { font-variant-numeric: tabular-nums }
  .left b { font-size: 1.5rem; line-height: 1.2; color: var(--tone) }
  .bar { height: .6rem; border-radius: .3rem; background: var(--line); overflow: hidden; margin: .3rem 0 }
  .bar i { display: block; height: 100%; width: 0; background: var(--tone); border-radius: inherit;
           transition: width .3s }
  .meter { --tone: var(--good) }
  .meter.low { --tone: var(--low) }
  .meter.none { --tone: var(--none) }
  .grows { font-variant-numeric: tabular-nums }
  form { display: flex; flex-wrap: wrap; gap: .6rem; align-items: end }
  label { display: grid; gap: .2rem; flex: 1 1 11rem; font-size: .875rem; color: var(--soft) }
  input, button { font: inherit; line-height: 1.5; height: 2.6rem; padding: 0 .8rem;
                  border-radius: 8px; border: 1px solid var(--line) }
  input { background: var(--paper); color: var(--ink); width: 100%; min-width: 0 }
  button { background: transparent; color: var(--act); border-color: var(--act); cursor: pointer }
  button.first { background: var(--act); color: var(--on-act) }
  button:disabled { opacity: .55; cursor: default }
  :focus-visible { outline: 2px solid var(--act); outline-offset: 2px }
  .scroll { overflow-x: auto; margin-top: 1rem }
  table { border-collapse: collapse; width: 100%; white-space: nowrap; font-size: .875rem }
  th { text-align: left; font-weight: 600; color: var(--soft) }
  th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
  tr:last-child td { border-bottom: 0 }
  td:last-child { white-space: normal; min-width: 15rem; padding-right: 0 }
  .s2 { color: var(--good) } .s4 { color: var(--low) } .s429 { color: var(--none); font-weight: 700 }
  @media (prefers-reduced-motion: reduce) { .bar i { transition: none } }
</style>
</head>
<body>
<main>
  <h1>What is left of your quota</h1>
  <p class="note">You are <code>$address</code>. Each address has a quota of its own.</p>

  <section aria-labelledby="limits">
    <h2 id="limits">Limits</h2>
    <div id="meters">$meters
    </div>
    <p class="note" id="looks">This page was one request.</p>
  </section>

  <section aria-labelledby="try">
    <h2 id="try">Try to log in</h2>
    <form method="post" action="/login">
      <label>Password <input name="password" type="password" value="wrong" autocomplete="off"></label>
      <button class="first">Log in</button>
      <button type="button" id="six">Six in a row</button>
    </form>
    <p class="note">The password is <code>correct</code>. Five attempts a minute reach the application, right or
      wrong; the sixth is answered 429 at the gate.</p>
    <div class="scroll" id="log" hidden>
      <table>
        <thead><tr><th>Status</th><th>RateLimit</th><th>Retry-After</th><th>Answer</th></tr></thead>
        <tbody aria-live="polite"></tbody>
      </table>
    </div>
  </section>
</main>
<script>
"use strict";
const EVERY = 5000;  // milliseconds between looks; each look is a request and is counted
const meters = new Map();
const box = document.getElementById("meters"), looks = document.getElementById("looks");

function span(seconds) {
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]])
    if (seconds % size === 0) return seconds === size ? unit : seconds / size + " " + unit + "s";
}

function draw(m) {
  const part = m.limit ? Math.min(1, m.remaining / m.limit) : 0;
  m.at.className = "meter" + (m.remaining <= 0 ? " none" : part <= 0.25 ? " low" : "");
  m.at.querySelector(".left b").textContent = m.remaining;
  m.at.querySelector(".bar i").style.width = 100 * part + "%";
  const seconds = Math.ceil((m.grows - performance.now()) / 1000);
  m.at.querySelector(".grows").textContent =
    m.remaining >= m.limit ? "" : seconds <= 0 ? "has grown since" :
    "grows in " + (seconds > 120 ? Math.ceil(seconds / 60) + " min" : seconds + " s");
}

function know(name, limit, window_, remaining, reset) {
  let m = meters.get(name);
  if (!m) {
    const at = box.querySelector(".meter").cloneNode(true);
    at.querySelector(".name").textContent = name;
    at.querySelector(".left").lastChild.textContent = " of " + limit + " left";
    at.querySelector(".promise").textContent = "at most " + limit + " in any " + span(window_);
    box.append(at);
    meters.set(name, m = {at});
  }
  Object.assign(m, {limit, remaining, grows: performance.now() + 1000 * reset});
  draw(m);
}

// Every answer tells, refusals too: RateLimit the tightest limit, RateLimit-Policy all of them.
function read(answer) {
  const policy = answer.headers.get("ratelimit-policy") || "", left = answer.headers.get("ratelimit") || "";
  const now = left.match(/^"([^"]+)";r=(\\d+);t=(\\d+)/);
  if (!now) return;
  for (const [, name, q, w] of policy.matchAll(/"([^"]+)";q=(\\d+);w=(\\d+)/g))
    if (name === now[1]) know(name, +q, +w, +now[2], +now[3]);
}

async function look() {
  let wait = EVERY;
  if (!document.hidden) try {
    const answer = await fetch("/quota", {headers: {accept: "application/json"}, cache: "no-store"});
    read(answer);
    if (answer.ok) {
      for (const l of (await answer.json()).limits) know(l.name, l.limit, l.window, l.remaining, l.reset_after);
      looks.textContent = "Looking costs too: the page asks every five seconds, and each look is one request.";
    } else if (answer.status === 429) {
      wait = Math.max(1000, 1000 * answer.headers.get("retry-after"));
      looks.textContent = "Even looking is refused now. The page asks again in " + wait / 1000 + " s.";
    }
  } catch { looks.textContent = "The server does not answer."; }
  setTimeout(look, wait);
}

async function attempt(password) {
  const answer = await fetch("/login", {method: "POST", body: JSON.stringify({password}),
    headers: {"content-type": "application/json", accept: "application/json"}});
  read(answer);
  const body = await answer.json();
  for (const l of body.limits || []) know(l.name, l.limit, l.window, l.remaining, l.reset_after);
  const row = document.createElement("tr");
  for (const text of [answer.status, answer.headers.get("ratelimit") || "", answer.headers.get("retry-after") || "",
                      body.detail || body.title]) row.insertCell().textContent = text;
  row.cells[0].className = answer.status === 429 ? "s429" : answer.ok ? "s2" : "s4";
  document.querySelector("#log tbody").prepend(row);
  document.getElementById("log").hidden = false;
}

async function attempts(count) {
  const buttons = document.querySelectorAll("button");
  buttons.forEach(button => button.disabled = true);
  try { while (count--) await attempt(document.querySelector("input").value); }
  catch { looks.textContent = "The server does not answer."; }
  buttons.forEach(button => button.disabled = false);
}

for (const at of box.children) {
  const d = at.dataset;
  meters.set(d.name, {at});
  know(d.name, +d.limit, +d.window, +d.remaining, +d.reset);
}
document.querySelector("form").addEventListener("submit", event => { event.preventDefault(); attempts(1); });
document.getElementById("six").addEventListener("click", () => attempts(6));
setInterval(() => meters.forEach(draw), 500);
setTimeout(look, EVERY);
</script>
</body>
</html>
""")


def greeting(base: str) -> str:
    return f"""\
Serving {base}/ with the settings of {SETTINGS.name}. Ctrl-C stops.

Six logins in a loop; the sixth is answered 429, with its fields and a problem body:
  for i in 1 2 3 4 5; do curl -s -d password=wrong {base}/login; echo; done; curl -si -d password=wrong {base}/login

Another address is another client, and not limited (Linux):
  curl -si --interface 127.0.0.2 -d password=wrong {base}/login

The fields on an ordinary response:
  curl -si {base}/quota
"""


def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 65536):
        raise argparse.ArgumentTypeError("expected a number from 0 to 65535")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="A small application behind Gatekeeper.")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8080, help="0 takes a free one (default: %(default)s)")
    options = parser.parse_args()
    try:
        app = make_app(Gatekeeper(SETTINGS))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    host, port = options.host, options.port
    try:
        # Bound here and not by the server, so that a free port is known before the first request.
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        print(f"cannot listen on {host} port {port}: {reason} (--port takes another)", file=sys.stderr)
        return 1
    port = listener.getsockname()[1]
    shown_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # told, not bound
    base = f"http://[{shown_host}]:{port}" if ":" in shown_host else f"http://{shown_host}:{port}"
    # proxy_headers=False: the gate decides whose X-Forwarded-For is believed, and nobody else before it.
    config = uvicorn.Config(app, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=3)
    try:
        print(greeting(base), flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn has ended in good order, and raises the signal once more
    finally:
        listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
