"""Grafana dashboards of the service or a cache job, as JSON.

``python deploy/monitoring/make_dashboards.py`` writes ``dashboards/*.json``; a test compares the committed files.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SERVICE = 'job=~"$job", instance=~"$instance"'
_REQUESTS = f"scalekd_http_requests_total{{{_SERVICE}}}"

Panel = tuple[str, str, str, dict[str, str]]
"""Title, unit, description, and expressions by legend."""

SERVICE: tuple[Panel, ...] = (
    (
        "Requests",
        "reqps",
        "Requests by route; probes and scrapes are among them.",
        {"{{route}}": f"sum by (route) (rate({_REQUESTS}[$__rate_interval]))"},
    ),
    (
        "Status",
        "reqps",
        "Status 0: the client left before the status line.",
        {"{{status}}": f"sum by (status) (rate({_REQUESTS}[$__rate_interval]))"},
    ),
    (
        "Duration, 95th percentile",
        "s",
        "From a request's headers to the last byte of its response.",
        {
            "{{route}}": "histogram_quantile(0.95, sum by (route, le) "
            f"(rate(scalekd_http_request_seconds_bucket{{{_SERVICE}}}[$__rate_interval])))"
        },
    ),
    (
        "Rows",
        "rowsps",
        "Rows read from the store.",
        {"{{instance}}": f"sum by (instance) (rate(scalekd_rows_total{{{_SERVICE}}}[$__rate_interval]))"},
    ),
    (
        "Bytes",
        "Bps",
        "Bodies of responses and of requests.",
        {
            "sent": f"sum(rate(scalekd_http_response_bytes_total{{{_SERVICE}}}[$__rate_interval]))",
            "received": f"sum(rate(scalekd_http_request_bytes_total{{{_SERVICE}}}[$__rate_interval]))",
        },
    ),
    (
        "Requests in work",
        "short",
        "New requests are refused with 429 at --max-requests.",
        {"{{instance}}": f"scalekd_http_requests_in_work{{{_SERVICE}}}"},
    ),
    (
        "Memory of responses",
        "bytes",
        "New requests are refused with 429 at --max-bytes-in-flight.",
        {"{{instance}}": f"scalekd_response_memory_bytes{{{_SERVICE}}}"},
    ),
    (
        "Committed views",
        "short",
        "Units times views that may be read; grows while a cache job runs.",
        {"{{instance}}": f"scalekd_committed_views{{{_SERVICE}}}"},
    ),
    (
        "Instances",
        "short",
        "Instances that answer Prometheus.",
        {"up": f"sum(up{{{_SERVICE}}})"},
    ),
    (
        "Live teacher: queue",
        "short",
        "Views that wait; more are refused with 429 at --queue-rows.",
        {"{{instance}}": f"scalekd_queue_rows{{{_SERVICE}}}"},
    ),
    (
        "Live teacher: share of time in forward passes",
        "percentunit",
        "1 is a saturated device.",
        {
            "{{instance}}": "sum by (instance) "
            f"(rate(scalekd_batch_compute_seconds_sum{{{_SERVICE}}}[$__rate_interval]))"
        },
    ),
    (
        "Live teacher: views per forward pass",
        "short",
        "Small batches with a full queue: raise --max-wait or --max-batch.",
        {
            "mean": f"sum(rate(scalekd_batch_rows_sum{{{_SERVICE}}}[$__rate_interval])) / "
            f"sum(rate(scalekd_batch_rows_count{{{_SERVICE}}}[$__rate_interval]))"
        },
    ),
    (
        "Live teacher: wait, 95th percentile",
        "s",
        "Time the first views of a batch waited.",
        {
            "wait": "histogram_quantile(0.95, sum by (le) "
            f"(rate(scalekd_batch_wait_seconds_bucket{{{_SERVICE}}}[$__rate_interval])))"
        },
    ),
    (
        "Live teacher: GPU memory",
        "bytes",
        "0 without a GPU.",
        {
            "allocated {{instance}}": f"scalekd_gpu_memory_allocated_bytes{{{_SERVICE}}}",
            "reserved {{instance}}": f"scalekd_gpu_memory_reserved_bytes{{{_SERVICE}}}",
        },
    ),
)

CACHE: tuple[Panel, ...] = (
    (
        "Images through the teacher",
        "cps",
        "View images a second, by process.",
        {"{{instance}}": f"sum by (instance) (rate(teacher_service_images{{{_SERVICE}}}[$__rate_interval]))"},
    ),
    (
        "Share of the job that is committed",
        "percentunit",
        "Tasks these processes committed, of those the store lacked when the first of them began.",
        {
            "committed": f"sum(teacher_service_tasks_committed_total{{{_SERVICE}}}) / "
            f"max(teacher_service_tasks_planned{{{_SERVICE}}})"
        },
    ),
    (
        "Time left, at most",
        "s",
        "Images left at the rate of the last ten minutes; what ended processes computed is not counted.",
        {
            "left": f"(max(teacher_service_images_planned{{{_SERVICE}}}) "
            f"- sum(teacher_service_images{{{_SERVICE}}})) / "
            f"sum(rate(teacher_service_images{{{_SERVICE}}}[10m]))"
        },
    ),
    (
        "Stages",
        "percentunit",
        "Share of its time a stage works; the largest is the bottleneck, and it should be forward.",
        {"{{stage}}": f"avg by (stage) (teacher_service_stage_busy_share{{{_SERVICE}}})"},
    ),
    (
        "Bytes written",
        "Bps",
        "Objects of committed units.",
        {"{{instance}}": f"sum by (instance) (rate(teacher_service_bytes_written_total{{{_SERVICE}}}[10m]))"},
    ),
    (
        "Units committed",
        "short",
        "Tasks (missing views of a unit) by process.",
        {"{{instance}}": f"teacher_service_tasks_committed_total{{{_SERVICE}}}"},
    ),
    (
        "Samples quarantined",
        "short",
        "`feature-store info` lists them with their reasons.",
        {"samples": f"sum(teacher_service_samples_quarantined_total{{{_SERVICE}}})"},
    ),
    (
        "Processes",
        "short",
        "Processes of the job that answer Prometheus.",
        {"up": f"sum(up{{{_SERVICE}}})"},
    ),
)

BOARDS = {
    "scalekd-service": ("Feature service", "scalekd-service", "scalekd_http_requests_in_work", SERVICE),
    "scalekd-cache": ("Cache job", "scalekd-cache", "teacher_service_images", CACHE),
}
"""By uid: title, default scrape job, metric that has the job's label values, panels."""


