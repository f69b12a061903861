"""Tracing as it is set: to a collector, or not at all."""

from __future__ import annotations

from service.tracing import NO_TRACER, Tracer


class TracingError(Exception):
    """Traces are wanted and cannot be had: the extra is not installed, or one of OpenTelemetry's variables is wrong."""


def open_tracer(endpoint: str | None) -> Tracer:
    """Sends spans to this OTLP collector; without one there is no tracing, and no library is loaded for it.

    Raises `TracingError`.
    """
    if endpoint is None:
        return NO_TRACER
    try:
        from service.tracing.otel import OtelTracer, exporter_to  # noqa: PLC0415 - an extra, and dear to load

        return OtelTracer(exporter_to(endpoint))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise TracingError(
            "otel_endpoint (RDT_OTEL_ENDPOINT) is set, and OpenTelemetry is not installed: "
            "pip install '.[otel]' in the project's folder"
        ) from None
    except Exception as error:  # of the library, which reads its variables itself, some of them when it is imported
        raise TracingError(f"traces cannot be sent, look at the OTEL_* variables: {error!r}") from error
