# The image of a run: on one machine, and as every pod of a Ray cluster (configs/kuberay).
#
#   docker build --tag cvt-pipeline .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" cvt-pipeline extract my.yaml
#
# "base" of CUDA 13.0, for which torch's wheels on the package index are built: they bring cuBLAS, cuDNN and
# NCCL themselves, so that "runtime" would be 2 GB of the same again. What the base gives is the contract with
# the host: which driver is asked for (580 or newer; an older one is refused at the start, in words) and which
# of its parts are mounted. Ubuntu 24.04 for its Python, 3.12; 22.04 has 3.10.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# wget: the probes that KubeRay's operator puts into pods. gcc and Python's headers: torch.compile builds the
# launchers of its kernels on the machine where they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/*

# A run that is told to stop tidies up for up to 8 s; Ray would kill a job after 3. The second PATH is for login
# shells, in which older operators start Ray.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_JOB_STOP_WAIT_TIME_S=12 \
    RAY_USAGE_STATS_ENABLED=0
RUN echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh

# What the project needs, before the project: this layer of gigabytes stays until its versions change.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
ARG EXTRAS=s3,gcs,azure,cluster
RUN mkdir -p cvt_model pipeline/bench jobs && touch README.md LICENSE \
    && python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]" \
    && pip uninstall --yes cvt-pipeline

COPY . .
RUN pip install --no-cache-dir --no-deps .

# Its user may write nothing of the program, and all of a home: checkpoints, compiled kernels, Ray's token. A
# platform that picks a number of its own for the user (in group 0) has that home too.
RUN useradd --uid 10001 --gid 0 --create-home --home-dir /home/cvt cvt && chmod 0770 /home/cvt
ENV HOME=/home/cvt
USER 10001
WORKDIR /work

ENTRYPOINT ["cvt-pipeline"]
CMD ["--help"]
