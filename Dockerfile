# The image for every node of a cluster, head and workers, and so for what `ray job submit` runs there.
#
#   docker build --tag samssl .                                        # for GPUs; on machines without, it runs too
#   docker build --tag samssl:cpu --build-arg VARIANT=cpu .            # torch without CUDA: 4 GiB smaller
#   docker run --rm samssl samssl doctor
#   docker run --rm --gpus all --shm-size 4g samssl samssl doctor --ray
#   docker run --rm --shm-size 4g samssl:cpu samssl demo
#
# The base has Ray and Python, which must be those of whoever submits jobs: change it together with
# pyproject.toml. It is Ray's image without CUDA for both variants, since torch brings CUDA's libraries; the nodes
# need an NVIDIA driver that is new enough for them (580 for CUDA 13) and the NVIDIA container toolkit.
# What is installed is as large as in a virtual environment, measured there: 7.0 GiB, of which CUDA's libraries and
# triton are 4.1, and 2.9 GiB without them; the base comes on top. Commands run as the user `ray`, without root.
FROM rayproject/ray:2.60.0-py311-cpu

ARG VARIANT=gpu

# What torch.compile builds its kernels with.
USER root
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

USER ray
WORKDIR /home/ray/src

# What samssl needs, in the tested versions and in a layer of its own: new code does not send gigabytes to the
# nodes again. From torch's index comes 2.x.y+cpu, which pip takes for newer than the 2.x.y with CUDA.
COPY --chown=ray constraints.txt pyproject.toml LICENSE ./
RUN case "$VARIANT" in \
        gpu) ;; \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        *) echo "VARIANT is gpu or cpu, not '$VARIANT'" >&2; exit 1 ;; \
    esac \
    && mkdir samssl ray_configs && touch README.md samssl/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt . \
    && pip uninstall --yes samssl \
    && rm -r samssl ray_configs README.md

COPY --chown=ray README.md ./
COPY --chown=ray samssl ./samssl
COPY --chown=ray pipelines ./pipelines
COPY --chown=ray ray_configs ./ray_configs
# The build stops here if a command, a template or a config is missing.
RUN pip install --no-cache-dir --no-deps . \
    && samssl demo --help > /dev/null && samssl study --help > /dev/null && ray job submit --help > /dev/null

# The first two are what NVIDIA's container toolkit goes by, where the base is not one of NVIDIA's.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /home/ray
