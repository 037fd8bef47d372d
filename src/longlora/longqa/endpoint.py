"""A teacher behind an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, LM Studio, a provider.

One POST to `/chat/completions` and its errors are all that is needed, so this is `httpx` and not a client package. The
key is read from the environment for each request and stands in no settings, no record and no message; nor does what the
URL has after its `?`, where some endpoints want a key.
"""

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from longlora.errors import UserError, printable
from longlora.longqa.answers import Answer, judged
from longlora.settings import EndpointSettings

logger = logging.getLogger(__name__)

MOST_SECONDS_BETWEEN = 60.0
"""The longest wait before a question is asked again, unless the endpoint asks for a longer one."""

GIVE_UP_AFTER = 5
"""Questions in a row that find the endpoint out of order (each after all its retries) before the work stops."""

RESAMPLING_TEMPERATURE = 0.7

MOST_REPLY_BYTES = 8_000_000
"""A longer reply is no answer."""

OUT_OF_ORDER = ("timeout", "no connection", "error of the endpoint", "too many requests", "malformed answer")

_HERE = ("localhost", "127.0.0.1", "::1")

Key = TypeVar("Key")


class Endpoint:
    """Asks `parallel` questions at a time and hands each answer on as it comes."""

    def __init__(
        self, url: str, model: str | None, settings: EndpointSettings, *, answer_tokens: int, parallel: int
    ) -> None:
        """
        Args:
            url: base URL, as a rule ending in `/v1`.
            model: the endpoint's name of the model; None takes the only one that its list has.
            settings: key, timeout, retries.
            answer_tokens: most tokens of an answer.
            parallel: requests under way at a time.

        Raises:
            UserError: the key's variable is not set, nothing listens at `url`, it refuses the key, or the model is
                not named and the list does not decide it.
        """
        given = httpx.URL(url)
        path = given.path.rstrip("/").removesuffix("/chat/completions")
        self._base = given.copy_with(path=path, fragment=None)
        self.url = f"{given.scheme}://{given.netloc.decode()}{path}"
        """Where the endpoint is, without what may be a key."""
        self.settings, self.answer_tokens, self.parallel = settings, answer_tokens, parallel
        self._limit = "max_tokens"
        self._stopping = threading.Event()
        # trust_env: proxies are the user's business, but a password out of ~/.netrc is for nobody (auth below)
        self._client = httpx.Client(
            timeout=httpx.Timeout(settings.timeout, connect=min(settings.timeout, 20.0)),
            limits=httpx.Limits(max_connections=parallel + 1, max_keepalive_connections=parallel),
            auth=self._authorise,
            follow_redirects=False,
        )
        if settings.key_variable is not None and not self._key():
            raise UserError("the environment variable that --key-variable names is not set: export it with the key.")
        if (self._key() or given.query) and given.scheme == "http" and given.host not in _HERE:
            logger.warning("the key goes to %s unencrypted: use https where others can listen", given.host)
        listed = self._models()
        if model is None and len(listed) != 1:
            names = f" ({', '.join(listed[:8])})" if listed else ""
            raise UserError(f"the teacher at {self.url} lists {len(listed)} models{names}: name one with --teacher.")
        self.model = model or listed[0]
        self.name = f"{self.model} at {self.url}"

    def answer_each(self, asked: Iterable[tuple[Key, str]]) -> Iterator[tuple[Key, Answer]]:
        """The answer to each prompt, in the order they come; `asked` is read only as far as there is room.

        Raises:
            UserError: the endpoint refuses the key or the model, or stays out of order.
        """
        self._stopping.clear()
        waiting: queue.Queue[tuple[Key, str] | None] = queue.Queue()
        done: queue.Queue[tuple[Key, Answer | BaseException]] = queue.Queue()

        def work() -> None:
            while (item := waiting.get()) is not None:
                try:
                    done.put((item[0], self.answer(item[1])))
                except BaseException as error:
                    done.put((item[0], error))

        # Threads of our own, because those of a pool would hold up an interrupted run until their requests end.
        for _ in range(self.parallel):
            threading.Thread(target=work, daemon=True).start()
        under_way = out_of_order = 0
        try:
            todo = iter(asked)
            more = True
            while more or under_way:
                while more and under_way < self.parallel:
                    item = next(todo, None)
                    more = item is not None
                    if item is not None:
                        waiting.put(item)
                        under_way += 1
                if not under_way:
                    break
                key, answer = done.get()
                under_way -= 1
                if isinstance(answer, BaseException):
                    raise answer
                out_of_order = out_of_order + 1 if answer.problem in OUT_OF_ORDER else 0
                yield key, answer
                if out_of_order == GIVE_UP_AFTER:
                    raise UserError(
                        f"the teacher at {self.url} failed {GIVE_UP_AFTER} questions in a row "
                        f"({answer.problem}: {answer.detail}): look after it, then give the same command with --resume."
                    )
        finally:
            self._stopping.set()
            for _ in range(self.parallel):
                waiting.put(None)

    def answer(self, prompt: str) -> Answer:
        """One answer, asked for again after a timeout, an error or a useless answer, at most `retries` times.

        Raises:
            UserError: the endpoint refuses the key or the model.
        """
        answer = Answer("", "not asked")
        for attempt in range(self.settings.retries + 1):
            answer, pause = self._try(prompt, again=attempt > 0 and answer.problem not in OUT_OF_ORDER)
            if not answer.problem or answer.problem == "refused by the endpoint" or attempt == self.settings.retries:
                break
            if pause is None and answer.problem in OUT_OF_ORDER:
                pause = min(MOST_SECONDS_BETWEEN, 2.0**attempt) * random.uniform(0.5, 1)
            if self._stopping.wait(pause or 0):
                break
        return answer

    def _try(self, prompt: str, again: bool) -> tuple[Answer, float | None]:
        """One request: its answer, and the seconds the endpoint asks to wait if it says so."""
        limit = self._limit
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            limit: self.answer_tokens,
        }
        temperature = self.settings.temperature
        if again:  # the same question at temperature 0 has the same useless answer
            temperature = max(temperature or 0.0, RESAMPLING_TEMPERATURE)
        if temperature is not None:
            body["temperature"] = temperature
        try:
            response = self._request("POST", "/chat/completions", body)
        except httpx.TimeoutException:
            return Answer("", "timeout", f"no answer in {self.settings.timeout:g} seconds"), None
        except httpx.HTTPError as error:
            return Answer("", "no connection", self._safe(_root_cause(error))), None
        if response.status_code != 200:
            if limit == "max_tokens" and "max_completion_tokens" in _error_message(response):
                self._limit = "max_completion_tokens"  # what newer models of OpenAI want instead
                return self._try(prompt, again)
            return self._failed(response)
        return self._read(response, prompt), None

    def _failed(self, response: httpx.Response) -> tuple[Answer, float | None]:
        status, said = response.status_code, self._safe(_error_message(response))
        if status in (401, 403):
            raise self._refused_key(response)
        if status == 404 or 300 <= status < 400:
            raise UserError(
                f"the teacher at {self.url} has no chat completions there for model '{self.model}' ({status}: {said}): "
                "most endpoints want a URL that ends in /v1, and --teacher with their name of the model."
            )
        if status == 429:
            return Answer("", "too many requests", said), _retry_after(response)
        if status == 408 or status >= 500:
            return Answer("", "error of the endpoint", f"{status}: {said}"), _retry_after(response)
        return Answer("", "refused by the endpoint", f"{status}: {said}"), None

    def _read(self, response: httpx.Response, prompt: str) -> Answer:
        try:
            reply = response.json()
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
            usage = reply.get("usage") or {}
            if not isinstance(text, str):
                raise TypeError(f"content is a {type(text).__name__}")
            return judged(
                text,
                prompt,
                cut=choice.get("finish_reason") == "length",
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                answer_tokens=int(usage.get("completion_tokens") or 0),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return Answer("", "malformed answer", self._safe(f"{error} in {response.text[:80]!r}"))

    def _models(self) -> list[str]:
        """The endpoint's list of models, empty if it keeps none; asked first, before minutes go into a plan."""
        try:
            response = self._request("GET", "/models", None)
        except httpx.HTTPError as error:
            raise UserError(
                f"the teacher at {self.url} cannot be reached ({self._safe(_root_cause(error))}): start it, or mend "
                "--teacher-url."
            ) from error
        if response.status_code in (401, 403):
            raise self._refused_key(response)
        try:
            return [str(each["id"]) for each in response.json()["data"]]
        except (ValueError, LookupError, TypeError):
            return []

    def _refused_key(self, response: httpx.Response) -> UserError:
        return UserError(
            f"the teacher at {self.url} refuses the key ({response.status_code}: "
            f"{self._safe(_error_message(response))}): name the environment variable that holds it with --key-variable."
        )

    def _request(self, method: str, path: str, body: Any) -> httpx.Response:
        """The whole reply, within the timeout from its first byte to its last and of a bounded size."""
        url = self._base.copy_with(path=self._base.path.rstrip("/") + path)
        deadline = time.monotonic() + self.settings.timeout
        with self._client.stream(method, url, json=body) as response:
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > MOST_REPLY_BYTES:
                    raise httpx.ReadError(f"the reply has more than {MOST_REPLY_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the reply does not come to its end")
        headers = [(name, value) for name, value in response.headers.items() if name != "content-encoding"]
        return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=response.request)

    def _authorise(self, request: httpx.Request) -> httpx.Request:
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _key(self) -> str:
        return os.environ.get(self.settings.key_variable, "").strip() if self.settings.key_variable else ""

    def _safe(self, message: str) -> str:
        """One short line of what an endpoint or a library said, without the keys, which some of them repeat."""
        line = " ".join(message.split())
        query = self._base.query.decode()
        for secret in (self._key(), query, *(value for _, value in self._base.params.multi_items())):
            line = line.replace(secret, "…") if len(secret) > 3 else line
        return printable(line)[:200].rstrip(".")


def _root_cause(error: BaseException) -> str:
    """`Connection refused` out of the errors that httpx wraps around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror and "attempts failed" not in seen.strerror:
            return str(seen.strerror)
        seen = seen.__cause__ or seen.__context__
    return str(error).removeprefix("[Errno 111] ")


def _error_message(response: httpx.Response) -> str:
    try:
        error = response.json().get("error", "")
        return str(error.get("message", "") if isinstance(error, dict) else error) or response.reason_phrase
    except (ValueError, AttributeError):
        return response.text[:120] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the endpoint asks to wait (RFC 9110, section 10.2.3: a number or a date), at most ten minutes."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 0.0), 600.0)