def board(uid: str) -> dict[str, Any]:
    """One dashboard in Grafana's JSON model (schema 39, Grafana 10 or newer)."""
    title, job, metric, panels = BOARDS[uid]
    return {
        "uid": uid,
        "title": title,
        "tags": ["scalekd-cache"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                _variable("job", f"label_values({metric}, job)", default=job),
                _variable("instance", f'label_values({metric}{{job=~"$job"}}, instance)'),
            ]
        },
        "panels": [_panel(number, *panel) for number, panel in enumerate(panels)],
    }


def _variable(name: str, query: str, default: str | None = None) -> dict[str, Any]:
    chosen = {"text": default, "value": default} if default else {"text": "All", "value": "$__all"}
    return {
        "name": name,
        "type": "query",
        "label": name.capitalize(),
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": chosen,
    }


def _panel(number: int, title: str, unit: str, description: str, expressions: dict[str, str]) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": _DATASOURCE,
        "gridPos": {
            "x": number % _COLUMNS * _WIDTH,
            "y": number // _COLUMNS * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _DATASOURCE, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(expressions.items())
        ],
    }


def render(uid: str) -> str:
    """A dashboard's file."""
    return json.dumps(board(uid), indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in BOARDS:
        (FOLDER / f"{name}.json").write_text(render(name))
