"""The OpenAPI document, held against the gateway by schemathesis: no 500, and no answer that it does not describe."""

from __future__ import annotations

import os

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "10"))  # of each route
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PLAN = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def known_ids(served: ServedGateway) -> dict[str, str]:
    """Path parameters of things that exist, and belong to whoever brings no key."""
    with httpx.Client(base_url=f"{served.url}/v1", timeout=30.0) as client:
        conversation = client.post("/conversations", json={}).json()["id"]
        asked = {"model": MODEL, "input": "one", "conversation": conversation}
        response = client.post("/responses", json=asked).json()
    return {
        "conversation_id": conversation,
        "response_id": response["id"],
        "item_id": response["output"][0]["id"],
        "model_id": MODEL,
    }


def try_out(operation: schemathesis.APIOperation, known: dict[str, str]) -> set[int]:
    """Which statuses a route answered with, asked for things that exist and for others."""
    statuses: set[int] = set()

    @PLAN
    @given(case=operation.as_strategy(), is_known=st.booleans(), names_model=st.booleans())
    def check(case: schemathesis.Case, is_known: bool, names_model: bool) -> None:
        if is_known:
            case.path_parameters = {name: known.get(name, value) for name, value in case.path_parameters.items()}
        if names_model and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL
        statuses.add(case.call_and_validate(checks=CHECKS, timeout=30.0).status_code)

    check()
    return statuses


def test_every_answer_is_described(served_once: ServedGateway) -> None:
    document = schemathesis.openapi.from_url(f"{served_once.url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) > 20
    statuses: set[int] = set()
    for operation in operations:
        statuses |= try_out(operation, known_ids(served_once))
    assert {200, 400, 404} <= statuses


def test_what_the_document_names(served_once: ServedGateway) -> None:
    """Every type that it refers to is there."""
    reply = served_once.get("/openapi.json")
    document = reply.json()
    paths = document["paths"]
    assert {"/v1/responses", "/v1/conversations/{conversation_id}/erase", "/v1/chat/completions"} <= set(paths)
    assert "text/event-stream" in paths["/v1/responses"]["post"]["responses"]["200"]["content"]
    for path in ("/tokenize", "/detokenize"):
        assert "requestBody" in paths[path]["post"]
        assert "schema" in paths[path]["post"]["responses"]["200"]["content"]["application/json"]
    named = {part.split('"')[0] for part in reply.text.split("#/components/schemas/")[1:]}
    assert named <= set(document["components"]["schemas"])
    assert "x-definitions" not in reply.text
