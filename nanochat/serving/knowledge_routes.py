"""/v1/knowledge_bases: list, create, delete, upload, search; and /v1/embeddings."""

from __future__ import annotations

import base64
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, UploadFile

from nanochat.errors import UsageError
from nanochat.serving.errors import ApiError
from nanochat.serving.knowledge import citation
from nanochat.serving.models import Service, service_of
from nanochat.serving.schema import EmbeddingRequest, NewKnowledgeBase, SearchRequest
from nanochat.serving.strict import StrictRoute

router = APIRouter(route_class=StrictRoute)
PATH = "/v1/knowledge_bases"
Served = Annotated[Service, Depends(service_of)]
Record = dict[str, Any]


@router.get(PATH)
async def list_all(service: Served) -> Record:
    """All knowledge bases."""
    return {"object": "list", "data": await service.run(service.shelf.cards)}


@router.post(PATH, status_code=201)
async def create(body: NewKnowledgeBase, service: Served) -> Record:
    """A new one, empty."""
    _check_writable(service)
    return await service.run(service.shelf.create, body.name, body.kind)


@router.get(PATH + "/{name}")
async def get(name: str, service: Served) -> Record:
    """One of them."""
    return await service.run(service.shelf.card, name)


@router.delete(PATH + "/{name}")
async def delete(name: str, service: Served) -> Record:
    """Delete it with all its documents."""
    _check_writable(service)
    _check_idle(service, name)
    await service.run(service.shelf.delete, name)
    return {"id": name, "object": "knowledge_base.deleted", "deleted": True}


@router.post(PATH + "/{name}/documents", status_code=202)
async def upload(name: str, file: UploadFile, service: Served) -> Record:
    """Take in a file (txt, md, jsonl, pdf). It is read after this answer: ask for the upload until it is done."""
    _check_writable(service)
    await service.run(service.shelf.open, name)
    data = await file.read(service.uploads.max_bytes + 1)
    return service.uploads.submit(name, file.filename or "", data).card()


@router.get(PATH + "/{name}/uploads/{id}")
async def get_upload(name: str, id: str, service: Served) -> Record:
    """How far an upload is."""
    return service.uploads.get(name, id).card()


@router.get(PATH + "/{name}/documents")
async def list_documents(
    name: str,
    service: Served,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> Record:
    """The documents, in the order in which they came."""

    def some() -> list[Record]:
        base = service.shelf.open(name)
        chosen = islice(base.documents(), offset, offset + limit)
        return [
            {"id": d.id, "object": "document", "title": d.title, "source": d.source, "characters": len(d.content)}
            for d in chosen
        ]

    return {"object": "list", "data": await service.run(some)}


@router.delete(PATH + "/{name}/documents/{id:path}")
async def delete_document(name: str, id: str, service: Served) -> Record:
    """Delete one document."""
    _check_writable(service)
    _check_idle(service, name)  # one change at a time: this one would wait on a thread that others need

    def go() -> int:
        return service.shelf.open(name).delete(id).deleted

    if not await service.run(go):
        raise ApiError(404, "there is no such document", code="not_found")
    return {"id": id, "object": "document.deleted", "deleted": True}


@router.post(PATH + "/{name}/search")
async def search(name: str, body: SearchRequest, service: Served) -> Record:
    """The passages that fit a query best."""
    hits = await service.run(service.shelf.search, name, body.query, body.top_k, body.mode)
    data = [{**citation(hit.rank, hit.document), "score": float(hit.score)} for hit in hits]
    return {"object": "list", "data": data}


@router.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, service: Served) -> Record:
    """Unit vectors of texts."""
    try:
        embedder = await service.run(lambda: service.embedder)
    except UsageError:
        raise ApiError(404, "this server has no embedder", code="not_found") from None
    if body.model is not None and body.model != embedder.name:
        raise ApiError(404, f"the embedder is {embedder.name}", code="model_not_found", param="model")
    if body.dimensions not in (None, embedder.dimension):
        raise ApiError(400, f"the embedder has {embedder.dimension} dimensions", param="dimensions")
    vectors = await service.run(embedder.embed, body.texts())
    coded = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if coded else vector.tolist(),
        }
        for i, vector in enumerate(vectors)
    ]
    words = sum(len(text.split()) for text in body.texts())
    usage = {"prompt_tokens": words, "total_tokens": words}  # words: embedders have tokens of their own
    return {"object": "list", "model": embedder.name, "data": data, "usage": usage}


def _check_writable(service: Service) -> None:
    if not service.settings.uploads:
        raise ApiError(403, "this server's knowledge bases cannot be changed (no_uploads)", code="read_only")


def _check_idle(service: Service, name: str) -> None:
    if service.uploads.busy(name):
        raise ApiError(409, "files are on their way into this knowledge base; wait for them", code="busy")
