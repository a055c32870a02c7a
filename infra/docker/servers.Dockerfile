# syntax=docker/dockerfile:1.7
# One small image for the MLflow and Prefect servers (no torch).
# Build from the repository root: docker build -f infra/docker/servers.Dockerfile .
FROM python:3.11.13-slim-bookworm

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_HOME=/state/prefect

WORKDIR /build
# Versions come from the lock file, so that servers and clients match.
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    printf '%s\n' 'mlflow[auth]' prefect fastapi sqlalchemy asyncpg psycopg2-binary boto3 > wanted.txt \
    && pip install --constraint requirements.lock -r wanted.txt \
    && useradd --create-home --uid 10001 server \
    && install --directory --owner=server /state

USER 10001:10001
WORKDIR /home/server
VOLUME ["/state"]
EXPOSE 4200 5000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
STOPSIGNAL SIGINT
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]
