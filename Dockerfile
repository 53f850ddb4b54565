# The image for every node of a GPU cluster, head and workers, and so for what `ray job submit` runs there.
#
#   docker build --tag samssl .
#   docker run --rm samssl samssl --help
#   docker run --rm --gpus all samssl python -c "import torch; print(torch.cuda.get_device_name())"
#   docker run --rm --gpus all --shm-size 4g samssl samssl study --config src/ray_configs/studies/demo.yaml
#
# The base has Ray and Python, which must be those of whoever submits jobs: change it together with
# pyproject.toml. torch brings its own CUDA libraries; the nodes need an NVIDIA driver that is new enough
# for them (580 for CUDA 13) and the NVIDIA container toolkit. The base runs as the user `ray`, without
# root, and so does this.
FROM rayproject/ray:2.60.0-py311-gpu

USER ray
WORKDIR /home/ray/src

# What samssl needs, in a layer of its own: new code does not send gigabytes to the nodes again.
COPY --chown=ray pyproject.toml LICENSE ./
RUN mkdir samssl && touch README.md samssl/__init__.py \
    && pip install --no-cache-dir . \
    && pip uninstall --yes samssl

COPY --chown=ray README.md ./
COPY --chown=ray samssl ./samssl
COPY --chown=ray pipelines ./pipelines
COPY --chown=ray ray_configs ./ray_configs
# The build stops here if a command or a template is missing.
RUN pip install --no-cache-dir --no-deps . \
    && rm -rf build samssl.egg-info \
    && cd /tmp && samssl study --help > /dev/null && ray job submit --help > /dev/null

ENV RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /home/ray
