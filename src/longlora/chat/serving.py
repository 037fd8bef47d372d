"""The page of `longlora chat --web`: a few routes around a `ChatModel`, its documents in memory.

    GET  /                        the page (and /style.css, /chat.js, /icon.svg: these files and no others)
    GET  /api/model               what answers, and the documents it was started with
    POST /api/documents?name=…    a file as the body; its text is kept, the file is not
    GET, DELETE /api/documents/ID
    POST /api/answers             {"question", "turns", "documents": [{"id", "section"?}]} -> server-sent events
    POST /api/answers/ID/stop
    POST /api/export              {"format", "turns", "documents": [{"name", "tokens", …}]} -> a file

A conversation lives in the browser and is sent with each question; that nothing is read twice is the business of the
prefix cache. A document's id cannot be guessed, and none is listed but those of the command line.
"""

import asyncio
import errno
import json
import logging
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from longlora.chat.answering import Reading
from longlora.chat.documents import ChatDocument, read_document
from longlora.chat.exporting import FORMATS, as_json, as_markdown
from longlora.chat.guarding import guard, is_local, set_headers
from longlora.chat.request_bodies import json_body, named_documents, plain_turns, references
from longlora.chat.session import Answer, ChatModel, ChatSession
from longlora.chat.waiting_line import WaitingLine
from longlora.errors import UserError, printable

logger = logging.getLogger(__name__)

