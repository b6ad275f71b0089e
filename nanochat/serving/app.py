"""The application: routes, errors, and the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.responses import FileResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from nanochat import __version__
from nanochat.chat import ChatModel
from nanochat.engine.sampling import Sampling
from nanochat.serving import chat, completions, errors, knowledge_routes
from nanochat.serving.markdown import render
from nanochat.serving.metrics import Measured
from nanochat.serving.models import Service, service_of
from nanochat.serving.schema import MAX_TOP_K, MarkdownRequest
from nanochat.serving.security import Guard
from nanochat.serving.settings import ServeSettings
from nanochat.serving.strict import StrictRoute
from nanochat.serving.uploads import TYPES

STATIC = Path(__file__).parent / "static"
FAILURES = (400, 401, 403, 404, 405, 408, 409, 413, 415, 429, 503)
Served = Annotated[Service, Depends(service_of)]
router = APIRouter(route_class=StrictRoute)


def create_app(settings: ServeSettings, models: Mapping[str, ChatModel]) -> FastAPI:
    """The server's ASGI application. Its threads start and end with its lifespan."""
    service = Service(settings, models)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="nanochat",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Measured, metrics=service.metrics), Middleware(Guard, settings=settings)],
        responses={status: {"description": "see docs/api.md"} for status in FAILURES},
    )
    app.state.service = service
    errors.install(app)
    for module in (chat, completions, knowledge_routes):
        app.include_router(module.router)
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _describe(app)
    return app


@router.get("/health")
async def health() -> dict[str, str]:
    """Answers as long as requests are taken."""
    return {"status": "ok", "version": __version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Figures for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def list_models(service: Served) -> dict[str, Any]:
    """What can be asked."""
    return {"object": "list", "data": [served.card() for served in service.models.values()]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: Served) -> dict[str, Any]:
    """One of them."""
    return service.model(name).card()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The chat page."""
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


@router.get("/ui/config")
async def ui_config(service: Served) -> dict[str, Any]:
    """What the page needs to know."""
    settings, defaults = service.settings, Sampling()
    return {
        "version": __version__,
        "models": [served.card() for served in service.models.values()],
        "retrieval": {
            "available": True,
            "uploads": settings.uploads,
            "default_kind": service.shelf.default_kind,
            "file_types": list(TYPES),
            "max_top_k": MAX_TOP_K,
        },
        "limits": {
            "max_n": settings.max_n,
            "max_body_bytes": int(settings.max_body_mb * (1 << 20)),
            "max_upload_bytes": int(settings.max_upload_mb * (1 << 20)),
            "max_seconds": settings.max_seconds,
        },
        "sampling": {
            "max_tokens": defaults.max_tokens,
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
        },
    }


@router.post("/ui/markdown")
async def ui_markdown(body: MarkdownRequest, service: Served) -> dict[str, list[str]]:
    """Texts as HTML that is safe to show."""
    return {"html": [await service.run(render, item.text, item.citations) for item in body.items]}


def _describe(app: FastAPI) -> None:
    """/openapi.json without the answer 422, which this server never gives."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in plain()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return plain()

    app.openapi = described  # type: ignore[method-assign]
