"""`nanochat chat_web`: the chat page and the API, from checkpoints on disk to a listening socket."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from pathlib import Path

import uvicorn

from nanochat import checkpoint, config
from nanochat.chat import ChatModel, load
from nanochat.errors import NanochatError, UsageError
from nanochat.runtime import log
from nanochat.serving.app import create_app
from nanochat.serving.protocol import make_protocol
from nanochat.serving.settings import ServeSettings

STAGES = ("sft", "rag", "refrag", "rl")  # that are served when none is named
MAX_CONNECTIONS = 1024


def chat_web(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; answers on their way are finished first."""
    settings = config.parse(ServeSettings, sys.argv[1:] if argv is None else argv, prog="nanochat chat_web")
    settings.check()
    with listen(settings.host, settings.port) as listening:  # before the models, whose loading takes longer
        models = load_models(settings)
        server = make_server(settings, models)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("%s on http://%s:%d/ (Ctrl-C ends it)", ", ".join(models), shown, port)
        server.run(sockets=[listening])
    return 0


def make_server(settings: ServeSettings, models: dict[str, ChatModel]) -> uvicorn.Server:
    """The HTTP server, not yet running."""
    if settings.access_log:
        logging.getLogger("uvicorn.access").handlers = log.handlers
    options = uvicorn.Config(
        create_app(settings, models),
        http=make_protocol(settings.idle_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=settings.access_log,
        log_level="info" if settings.access_log else "warning",
        proxy_headers=settings.behind_proxy,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        h11_max_incomplete_event_size=32 << 10,
    )
    return uvicorn.Server(options)


def load_models(settings: ServeSettings) -> dict[str, ChatModel]:
    """The models by name: run and stage. Raises NanochatError, UsageError for two of one name."""
    models: dict[str, ChatModel] = {}
    for source in settings.source or _stages(settings):
        model = load(source, settings.run, settings.runs, settings.device, settings.dtype, settings.quantize)
        name = model_name(model)
        if name in models:
            raise UsageError(f"--source {source}: the model {name} is served already")
        models[name] = model
    return models


def model_name(model: ChatModel) -> str:
    """out/quickstart/sft/step_000300 is quickstart-sft."""
    stage = Path(model.path).resolve().parent
    return f"{stage.parent.name}-{stage.name}"


def _stages(settings: ServeSettings) -> list[str]:
    """Those that can chat and are there; sft when none is, for the error message."""
    found = []
    for stage in STAGES:
        with contextlib.suppress(NanochatError):
            checkpoint.find(stage, settings.runs, settings.run)
            found.append(stage)
    return found or ["sft"]


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises NanochatError, UsageError for an address that there is not."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise NanochatError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port") from None
    return found
