# No `from __future__ import annotations`: FastAPI reads those of endpoints.
"""A shop on FastAPI behind the gate: `uvicorn examples.fastapi_shop:app`. Its routes: http://127.0.0.1:8000/docs

- the whole application: 300 requests a minute for each client, a rule of the settings that the middleware charges
- a router: 20 a minute for each client and route; a route of it: two reports a minute for each user
- signing in: five wrong passwords a minute for each name; who signs in is forgiven
- an endpoint that answers as language models do: it costs what it has really cost, once that is known
- a WebSocket: two at a time for each client, and 30 messages a minute on it

To try: `for i in 1 2 3; do curl -i -H 'Authorization: Bearer ada-secret' localhost:8000/items/report; done`
"""

import asyncio
import hmac
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

from gatekeeper import Gatekeeper, Ticket
from gatekeeper_fastapi import GatekeeperMiddleware, RateLimit, RateLimited, document, limited_handler

TOKENS = {"ada-secret": "ada", "bob-secret": "bob"}
PASSWORDS = {"ada": "correct", "bob": "horse"}


def user_of(request: Ticket) -> str | None:
    """Who is asking: for keys `user`, wherever the limit stands."""
    scheme, _, token = (request.field("authorization") or "").partition(" ")
    return TOKENS.get(token) if scheme.lower() == "bearer" else None


keeper = Gatekeeper(
    {
        "identity": {"user": user_of},
        "limits": [
            {"name": "site", "rate": "300/minute"},
            {"name": "talk", "rate": "30/minute", "match": "/chat", "per": "message"},
        ],
    }
)

app = FastAPI(title="Shop")
app.add_middleware(GatekeeperMiddleware, settings=keeper)
# Added last, so that it stands outermost: scripts of other origins can read refusals, too.
app.add_middleware(
    CORSMiddleware, allow_origins=["https://shop.example"], expose_headers=["RateLimit", "Retry-After"]
)
app.add_exception_handler(RateLimited, limited_handler)
document(app)

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def signed_in(credentials: Credentials) -> str:
    user = TOKENS.get(credentials.credentials) if credentials is not None else None
    if user is None:
        raise HTTPException(401, "Sign in first.", {"WWW-Authenticate": "Bearer"})
    return user


User = Annotated[str, Depends(signed_in)]


@app.get("/")
async def index(left: Annotated[Ticket, Depends(RateLimit("60/minute", name="index"))]) -> dict[str, int]:
    """What is left, as the response's fields say, too."""
    return {charge.limit.name: charge.verdict.remaining for charge in left.charges}


class Login(BaseModel):
    name: str
    password: str


failures = RateLimit(
    "5/minute", name="login", key="json:name", give_back=["2xx", "422"], reset_on="2xx", on_error="deny"
)


@app.post("/login", dependencies=[Depends(failures)])
async def login(given: Login) -> dict[str, str]:
    right = PASSWORDS.get(given.name, "")
    if not right or not hmac.compare_digest(right.encode(), given.password.encode()):
        raise HTTPException(401, "Wrong name or password.")
    (token,) = (token for token, name in TOKENS.items() if name == given.name)
    return {"token": token}


items = APIRouter(prefix="/items", dependencies=[Depends(RateLimit("20/minute"))])


@items.get("/report", dependencies=[Depends(RateLimit("2/minute", key="user", name="report"))])
def report(user: User) -> str:
    """It costs much to make."""
    return f"A report for {user}."


@items.get("/{number}")
async def item(number: int) -> dict[str, int]:
    return {"item": number}


app.include_router(items)

tokens = RateLimit("1000/minute", name="tokens", key="user", cost=100, settle="app")


class Question(BaseModel):
    text: str


@app.post("/ask")
async def ask(user: User, question: Question, ticket: Annotated[Ticket, Depends(tokens)]) -> StreamingResponse:
    """100 tokens are reserved; what the answer has really cost is charged when it has ended."""

    async def answer() -> AsyncIterator[str]:
        words = f"{user} asks: {question.text}".split()
        try:
            for word in words:
                yield f"{word} "
                await asyncio.sleep(0)
        finally:
            ticket.settle(10 * len(words))

    return StreamingResponse(answer(), media_type="text/plain")


@app.websocket("/chat", dependencies=[Depends(RateLimit(concurrency=2, name="chats"))])
async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text.upper())
