"""The tracking server: reaching it, waiting while it is away, and making its database once.

A server is away where trying again later can help: it is not there, it is restarting, or its database is
locked by somebody else.
"""

import functools
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import requests
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import OperationalError

from samssl.config import UserError

# It prints the whole traceback of every locked database; the error is raised as well.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

Answer = TypeVar("Answer")

SQLITE = "sqlite:///"
FIRST_PATIENCE_S = 10.0
"""How long a server is waited for that has never answered this process."""
PATIENCE_S = 900.0
"""How long a server is waited for that has answered before: a restart, an upgrade."""
PAUSE_S = 15.0
"""How long after a failure nothing is sent again."""
PROBE_S = 5.0
"""How long an answer may take by which a server shows that it is there."""
TRANSIENT_CODES = ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)

_answered: set[str] = set()
_paused_until: dict[str, float] = {}
_told: set[str] = set()


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or one SQLite file below the working directory.

    The path of an SQLite file is made absolute: workers run in folders of their own.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}runs/mlflow.db"
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def shown(uri: str) -> str:
    """The address without the user name and password that it may hold."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri


@functools.cache
def client_of(uri: str) -> MlflowClient:
    """A client of the server at `uri`. Of an SQLite file, which it makes where it is new.

    MLflow makes its tables in many steps, which several processes at once would mix up.
    """
    if not uri.startswith(SQLITE):
        _probe(uri)
        return MlflowClient(tracking_uri=uri)
    file = Path(uri.removeprefix(SQLITE))
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        _probe(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    return client


def ask(uri: str, question: Callable[[MlflowClient], Answer]) -> Answer:
    """What `question(client)` returns, waiting for a server that is away.

    Raises:
        UserError: it did not come back in time.
    """
    deadline = time.monotonic() + (PATIENCE_S if uri in _answered else FIRST_PATIENCE_S)
    while True:
        try:
            if uri in _paused_until:
                _probe(uri)
            answer = question(client_of(uri))
        except Exception as error:
            if not is_away(error):
                raise
            if time.monotonic() >= deadline:
                raise UserError(_cannot_be_reached(uri, error)) from None
            pause(uri, "The run waits for it.")
            time.sleep(1)
        else:
            has_answered(uri)
            return answer


def has_answered(uri: str) -> None:
    """Note that the server was there, from now on or, for a part of a running study, once before."""
    _answered.add(uri)
    _told.discard(uri)
    _paused_until.pop(uri, None)


def pause(uri: str, meanwhile: str) -> None:
    """Note that the server is away, and say so once, with what happens `meanwhile`."""
    _paused_until[uri] = time.monotonic() + PAUSE_S
    if uri not in _told:
        _told.add(uri)
        print(f"MLflow at {shown(uri)} cannot be reached. {meanwhile}", flush=True)


def may_try(uri: str) -> bool:
    """Whether it is time to send something, and if the server was away, whether it is there again."""
    if uri not in _paused_until:
        return True
    if time.monotonic() < _paused_until[uri]:
        return False
    try:
        _probe(uri)
    except (requests.RequestException, sqlite3.OperationalError):
        _paused_until[uri] = time.monotonic() + PAUSE_S
        return False
    return True


def forget_pause(uri: str) -> None:
    """Let the next `may_try` look, however short ago the last failure was."""
    if uri in _paused_until:
        _paused_until[uri] = time.monotonic()


def is_away(error: BaseException) -> bool:
    """Whether the server failed to answer, so that the same call may succeed later."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in TRANSIENT_STATUS
    if isinstance(error, MlflowException):
        unanswered = error.error_code == "INTERNAL_ERROR" and str(error).startswith("API request to")
        return unanswered or error.error_code in TRANSIENT_CODES
    away = (requests.ConnectionError, requests.Timeout, OperationalError, sqlite3.OperationalError)
    return isinstance(error, away)


def _probe(uri: str) -> None:
    """Fail within seconds where the server is not there or its database is locked."""
    if uri.startswith(("http://", "https://")):
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_S)
        except requests.exceptions.SSLError:
            return  # something is there; what is wrong with its certificate, MLflow says
    elif uri.startswith(SQLITE) and Path(uri.removeprefix(SQLITE)).exists():
        try:
            with closing(sqlite3.connect(uri.removeprefix(SQLITE), timeout=PROBE_S)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.rollback()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(f"{uri} holds no MLflow database: {error}. Check MLFLOW_TRACKING_URI.") from None


def _cannot_be_reached(uri: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"The MLflow tracking server {shown(uri)} cannot be reached: {reason} "
        "Start it, or set MLFLOW_TRACKING_URI to one that runs (sqlite:////path/to/mlflow.db needs no "
        "server). What is finished is kept; the same command goes on."
    )
