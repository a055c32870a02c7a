# syntax=docker/dockerfile:1.7
# The pipeline image: Prefect worker and training, on CPU or NVIDIA GPUs.
# Build from the repository root: docker build -f infra/docker/pipeline.Dockerfile .
FROM python:3.11.13-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy

WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Layers from least to most frequently changed: torch, the locked packages, the project.
COPY requirements-torch.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install -r requirements-torch.txt
COPY requirements-runtime.lock ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=cache,target=/root/.cache/uv \
    pip install uv==0.9.7 && uv pip install -r requirements-runtime.lock
COPY pyproject.toml README.md LICENSE ./
COPY rfdetr rfdetr
COPY flows flows
RUN uv pip install --no-deps .

FROM python:3.11.13-slim-bookworm

# git and ssh: the worker clones the project for every flow run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git openssh-client tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 pipeline \
    && install --directory --owner=pipeline /cache /state

COPY --from=build /opt/venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    MLFLOW_HTTP_REQUEST_MAX_RETRIES=2 \
    MLFLOW_HTTP_REQUEST_TIMEOUT=20 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    RFDETR_DVC_CACHE=/cache/dvc \
    RFDETR_STATE_DIR=/state \
    RF_HOME=/cache/weights \
    XDG_CACHE_HOME=/cache/user

USER 10001:10001
WORKDIR /home/pipeline
VOLUME ["/cache", "/state"]
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["prefect", "worker", "start", "--pool", "gpu-pool", "--type", "process", "--with-healthcheck"]
