# syntax=docker/dockerfile:1
#
# A server on CPU:   docker build -t medley .
# on CUDA:           docker build -t medley:cuda --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
#
# It asks every caller for an API key; the first is made in the running container:
#   docker exec CONTAINER medley keys create NAME --scope admin
# Where the network is trusted, --env MEDLEY_AUTH=false --env MEDLEY_INSECURE=true lets everyone do everything.
#
# Any Debian or Ubuntu image whose python3 is 3.11 or 3.12 serves as BASE_IMAGE; one without Python gets its own.
# The torch wheel of pip's default index carries the CUDA libraries, which a CPU image does without: TORCH_INDEX may
# name an index whose wheels do not.

ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS python
SHELL ["/bin/bash", "-o", "errexit", "-o", "pipefail", "-c"]
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The version is the base image's to fix.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then \
        apt-get update; \
        apt-get install --yes --no-install-recommends python3 python3-venv; \
        rm -rf /var/lib/apt/lists/*; \
    fi

FROM python AS build
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/src/constraints.txt
WORKDIR /src
COPY constraints.txt ./
# Torch alone first: by far the largest, and the same until its pin changes. What it needs comes with the rest.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/medley \
    && /opt/medley/bin/pip install --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/medley/bin/pip install .

FROM python
RUN useradd --uid 10001 --create-home medley \
    && install --directory --owner=medley --group=medley /data
COPY --from=build /opt/medley /opt/medley
ENV PATH=/opt/medley/bin:$PATH \
    HF_HOME=/data/hub \
    MEDLEY_HOST=0.0.0.0 \
    MEDLEY_AUTH=true \
    MEDLEY_DATA_DIR=/data \
    NUMBA_CACHE_DIR=/data/numba \
    MEDLEY_LOG_FORMAT=json
USER 10001
WORKDIR /home/medley
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["medley"]
CMD ["serve"]
