# lora in a container, for CPUs or for NVIDIA GPUs. Linted with hadolint in the tests; no image was ever built from it.
#
#   docker build --target cuda --tag lora:cuda .
#   docker build --target cpu --build-arg TORCH_INDEX=URL --tag lora:cpu .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/workspace" --volume lora-cache:/cache lora:cuda train recipe.yaml
#
# EXTRAS       optional parts of pyproject.toml, such as eval,plot,llama-cpp
# TORCH_INDEX  an index of packages in addition to pip's own: torch publishes one with wheels without CUDA, which are
#              much smaller. Without it, both images have torch with CUDA; it computes on CPUs, too.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY lora_cli lora_cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm AS cpu
ARG EXTRAS=""
ARG TORCH_INDEX=""
COPY constraints.txt /wheels/
COPY --from=wheel /wheels/*.whl /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
      "$(echo /wheels/*.whl)${EXTRAS:+[${EXTRAS}]}" \
    && useradd --create-home --uid 1000 lora \
    && mkdir /cache /workspace \
    && chmod 1777 /cache /workspace
# Models and encoded rows: a volume keeps them. Both folders are writable for every user, for `docker run --user`.
ENV HF_HOME=/cache/huggingface LORA_CACHE=/cache/lora
VOLUME /cache
WORKDIR /workspace
USER 1000
ENTRYPOINT ["lora"]
CMD ["--help"]

# The libraries of CUDA come with torch's wheels, the driver from the machine. Triton compiles its launchers with gcc.
FROM cpu AS cuda
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 1000
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
