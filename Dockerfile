# The image of every node of a Ray cluster on Kubernetes (deploy/files/kuberay.yaml): Python, the pinned environment and the
# checkout. Models are not in it. `docker build --tag REGISTRY/trimtab:0.1.0 .`

ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# KubeRay asks nodes for their health with wget; on GPUs Triton builds a small module with a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /home/ray/trimtab

# torch with the CUDA of the nodes' driver, and first: constraints.txt has its version alone. `--build-arg
# TORCH_INDEX=https://download.pytorch.org/whl/cpu` makes a smaller image for nodes without GPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE deploy.yaml ./
COPY actors ./actors
COPY cluster ./cluster
COPY deploy ./deploy
RUN pip install --no-cache-dir --constraint constraints.txt --editable . \
    && chown --recursive ray:ray /home/ray

USER ray
ENV PATH=/home/ray/.local/bin:$PATH
