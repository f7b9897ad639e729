"""Health, figures, documentation, request ids."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from inspect import iscoroutinefunction
from pkgutil import iter_modules
from typing import Any

import httpx
import pytest
import structlog
from fastapi.dependencies.models import Dependant
from structlog.testing import LogCapture

from server.api import routes
from server.engine.protocol import StepStats
from tests.api.conftest import BASE_ID as BASE
from tests.api.conftest import Scripted
from tests.conftest import silence_log


def test_a_request_id_is_taken_or_made_and_stands_in_the_log(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    try:
        engine, http, _ = scripted()
        engine.on_request = lambda request: engine.finish(request, [70])
        given = http.post("/v1/completions", json={"model": BASE, "prompt": "x"}, headers={"X-Request-ID": "abc-1"})
        made = http.get("/v1/nothing")
        bad = http.get("/v1/nothing", headers={"X-Request-ID": "a b\tc" * 40})
    finally:
        silence_log()
    assert given.headers["x-request-id"] == "abc-1"
    assert len({made.headers["x-request-id"], bad.headers["x-request-id"], "abc-1"}) == 3
    (date,) = made.headers.get_list("date")
    assert abs((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()) < 600, "and the present time"
    lines = {entry["request_id"]: entry for entry in capture.entries if entry["event"] == "request"}
    assert (lines["abc-1"]["path"], lines["abc-1"]["status"]) == ("/v1/completions", 200)
    assert lines[made.headers["x-request-id"]]["status"] == 404


def test_nothing_of_a_request_is_run_on_a_thread() -> None:
    """FastAPI does so with plain functions, and a thread costs a request more than these do."""
    modules = [import_module(f"{routes.__name__}.{module.name}") for module in iter_modules(routes.__path__)]
    found = [route for module in modules if hasattr(module, "router") for route in module.router.routes]
    assert len(found) > 20
    for route in found:
        for call in calls(route.dependant):
            assert iscoroutinefunction(call) or iscoroutinefunction(type(call).__call__), call


def calls(dependant: Dependant) -> Iterator[Any]:
    """A route's function, and all that are called for its arguments."""
    yield dependant.call
    for dependency in dependant.dependencies:
        yield from calls(dependency)


def test_metrics_count_requests_tokens_and_steps(scripted: Scripted) -> None:
    engine, http, _ = scripted()
    engine.on_request = lambda request: engine.finish(request, [70, 71, 72])
    for _ in range(2):
        http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    http.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
    lines = http.get("/metrics").text.splitlines()
    for line in (
        'medley_requests_total{outcome="ok",task="base"} 2.0',
        'medley_requests_total{outcome="model_not_found",task="unknown"} 1.0',
        "medley_time_to_first_token_seconds_count 2.0",
        "medley_time_per_output_token_seconds_count 2.0",
        "medley_step_seconds_count 8.0",
        "medley_step_rows_sum 8.0",
        'medley_tokens_total{kind="prefill"} 24.0',
        "medley_prompt_tokens_total 32.0",
        "medley_prompt_tokens_cached_total 8.0",
        "medley_kv_pages 100.0",
        "medley_kv_pages_idle 2.0",
        "medley_bank_capacity_bytes 1000.0",
        "medley_adapter_load_seconds_count 8.0",
        "medley_running_sequences 1.0",
        "medley_store_errors_total 0.0",
    ):
        assert line in lines


def test_task_labels_are_bounded() -> None:
    from server.api.metrics import MAX_TASK_LABELS, Metrics

    metrics = Metrics()
    for number in range(3 * MAX_TASK_LABELS):
        metrics.request(f"task-{number}", "ok")
    text = metrics.render(0, redis_available=True, pins_left_out=0).decode()
    assert text.count("medley_requests_total{") == MAX_TASK_LABELS + 1
    assert f'medley_requests_total{{outcome="ok",task="other"}} {2.0 * MAX_TASK_LABELS}' in text


def test_every_figure_of_a_step_is_taken() -> None:
    from server.api.metrics import Metrics
    from tests.api.fake_engine import STATS

    metrics = Metrics()
    metrics.step(STATS)
    assert set(StepStats.__struct_fields__) == set(STATS.__struct_fields__)
    assert "medley_waiting_sequences 0.0" in metrics.render(0, redis_available=True, pins_left_out=0).decode()


def test_the_documentation_works_without_a_network(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert http.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    assert http.get("/").headers["location"] == "/docs"


def test_openapi_describes_every_call_with_an_example(http: httpx.Client) -> None:
    document: dict[str, Any] = http.get("/openapi.json").json()
    calls = {(method, path): call for path, methods in document["paths"].items() for method, call in methods.items()}
    assert ("post", "/v1/completions") in calls
    assert ("post", "/v1/tasks/{task}/versions") in calls
    assert ("get", "/metrics") in calls
    for (_, path), call in calls.items():
        assert call["summary"]
        assert call["description"]
        answers = {status: answer for status, answer in call["responses"].items() if status.startswith("2")}
        assert answers, path
        for status, answer in answers.items():
            bodies = answer.get("content", {})
            assert (
                status == "204" or path.endswith("/files/{name}") or any("example" in body for body in bodies.values())
            )
        for kind, body in call.get("requestBody", {}).get("content", {}).items():
            if kind == "application/json":
                name = body["schema"]["$ref"].rpartition("/")[2]
                assert "example" in document["components"]["schemas"][name]
    assert "422" not in str(document["paths"]), "validation errors have the one shape, and status 400"