FILES = {
    "/": ("page.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

MOST_DOCUMENTS = 200
CONVERSATION_BYTES = 8_000_000
READERS = 4
"""Documents read at a time: a long one holds up no question about another."""

_MODEL_THREAD, _READING_THREAD = "longlora-model", "longlora-reading"

Event = tuple[str, dict[str, Any]]


class Page:
    """What the routes share.

    Args:
        model: answers.
        documents: offered to everyone who opens the page.
    """

    def __init__(self, model: ChatModel, documents: Sequence[ChatDocument]) -> None:
        self.model = model
        self.documents = {secrets.token_urlsafe(16): document for document in documents}
        self._offered = list(self.documents)
        self._upload_bytes = int(model.settings.page.upload_megabytes * 1e6)
        self._line = WaitingLine()
        self._stops: dict[str, threading.Event] = {}
        self._answering = ThreadPoolExecutor(1, _MODEL_THREAD)
        self._reading = ThreadPoolExecutor(READERS, _READING_THREAD)

    @property
    def answers_under_way(self) -> int:
        """Answers that wait or are being made."""
        return len(self._stops)

    def application(self) -> web.Application:
        """The routes behind their guard."""
        settings = self.model.settings.page
        app = web.Application(middlewares=[guard(settings.host), _sentences], client_max_size=CONVERSATION_BYTES)
        app.on_response_prepare.append(set_headers)
        app.on_shutdown.append(self._stop_all)
        app.on_cleanup.append(self._close)
        for path in FILES:
            app.router.add_get(path, self._file)
        app.router.add_get("/api/model", self._describe_model)
        app.router.add_post("/api/documents", self._add_document)
        app.router.add_get("/api/documents/{id}", self._get_document)
        app.router.add_delete("/api/documents/{id}", self._remove_document)
        app.router.add_post("/api/answers", self._answer)
        app.router.add_post("/api/answers/{id}/stop", self._stop)
        app.router.add_post("/api/export", self._export)
        return app

    async def _file(self, request: web.Request) -> web.Response:
        name, kind = FILES[request.path]
        content = (resources.files("longlora.chat") / "page" / name).read_bytes()
        return web.Response(body=content, content_type=kind, charset="utf-8")

    async def _describe_model(self, _request: web.Request) -> web.Response:
        sinks, settings = self.model.sinks, self.model.settings
        offered = [number for number in self._offered if number in self.documents]
        return web.json_response(
            {
                "model": self.model.name,
                "window": self.model.window,
                "seen": self.model.reach,
                "attention_sinks": sinks and {"sinks": sinks.sinks, "recent": sinks.recent},
                "prompt_format": self.model.prompts.name,
                "upload_bytes": self._upload_bytes,
                "answer_tokens": settings.answer.answer_tokens,
                "documents": [await self._in_reading_thread(self._described, number) for number in offered],
            }
        )

    async def _add_document(self, request: web.Request) -> web.Response:
        name = _shown_name(request.query.get("name", ""))
        if len(self.documents) >= MOST_DOCUMENTS:
            raise UserError(f"there are {MOST_DOCUMENTS} documents here already: remove one first.")
        limit = self._upload_bytes
        with tempfile.TemporaryDirectory(prefix="longlora-") as folder:
            path = Path(folder) / ("upload" + Path(name).suffix[:16].lower())
            size = 0
            with path.open("xb") as file:
                async for piece in request.content.iter_chunked(1 << 16):
                    size += len(piece)
                    if size > limit:
                        raise UserError(
                            f"'{name}' is larger than {limit / 1e6:g} MB, the most that this page takes: start it with "
                            "a larger --upload-megabytes, or give a part of the document."
                        )
                    file.write(piece)
            if size == 0:
                raise UserError(f"'{name}' is empty (0 bytes): give a file with text.")
            document = await self._in_reading_thread(self._read, path, name)
        number = secrets.token_urlsafe(16)
        self.documents[number] = document
        return web.json_response(await self._in_reading_thread(self._described, number), status=201)

    async def _in_reading_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._reading, function, *arguments)

    def _read(self, path: Path, name: str) -> ChatDocument:
        material, most_bytes = self.model.settings.material, self._upload_bytes
        return read_document(path, self.model.tokenizer, material=material, name=name, most_bytes=most_bytes)

    def _described(self, number: str) -> dict[str, Any]:
        """A document's length against the room it has, and where it has too little its sections."""
        document = self.documents[number]
        surplus, sections = self.model.surplus([document]), []
        if surplus:
            sections = document.sections(self.model.section_budget(document), self.model.tokenizer)
        return {
            "id": number,
            "name": document.name,
            "tokens": document.tokens,
            "characters": len(document.text),
            "material": document.material,
            "room": self.model.room([document]),
            "surplus": surplus,
            "sections": [
                {"number": at, "heading": each.heading, "tokens": each.tokens}
                for at, each in enumerate(sections, start=1)
            ],
        }

    def _known(self, number: Any) -> ChatDocument:
        if not isinstance(number, str) or number not in self.documents:
            raise UserError("this document is no longer here (the page was started anew): add it again.")
        return self.documents[number]

    async def _get_document(self, request: web.Request) -> web.Response:
        self._known(request.match_info["id"])
        return web.json_response(await self._in_reading_thread(self._described, request.match_info["id"]))

    async def _remove_document(self, request: web.Request) -> web.Response:
        self._known(request.match_info["id"])
        del self.documents[request.match_info["id"]]
        return web.json_response({})

    def _session(self, body: dict[str, Any]) -> ChatSession:
        """The conversation that a request describes."""
        documents = []
        for each in references(body):
            document, section = self._known(each.get("id")), each.get("section")
            if section is not None:
                if not isinstance(section, int):
                    raise UserError('"section" must be the number of a section.')
                document = document.part(section, self.model.section_budget(document), self.model.tokenizer)
            documents.append(document)
        return ChatSession(self.model, documents, plain_turns(body))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await json_body(request)
        session = await self._in_reading_thread(self._session, body)
        question = body.get("question")
        if not isinstance(question, str) or not question.strip():
            raise UserError("the question is empty: say what to ask.")
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await stream.prepare(request)
        number, stop, ticket = secrets.token_urlsafe(16), threading.Event(), self._line.join()
        self._stops[number] = stop
        # the handler is cancelled when the browser is gone, wherever it waits
        making: asyncio.Future[None] | None = None
        try:
            await _send(stream, ("begin", {"id": number}))
            async for ahead in self._line.ahead(ticket):
                await _send(stream, ("queue", {"ahead": ahead}))
            loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
            making = loop.run_in_executor(
                self._answering,
                _make_answer,
                session,
                question.strip(),
                stop,
                lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
            )
            while (event := await events.get()) is not None:
                await _send(stream, event)
            await stream.write_eof()
        except ConnectionError:  # gone while something was being sent
            logger.debug("the page was closed before its answer was whole")
        finally:
            stop.set()

            def free(_done: object = None) -> None:
                self._line.leave(ticket)
                del self._stops[number]

            # the next in line must not begin while this one still has the model
            if making is None:
                free()
            else:
                making.add_done_callback(free)
        return stream

    async def _stop(self, request: web.Request) -> web.Response:
        stop = self._stops.get(request.match_info["id"])
        if stop is not None:
            stop.set()
        return web.json_response({"stopped": stop is not None})

    async def _export(self, request: web.Request) -> web.Response:
        body = await json_body(request)
        if body.get("format") not in FORMATS:
            raise UserError(f'"format" must be one of {", ".join(FORMATS)}.')
        write, kind = (as_json, "application/json") if body["format"] == "json" else (as_markdown, "text/markdown")
        text = write(self.model.name, named_documents(body), plain_turns(body))
        return web.Response(text=text, content_type=kind, charset="utf-8")

    async def _stop_all(self, _app: web.Application) -> None:
        for stop in self._stops.values():
            stop.set()

    async def _close(self, _app: web.Application) -> None:
        for threads in (self._answering, self._reading):
            await asyncio.to_thread(threads.shutdown)


def _make_answer(
    session: ChatSession, question: str, stop: threading.Event, put: Callable[[Event | None], object]
) -> None:
    """Runs in the model's thread: hands every happening over, and None at the end, whatever happens."""
    try:
        for each in session.ask(question, stop):
            if isinstance(each, Reading):
                put(("reading", {"done": each.done, "total": each.total, "reused": each.reused}))
            elif isinstance(each, Answer):
                put(("done", each.document() | {"meter": each.meter()}))
            else:
                put(("text", {"text": each}))
    except UserError as error:
        put(("error", {"error": str(error)}))
    except Exception as error:
        logger.exception("an answer failed")
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        put(("error", {"error": f"the model failed ({first}): the terminal has the details."}))
    finally:
        put(None)


def _shown_name(given: str) -> str:
    """The name of an upload without its folder, and without what is no letter to see."""
    name = printable(given.replace("\\", "/").rpartition("/")[2]).strip()[:200]
    return name if name.strip(".") else "document.txt"


async def _send(stream: web.StreamResponse, event: Event) -> None:
    await stream.write(f"event: {event[0]}\ndata: {json.dumps(event[1])}\n\n".encode())


@web.middleware
async def _sentences(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A mistake of the person's as `{"error": sentence}` with status 400."""
    try:
        return await handler(request)
    except UserError as error:
        return web.json_response({"error": str(error)}, status=400)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the address is not this machine's, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use: give another, or 0 for any that is free.") from error
        raise UserError(f"--host {host} --port {port} cannot be listened on ({error.strerror}).") from error
    return listening


def serve(model: ChatModel, documents: Sequence[ChatDocument]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the address cannot be listened on.
    """
    settings = model.settings.page
    listening = listening_socket(settings.host, settings.port)
    port = listening.getsockname()[1]
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"{model.name} answers at http://{shown}:{port}/ (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if not is_local(settings.host):
        logger.warning("whoever can reach %s can use the model and read the documents given here", settings.host)
    web.run_app(
        Page(model, documents).application(),
        sock=listening,
        print=None,
        access_log=None,
        shutdown_timeout=1.0,
        handler_cancellation=True,
    )
